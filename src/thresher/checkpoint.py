"""What a checkpoint says of a pruner: the entry in config.json and the pruner's tensors in the weight files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

CONFIG_KEY, MODULE = "token_pruning", "token_pruner"
EXTRA = "_extra_state"  # torch's name for what ``get_extra_state`` returns


class Entry(Mapping):
    """The ``token_pruning`` entry of a model's configuration: what its pruner is at the moment of reading.

    transformers copies a configuration before it writes it, and the copy of an entry is a plain dictionary. Only the
    copy that comes along with a copy of the model is an entry again.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def as_dict(self) -> dict[str, Any]:
        """The entry as config.json gets it."""
        return getattr(self.model, MODULE).to_dict()

    def __getitem__(self, key: str) -> Any:
        return self.as_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())

    def __len__(self) -> int:
        return len(self.as_dict())

    def __repr__(self) -> str:
        return repr(self.as_dict())

    def __deepcopy__(self, memo: dict) -> Entry | dict:
        model = memo.get(id(self.model))
        return self.as_dict() if model is None else Entry(model)

    def __reduce__(self) -> tuple:
        return Entry, (self.model,)
