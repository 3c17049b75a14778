"""Scores out of the logits of a classifier or a reranker, by the function that its folder names.

A CrossEncoder of sentence-transformers writes the name of its function into its folder. A name chooses one of a table
and is never run.

Shapes: K logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .files import read_json

BESIDE, OWN, OLD = "config_sentence_transformers.json", "sentence_transformers", "sbert_ce_default_activation_function"
NAME = "activation_fn"
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of torch.nn; each rises, so that candidates have one order
    "Sigmoid": Tensor.sigmoid,
    "Identity": Tensor.clone,
    "Tanh": Tensor.tanh,
    "Softplus": F.softplus,
    "LogSigmoid": F.logsigmoid,
}


def judged(logits: Tensor, config: Any) -> Tensor:
    """Return (..., K) scores out of logits (..., K).

    | K | where the folder names a function | where it names none |
    |---|---|---|
    | 1 | that one | of a regression the number itself, else its sigmoid |
    | more | Sigmoid: sigmoids; another: as at the right | by ``problem_type``: numbers, sigmoids or the softmax |

    Of one logit these are the scores of CrossEncoder, but for a regression: of that it takes the sigmoid, too, where
    nobody says otherwise. Of several logits it gives the logits themselves by default, which are no probabilities.
    """
    name = activation_of(config)
    if logits.shape[-1] == 1 and name is not None:
        return FUNCTIONS[name](logits)
    if config.problem_type == "regression":
        return logits
    if name == "Sigmoid" or config.problem_type == "multi_label_classification" or logits.shape[-1] == 1:
        return logits.sigmoid()
    return logits.softmax(-1)


def activation_of(config: Any) -> str | None:
    """Return the name, in ``FUNCTIONS``, of the function that a configuration has been ``settle``d to; else None."""
    named = (getattr(config, OWN, None) or {}).get(NAME)
    return named.rpartition(".")[2] if isinstance(named, str) else None


def settle_activation(model: str, config: Any) -> None:
    """Look up what the folder ``model``, or the hub, says of the function, and note it in its ``config``, as
    sentence-transformers 4 did: it is saved and exported with it.

    The first of three places counts: ``config_sentence_transformers.json``, ``sentence_transformers`` of the
    configuration, and what versions before 4 wrote there.

    Raises:
        ValueError: it names a function that is not in the table, or a prompt by default.
    """
    said = read_json(model, BESIDE)
    said = said if isinstance(said, dict) else {}
    prompts = said.get("prompts")
    if isinstance(prompts, dict) and prompts.get(said.get("default_prompt_name") or ""):
        raise ValueError(
            f"{model} sets its prompt {said['default_prompt_name']!r} before every pair, which is not understood: "
            f"write null for default_prompt_name into {BESIDE}, and the prompt into the texts"
        )
    named = said.get(NAME)
    own = getattr(config, OWN, None)
    own = own if isinstance(own, dict) else {}
    named = named or own.get(NAME) or getattr(config, OLD, None)
    if named is None:
        return
    known = isinstance(named, str) and named.startswith("torch.nn.") and named.rpartition(".")[2] in FUNCTIONS
    several = isinstance(named, str) and named.endswith(".Softmax") and config.num_labels > 1
    if not known and not several:
        raise ValueError(
            f"{model} gives scores by {NAME} {named!r}, which is not understood: {', '.join(FUNCTIONS)} of torch.nn "
            f"are; write one of them, as in 'torch.nn.Sigmoid', or null, into {BESIDE}"
        )
    setattr(config, OWN, own | {NAME: named})


def forget_activation(config: Any) -> None:
    """Leave the function out of a configuration: that of another head."""
    own = getattr(config, OWN, None)
    if isinstance(own, dict):
        own.pop(NAME, None)
    if hasattr(config, OLD):
        delattr(config, OLD)
