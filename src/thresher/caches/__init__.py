"""Pruning the KV cache of decoders, one paper a file; importing this package makes the methods known by name."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
