"""What a checkpoint says of a pruner: the entry in config.json, and the pruner's tensors in the weight files.

transformers loads a model without the pruner's tensors and does not say from which file of which folder the others
came: ``subfolder``, ``revision`` and ``variant`` are forgotten. The configuration does come from there. Its entry
therefore names the tensors by their digest, and the file that holds just these is the right one, wherever it lies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, uint8
from transformers import PreTrainedModel

from .core.compat import load_offloaded
from .core.method import MODULE, Pruner, pruner_in, read_state

EXTRA = "_extra_state"  # torch's name for what ``get_extra_state`` returns
DEPTHS = ("", "*/", "*/*/")  # where weight files are looked for, until one fits: the folder, its subfolders
OWN = re.compile(rf"(?:(?P<part>.*)\.)?{MODULE}\.(?P<name>[^.].*)")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


class Entry(Mapping):
    """The ``token_pruning`` entry of a model's configuration: what its pruner is at the moment of reading.

    transformers copies a configuration before it writes it, and the copy of an entry is a plain dictionary. Only the
    copy that comes along with a copy of the model is an entry again.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def as_dict(self) -> dict[str, Any]:
        """The entry as config.json gets it."""
        pruner = pruner_in(self.model)
        tensors = tensors_of(pruner)
        return {**pruner.to_dict(), **({"weights": digest(tensors)} if tensors else {})}

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


@dataclass
class Stored:
    """The tensors of one pruner in the weight files of one model, and its method's entry."""

    place: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    entry: dict[str, Any] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in sorted(self.tensors.items())}


def tensors_of(pruner: Pruner) -> dict[str, Tensor]:
    """The parameters and buffers of a method that are saved, on the CPU."""
    load_offloaded(pruner)
    return {name: tensor.detach().cpu() for name, tensor in pruner.state_dict().items() if EXTRA not in name}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Name tensors by what is in them: a hash over their names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def read_folder(folder: Path) -> list[Stored]:
    """The pruners in the weight files of a folder, whatever part of a model they prune; safetensors only.

    Raises:
        ValueError: a weight file cannot be read.
    """
    found: dict[tuple[str, str], Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no dictionary
                    if match := OWN.fullmatch(key):
                        at = (SHARD.sub("", path.stem), match["part"] or "")
                        stored = found.setdefault(at, Stored(" of ".join(filter(None, (at[1], str(path))))))
                        if match["name"] == EXTRA:
                            stored.entry = read_state(file.get_tensor(key))
                        elif EXTRA not in match["name"]:
                            stored.tensors[match["name"]] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"corrupted checkpoint: {path} cannot be read ({error})") from error
    return list(found.values())


def stored_at(folder: str | Path, wanted: str | None) -> Stored:
    """The pruner that a folder named by the user holds; ``wanted``: the digest that says which of several.

    Raises:
        ValueError: the folder holds none, or several.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"checkpoint={str(folder)!r} is no folder: expected the one that the pruned model was saved in"
        )
    found = {digest(stored.tensors): stored for stored in read_folder(Path(folder))}
    if wanted in found:
        return found[wanted]
    if len(found) != 1:
        held = "; ".join(stored.place for stored in found.values()) or "none"
        raise ValueError(f"checkpoint={str(folder)!r}: expected a folder with one token pruner, it holds {held}")
    return next(iter(found.values()))


def stored_with(model: PreTrainedModel, wanted: str | None) -> Stored:
    """The pruner in the checkpoint that ``model`` was loaded from.

    Args:
        wanted: the digest of its tensors, from the entry in config.json. None: the checkpoint must hold one pruner.

    Raises:
        ValueError: there is no such checkpoint, or it is not clear which one it is.
    """
    source, name = model.config.name_or_path, type(model).__name__
    if not source:
        raise ValueError(
            f"{name} does not know its checkpoint, since it is a part of a model or was built from a configuration: "
            "pass checkpoint=, the folder with the pruner's weights, or name a method to start anew"
        )
    seen: dict[str, Stored] = {}
    for depth in DEPTHS:
        for folder in sorted({path.parent for root in _roots(source) for path in root.glob(f"{depth}*.safetensors")}):
            seen.update({digest(stored.tensors): stored for stored in read_folder(folder)})
        if wanted in seen:
            return seen[wanted]
    if not seen:
        raise ValueError(
            f"{source} holds no weights of the pruner that its config.json names: a model that was loaded without "
            "prune() was saved there. Pass checkpoint=, a folder that has them, or name a method to start anew"
        )
    only = next(iter(seen.values()))
    if len(seen) == 1 and wanted is None:
        return only
    if len(seen) == 1:
        raise ValueError(
            f"corrupted checkpoint: {only.place} holds {only.shapes} of the pruner's weights, which are not those that "
            "config.json names. Pass checkpoint=, the folder of the right ones"
        )
    raise ValueError(
        f"it is not clear which weights of a pruner belong to this {name}: "
        + ("those that its config.json names are not there" if wanted else "its config.json does not say")
        + f". Found: {'; '.join(stored.place for stored in seen.values())}. Pass checkpoint=, the right folder"
    )


def _roots(source: str) -> list[Path]:
    """The folders that ``source`` may stand for: itself, or the revisions of a repository in the hub's cache."""
    if Path(source).is_dir():
        return [Path(source)]
    cached = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model") / "snapshots"
    return sorted(cached.iterdir()) if cached.is_dir() else []


def load_into(pruner: Pruner, stored: Stored) -> None:
    """Give a bound method the tensors that were stored.

    Raises:
        ValueError: they are not the ones that the method has.
    """
    needed = {name: tuple(tensor.shape) for name, tensor in tensors_of(pruner).items()}
    if stored.shapes != needed:
        raise ValueError(
            f"corrupted checkpoint: {stored.place} holds {stored.shapes} of the pruner's "
            f"weights, {pruner.name} needs {needed}"
        )
    pruner.load_state_dict(stored.tensors, strict=False)
