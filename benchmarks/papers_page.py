"""docs/papers.md out of the docstrings: which paper is implemented where, and how it departs from it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

PREAMBLE = """\
# Papers

Written by `python benchmarks/run.py --tables` from the docstrings; do not edit.

One paper is one file, and its class bears the paper's name. Each departure from a paper stands below with its reason.
None of the authors' code is in Thresher.

## How to cite

Name the paper of the method that you used, as it stands below, and what you ran it with: `CITATION.cff` at the top of
the repository, which GitHub shows as "Cite this repository". A figure of this site is cited with its row in
[results](results.md), which names the command and the machine.

"""
ROOMS = {
    "methods": ("Tokens that leave the layers", "What they are told apart by: [methods](methods.md)."),
    "caches": ("Entries that leave a cache", "When to take which: [long prompts](long-prompts.md)."),
    "prompts": (
        "Tokens that leave a prompt before it is read",
        "[Long prompts](long-prompts.md#prompts-that-shorten).",
    ),
}


def implemented() -> Iterator[tuple[str, str, type]]:
    """(room, name in the configuration, class) of everything registered, and of what shortens prompts."""
    import thresher.api  # noqa: F401  registers the methods
    from thresher.core.pruner import METHODS
    from thresher.prompts.gemfilter import GemFilter

    for name, kind in sorted(METHODS.items(), key=lambda item: item[1].__name__.lower()):
        if kind.__module__.startswith("thresher."):
            yield kind.__module__.split(".")[1], name, kind
    yield "prompts", "", GemFilter


def paper_of(kind: type) -> str | None:
    """The paper, as the first sentence of the class or of its file names it: what stands in brackets with a year."""
    for text in (kind.__doc__, sys.modules[kind.__module__].__doc__):
        first = " ".join((text or "").split("\n\n")[0].split())
        for start in (match.start() for match in re.finditer(r"\(", first)):
            named = _bracket(first, start)
            if re.search(r"\b20\d\d\b", named):
                return re.sub(r"\barXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", named)
    return None


def _bracket(text: str, start: int) -> str:
    """What stands in the bracket that opens at ``start``."""
    depth = 0
    for end in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
    return ""


def departures(kind: type) -> list[str]:
    """The rows of the class's table ``paper | here | why``."""
    lines = [line.strip() for line in inspect.getdoc(kind).splitlines()]
    if "| paper | here | why |" not in lines:
        return []
    rest = lines[lines.index("| paper | here | why |") :]
    return rest[: rest.index("") if "" in rest else None]


def section(name: str, kind: type, paper: str) -> list[str]:
    """What the page says of a method."""
    file = f"src/{kind.__module__.replace('.', '/')}.py"
    known = f', in a configuration `"{name}"`' if name else ""
    lines = [f"### {kind.__name__}", "", f"{paper}.", "", f"`{file}`{known}.", ""]
    return [*lines, *departures(kind), *([""] if departures(kind) else [])]


def papers_page() -> str:
    """The page."""
    lines, own = [*PREAMBLE.splitlines()], []
    for room, (title, told) in ROOMS.items():
        lines += [f"## {title}", "", told, ""]
        found: list[tuple[str, Any]] = [(name, kind) for where, name, kind in implemented() if where == room]
        for name, kind in found:
            if (paper := paper_of(kind)) is None:
                own.append(f"* `{kind.__name__}`: {' '.join(inspect.getdoc(kind).split(chr(10) * 2)[0].split())}")
                continue
            lines += section(name, kind, paper)
    return "\n".join([*lines, "## Without a paper", "", *own, ""])
