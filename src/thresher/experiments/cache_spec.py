"""What commands ask about decoders: whether a model is one, and which method prunes its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.spec import option

if TYPE_CHECKING:
    from ..caches.pruner import CachePruner


def decodes(model: str | None) -> bool:
    """Whether a model is a decoder, which has a cache to prune and is given no labels."""
    from ..data.models import is_decoder

    return model is not None and is_decoder(model)


def reads(model: str | None) -> bool:
    """Whether a model is a language model that reads pictures, of whose prompts tokens can leave."""
    from ..data.pictures import reads_pictures

    return model is not None and reads_pictures(model)


def shares(value: str) -> float | int | tuple:
    """Read shares (0.5) or numbers (64) of tokens, one or several with commas between them."""
    read = tuple(float(share) if "." in share else int(share) for share in value.split(","))
    return read[0] if len(read) == 1 else read


def cache_method(name: str, options: Mapping[str, Any]) -> CachePruner:
    """Make a method that prunes the cache of any decoder.

    Raises:
        ValueError: it is none, or has to learn from texts first.
    """
    from ..caches.pruner import CachePruner
    from ..data.models import make_method

    method: Any = make_method(name, dict(options))
    if not isinstance(method, CachePruner):
        raise ValueError(f"{name} prunes tokens, and no cache of a decoder: use snapkv, keydiff, h2o, ...")
    if type(method).ready is not CachePruner.ready:
        raise ValueError(
            f"{name} has to learn from texts first, which commands cannot do: in Python prune(model, method), then "
            f"model.token_pruner.{'learn' if hasattr(method, 'learn') else 'calibrate'}(texts)"
        )
    return method


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Name a method that prunes the cache of a decoder, or the pictures of a model that reads them, where its folder
    names none."""

    method: str | None = option(
        "Of a decoder: snapkv, keydiff, ...; of one that reads pictures: divprune, fastv, ...", metavar="A[,B]"
    )
    keep: float | None = option(
        "Of these: share (0.25) or number (512) of the prompt, or of a picture.", metavar="K", parser=shares
    )
    hold: int | None = option("Of a decoder: entries to which it returns while decoding.", metavar="N", min=1)

    def cache_methods(self, more: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, CachePruner]:
        """The methods by their names; ``more``: options of some of them. Raises ValueError for what is none."""
        if self.method is None and (self.keep is not None or self.hold is not None):
            raise ValueError("keep and hold belong to a method: name it (--method snapkv)")
        if isinstance(self.keep, tuple):
            raise ValueError(f"keep={self.keep}: give one share or number")
        budget = {name: value for name in ("keep", "hold") if (value := getattr(self, name)) is not None}
        made: dict[str, CachePruner] = {}
        for name in (self.method or "").split(",") if self.method else ():
            method = cache_method(name.strip(), {**budget, **dict((more or {}).get(name.strip(), {}))})
            made[method.name] = method
        return made
