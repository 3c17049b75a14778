"""What commands ask about decoders: whether a model is one, and which method prunes its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.spec import option


def decodes(model: str | None) -> bool:
    """Whether a model is a decoder, which has a cache to prune and is given no labels."""
    from ..data.models import is_decoder

    return model is not None and is_decoder(model)


def shares(value: str) -> float | int | tuple:
    """Read shares (0.5) or numbers (64) of tokens, one or several with commas between them."""
    read = tuple(float(share) if "." in share else int(share) for share in value.split(","))
    return read[0] if len(read) == 1 else read


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Name a method that prunes the cache of a decoder, where the decoder's folder names none."""

    method: str | None = option("Of a decoder: snapkv, keydiff, ..., one or several.", metavar="A[,B]")
    keep: float | None = option("Of a decoder: share (0.25) or number (512) of its prompt.", metavar="K", parser=shares)
    hold: int | None = option("Of a decoder: entries to which it returns while decoding.", metavar="N", min=1)

    def cache_methods(self, more: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """The methods by their names; ``more``: options of some of them. Raises ValueError for what is none."""
        from ..caches.pruner import CachePruner
        from ..data.models import make_method

        if self.method is None and (self.keep is not None or self.hold is not None):
            raise ValueError("keep and hold belong to a method: name it (--method snapkv)")
        if isinstance(self.keep, tuple):
            raise ValueError(f"keep={self.keep}: give one share or number")
        budget = {name: value for name in ("keep", "hold") if (value := getattr(self, name)) is not None}
        made: dict[str, Any] = {}
        for name in (self.method or "").split(",") if self.method else ():
            method: Any = make_method(name.strip(), {**budget, **dict((more or {}).get(name.strip(), {}))})
            if not isinstance(method, CachePruner):
                raise ValueError(f"{name} prunes tokens, and no cache of a decoder: use snapkv, keydiff, h2o, ...")
            made[method.name] = method
        return made
