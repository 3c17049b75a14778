"""Thresher: faster transformers by removing the tokens they no longer need."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import calling, dense, prune, unprune
    from .caches.baselines import RandomCache
    from .caches.expected_attention import ExpectedAttention
    from .caches.h2o import H2O
    from .caches.keydiff import KeyDiff
    from .caches.knorm import Knorm
    from .caches.kvzip import KVzip
    from .caches.ltp import LTPCache
    from .caches.pruner import CachePruner
    from .caches.snapkv import SnapKV
    from .caches.streamingllm import StreamingLLM
    from .caches.tova import TOVA
    from .caches.triattention import TriAttention
    from .core.pruner import TokenPruner
    from .exporting.compiled import compiled
    from .exporting.export import export
    from .exporting.runtime import load_runtime
    from .methods.adapler import AdapLeR
    from .methods.atome import AToMe
    from .methods.ats import ATS
    from .methods.baselines import Cut, FirstK, Random
    from .methods.cdpruner import CDPruner
    from .methods.dart import DART
    from .methods.divprune import DivPrune
    from .methods.dynamicvit import DynamicViT
    from .methods.entropy import Entropy
    from .methods.evit import EViT
    from .methods.evs import EVS
    from .methods.fastv import FastV
    from .methods.lat import LAT
    from .methods.lazyllm import LazyLLM
    from .methods.ltmp import LTMP
    from .methods.ltp import LTP
    from .methods.powerbert import PoWERBERT
    from .methods.pyramiddrop import PyramidDrop
    from .methods.silence import Silence
    from .methods.sparsevlm import SparseVLM
    from .methods.spatial import Grid, Pool
    from .methods.spatten import SpAtten
    from .methods.threshold import Threshold
    from .methods.tome import ToFu, ToMe
    from .methods.top import ToP
    from .methods.topk import TopK
    from .methods.transkimmer import Transkimmer
    from .methods.trbert import TRBERT
    from .methods.vatp import VATP
    from .methods.visionzip import VisionZip
    from .methods.vispruner import VisPruner
    from .prompts.compress import Compressed, compress
    from .prompts.gemfilter import GemFilter
    from .prompts.llmlingua2 import LLMLingua2, likelihood_labels
    from .training.trainer import PruningTrainer

__version__ = "0.2.0"
__all__ = [
    "ATS",
    "DART",
    "EVS",
    "H2O",
    "LAT",
    "LTMP",
    "LTP",
    "TOVA",
    "TRBERT",
    "VATP",
    "AToMe",
    "AdapLeR",
    "CDPruner",
    "CachePruner",
    "Compressed",
    "Cut",
    "DivPrune",
    "DynamicViT",
    "EViT",
    "Entropy",
    "ExpectedAttention",
    "FastV",
    "FirstK",
    "GemFilter",
    "Grid",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LLMLingua2",
    "LTPCache",
    "LazyLLM",
    "PoWERBERT",
    "Pool",
    "PruningTrainer",
    "PyramidDrop",
    "Random",
    "RandomCache",
    "Silence",
    "SnapKV",
    "SpAtten",
    "SparseVLM",
    "StreamingLLM",
    "Threshold",
    "ToFu",
    "ToMe",
    "ToP",
    "TokenPruner",
    "TopK",
    "Transkimmer",
    "TriAttention",
    "VisPruner",
    "VisionZip",
    "calling",
    "compiled",
    "compress",
    "dense",
    "export",
    "likelihood_labels",
    "load_runtime",
    "prune",
    "unprune",
]
_HOMES = {
    "api": ("calling", "dense", "prune", "unprune"),
    "caches.baselines": ("RandomCache",),
    "caches.expected_attention": ("ExpectedAttention",),
    "caches.h2o": ("H2O",),
    "caches.keydiff": ("KeyDiff",),
    "caches.knorm": ("Knorm",),
    "caches.kvzip": ("KVzip",),
    "caches.ltp": ("LTPCache",),
    "caches.pruner": ("CachePruner",),
    "caches.snapkv": ("SnapKV",),
    "caches.streamingllm": ("StreamingLLM",),
    "caches.tova": ("TOVA",),
    "caches.triattention": ("TriAttention",),
    "exporting.compiled": ("compiled",),
    "exporting.export": ("export",),
    "methods.dynamicvit": ("DynamicViT",),
    "methods.evs": ("EVS",),
    "methods.dart": ("DART",),
    "methods.vispruner": ("VisPruner",),
    "methods.visionzip": ("VisionZip",),
    "methods.pyramiddrop": ("PyramidDrop",),
    "methods.sparsevlm": ("SparseVLM",),
    "methods.spatial": ("Grid", "Pool"),
    "methods.fastv": ("FastV",),
    "methods.divprune": ("DivPrune",),
    "methods.cdpruner": ("CDPruner",),
    "methods.adapler": ("AdapLeR",),
    "methods.atome": ("AToMe",),
    "methods.silence": ("Silence",),
    "methods.ats": ("ATS",),
    "methods.baselines": ("Cut", "FirstK", "Random"),
    "methods.entropy": ("Entropy",),
    "methods.ltmp": ("LTMP",),
    "methods.evit": ("EViT",),
    "methods.powerbert": ("PoWERBERT",),
    "methods.lat": ("LAT",),
    "methods.lazyllm": ("LazyLLM",),
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
    "prompts.compress": ("Compressed", "compress"),
    "prompts.gemfilter": ("GemFilter",),
    "prompts.llmlingua2": ("LLMLingua2", "likelihood_labels"),
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
