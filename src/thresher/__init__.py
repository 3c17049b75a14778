"""Thresher: faster transformers by removing the tokens they no longer need."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import calling, dense, prune, unprune
    from .caches.baselines import RandomCache
    from .caches.keydiff import KeyDiff
    from .caches.knorm import Knorm
    from .caches.pruner import CachePruner
    from .caches.streamingllm import StreamingLLM
    from .core.pruner import TokenPruner
    from .exporting.export import export
    from .exporting.runtime import load_runtime
    from .methods.adapler import AdapLeR
    from .methods.ats import ATS
    from .methods.baselines import Cut, FirstK, Random
    from .methods.dynamicvit import DynamicViT
    from .methods.entropy import Entropy
    from .methods.evit import EViT
    from .methods.lat import LAT
    from .methods.ltmp import LTMP
    from .methods.ltp import LTP
    from .methods.powerbert import PoWERBERT
    from .methods.spatten import SpAtten
    from .methods.threshold import Threshold
    from .methods.tome import ToFu, ToMe
    from .methods.top import ToP
    from .methods.topk import TopK
    from .methods.transkimmer import Transkimmer
    from .methods.trbert import TRBERT
    from .methods.vatp import VATP
    from .training.trainer import PruningTrainer

__version__ = "0.1.0"
__all__ = [
    "ATS",
    "LAT",
    "LTMP",
    "LTP",
    "TRBERT",
    "VATP",
    "AdapLeR",
    "CachePruner",
    "Cut",
    "DynamicViT",
    "EViT",
    "Entropy",
    "FirstK",
    "KeyDiff",
    "Knorm",
    "PoWERBERT",
    "PruningTrainer",
    "Random",
    "RandomCache",
    "SpAtten",
    "StreamingLLM",
    "Threshold",
    "ToFu",
    "ToMe",
    "ToP",
    "TokenPruner",
    "TopK",
    "Transkimmer",
    "calling",
    "dense",
    "export",
    "load_runtime",
    "prune",
    "unprune",
]
_HOMES = {
    "api": ("calling", "dense", "prune", "unprune"),
    "caches.baselines": ("RandomCache",),
    "caches.keydiff": ("KeyDiff",),
    "caches.knorm": ("Knorm",),
    "caches.pruner": ("CachePruner",),
    "caches.streamingllm": ("StreamingLLM",),
    "exporting.export": ("export",),
    "methods.dynamicvit": ("DynamicViT",),
    "methods.adapler": ("AdapLeR",),
    "methods.ats": ("ATS",),
    "methods.baselines": ("Cut", "FirstK", "Random"),
    "methods.entropy": ("Entropy",),
    "methods.ltmp": ("LTMP",),
    "methods.evit": ("EViT",),
    "methods.powerbert": ("PoWERBERT",),
    "methods.lat": ("LAT",),
    "methods.ltp": ("LTP",),
    "methods.spatten": ("SpAtten",),
    "methods.threshold": ("Threshold",),
    "methods.top": ("ToP",),
    "methods.tome": ("ToFu", "ToMe"),
    "methods.topk": ("TopK",),
    "methods.transkimmer": ("Transkimmer",),
    "methods.trbert": ("TRBERT",),
    "methods.vatp": ("VATP",),
    "core.pruner": ("TokenPruner",),
    "exporting.runtime": ("load_runtime",),
    "training.trainer": ("PruningTrainer",),
}


def __getattr__(name: str):
    """Import a public name when it is first used: the command line is quick because torch can wait."""
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
