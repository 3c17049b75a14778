"""What a tagger finds: entities out of the labels of tokens, and how many of them another model finds as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PREFIXES = ("B-", "I-", "E-", "S-", "L-", "U-")
BEGINS, ENDS = ("B", "S", "U"), ("E", "S", "L", "U")  # an entity with this token, or behind it


class Entity(NamedTuple):
    """A run of tokens of one type, from ``start`` up to and without ``end``."""

    kind: str
    start: int
    end: int


class Agreement(NamedTuple):
    """Entities that both models find, alike to the token, and those that each finds."""

    both: int
    dense: int
    pruned: int

    @property
    def f1(self) -> float:
        """Return F1 of the pruned model, the dense one taken for true, in [0, 1]; 1 where neither finds one."""
        found = self.dense + self.pruned
        return 2 * self.both / found if found else 1.0


def prefixes_of(labels: Iterable[str]) -> tuple[str, ...]:
    """What may stand before a type in a scheme of these labels: "B-" and "I-", and the others of BIOES and BILOU where
    one of the labels has such a one and every label but "O" has one of all ("E-MAIL" beside "NAME" is a type)."""
    begins = {label[:2] for label in labels if label != "O"}
    return PREFIXES if begins <= {*PREFIXES} and begins & {*PREFIXES[:2]} else PREFIXES[:2]


def entities(labels: Sequence[str | None], known: Iterable[str] = ()) -> list[Entity]:
    """Read entities off the labels of tokens; ``known``: all labels of the tagger (default: those of the text).

    "B-X" begins one of type X, "I-X" goes on with it, and begins one where none of that type is open (as seqeval's
    default and transformers' "simple" do). "E-X" and "L-X" go on as "I-X" does and end it; "S-X" and "U-X" are one of a
    single token (BIOES, BILOU; see ``prefixes_of``). Of a type without a prefix every run is an entity; "O" is none.
    None: the token, as [CLS], counts as "O"."""
    found: list[Entity] = []
    prefixes = prefixes_of({*known} or {label for label in labels if label})
    opened, last = 0, None
    for i, label in enumerate([*labels, None]):
        prefix, kind = label.split("-", 1) if label and label[:2] in prefixes else ("", label)
        own = None if kind == "O" else kind
        if last is not None and (own != last or prefix in BEGINS):
            found.append(Entity(last, opened, i))
            last = None
        if own is not None and last is None:
            opened, last = i, own
        if own is not None and prefix in ENDS:
            found.append(Entity(own, opened, i + 1))
            last = None
    return found


def agreement(dense: Iterable[Entity], pruned: Iterable[Entity]) -> dict[str, Agreement]:
    """Count by type what two models find in a text, types in alphabetical order; those of neither are left out."""
    one, other = set(dense), set(pruned)
    both, left, right = (Counter(entity.kind for entity in some) for some in (one & other, one, other))
    return {kind: Agreement(both[kind], left[kind], right[kind]) for kind in sorted({*left, *right})}


def together(parts: Iterable[Agreement]) -> Agreement:
    """Sum agreements, of types or of texts."""
    sums = [sum(column) for column in zip(*parts, strict=True)] or [0, 0, 0]
    return Agreement(*sums)
