"""Pictures, clips and sounds in the prompt of a language model: which tokens they are, and what travels beside them.

A tower turns them into states, and the *reader*, the model that holds tower and language model, puts these in the place
of their placeholders. The language model sees states alone, so that the reader's arguments are looked at
(``Prompt``). Masks, rotary positions and position ids are made at full size before tokens leave, and are then cut.

Shapes: B batch, N0 tokens of the prompt, C channels of a state, V tokens of pictures in the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

IMAGE, VIDEO, AUDIO = KINDS = ("image", "video", "audio")
ALL = "all"  # of ``modality``
LANGUAGE = ("language_model", "text_model")  # what readers call it
DEEP = ("visual_pos_masks", "deepstack_visual_embeds")  # arguments of a language model (Qwen3-VL)
IGNORED = -100  # of labels


def placeholders(config: Any) -> dict[str, int]:
    """The token id that stands for each kind of input, by a model's configuration."""
    found = {}
    for kind in KINDS:
        names = (f"{kind}_token_id", f"{kind}_token_index")
        ids = [value for name in names if isinstance(value := getattr(config, name, None), int)]
        if ids:
            found[kind] = ids[0]
    return found


def find_reader(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel] | None:
    """The model that puts pictures or sounds into the input of a language model, and the latter; None: there is
    none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and placeholders(module.config):
            for name in LANGUAGE:
                inner = module._modules.get(name)
                if isinstance(inner, PreTrainedModel):
                    return module, inner
    return None


class Prompt:
    """What a reader was given in one forward.

    Args:
        reader: that model; None: it is not called yet.
        given: its arguments by name.
        labels: (B, N0), where a loss is asked for.
    """

    def __init__(self, reader: PreTrainedModel | None, given: dict[str, Any], labels: Tensor | None = None):
        self.reader, self.given, self.labels = reader, given, labels

    @cached_property
    def ids(self) -> Tensor:
        """(B, N0) token ids; where states were given in their place, the placeholders found among them, and -1.

        Raises:
            ValueError: states were given without a placeholder among them.
        """
        ids, reader = self.given.get("input_ids"), self.reader
        if ids is not None:
            return ids
        assert reader is not None, "a reader was called"
        states = self.given.get("inputs_embeds")
        if states is None:
            raise ValueError(f"{type(reader).__name__} was given neither input_ids nor inputs_embeds")
        return embedded_ids(reader, states)

    def asked(self) -> Tensor | None:
        """(B, N0) bool: the tokens whose next one has a label, so that a loss asks for their states; None: none."""
        if self.labels is None:
            return None
        return torch.nn.functional.pad(self.labels, (0, 1), value=IGNORED)[:, 1:].to(self.ids.device) != IGNORED

    def tokens(self, kinds: dict[str, int], modality: str) -> Tensor:
        """(B, N0) bool: the tokens of pictures of a ``modality``."""
        wanted = [number for kind, number in kinds.items() if modality in (kind, ALL)]
        return torch.isin(self.ids, torch.tensor(wanted, device=self.ids.device))


def embedded_ids(reader: PreTrainedModel, states: Tensor) -> Tensor:
    """(B, N0) long: the placeholders among the ``states`` (B, N0, C) that were given for tokens; -1: any other."""
    embedding: Any = reader.get_input_embeddings()
    ids = torch.full(states.shape[:2], -1, device=states.device)
    for number in placeholders(reader.config).values():
        if number < embedding.num_embeddings:
            own = embedding(torch.tensor(number, device=embedding.weight.device)).to(states.device)
            ids = ids.masked_fill((states == own).all(-1), number)
    if states.shape[1] > 1 and not bool((ids >= 0).any()):
        raise ValueError(
            "inputs_embeds hold no placeholder of a picture or sound, so that nobody can tell which of them may leave: "
            "call the model with input_ids, or within dense(model)"
        )
    return ids


def newlines(reader: PreTrainedModel, states: Tensor) -> Tensor | None:
    """(B, N0) bool: the tokens that end a row of patches (LLaVA-Next); None: the model has none."""
    newline = getattr(reader, "image_newline", None)
    if not isinstance(newline, Tensor) or newline.shape != states.shape[-1:]:
        return None
    return (states == newline.to(states.device, states.dtype)).all(-1)


def numbered(ids: Tensor, tokens: Tensor, visual: Tensor) -> Tensor:
    """(B, N0) long: the number of the picture that each token belongs to, within its row; -1: to none.

    A picture is a run of one placeholder, ``tokens`` (B, N0). Newlines within it are none of its tokens, ``visual``.
    """
    before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]
    return ((tokens & (ids != before)).cumsum(1) - 1).masked_fill(~visual, -1)


@dataclass(eq=False)
class Deep:
    """States of pictures that are added after the first layers (deepstack).

    Attributes:
        place: (B, N0) long, the row of ``states`` of each token; -1: none.
        states: for each of these layers (V, C).
    """

    place: Tensor
    states: list[Tensor]

    @classmethod
    def taken(cls, kwargs: dict[str, Any]) -> Deep | None:
        """Take them out of the arguments of a language model; None: there are none."""
        masks, states = (kwargs.get(name) for name in DEEP)
        if masks is None or not states:
            return None
        kwargs.update(dict.fromkeys(DEEP))
        place = (masks.flatten().cumsum(0) - 1).view_as(masks).masked_fill(~masks, -1)
        return cls(place, list(states))

    def add(self, layer: int, hidden: Tensor, index: Tensor) -> Tensor:
        """``hidden`` (B, N, C) after a layer with what is added there; ``index`` (B, N): the original positions."""
        if layer >= len(self.states):
            return hidden
        place = self.place.to(hidden.device).gather(1, index)
        rows = self.states[layer].to(hidden.device, hidden.dtype)
        return torch.where((place >= 0)[..., None], hidden + rows[place.clamp(min=0)], hidden)
