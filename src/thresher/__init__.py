"""Thresher: faster transformers by removing the tokens they no longer need."""

from .api import dense, prune, unprune
from .methods.ltp import LTP
from .methods.threshold import Threshold
from .methods.topk import FirstK, Random, TopK
from .pruner import TokenPruner

__version__ = "0.1.0"
__all__ = ["LTP", "FirstK", "Random", "Threshold", "TokenPruner", "TopK", "dense", "prune", "unprune"]
