"""The base class of every method: which tokens stay.

    tokens = reduce(tokens, choose(score(view)))          one step, after layer i in ``at``

A method is a dataclass in a file of its own. Its fields are its configuration (they are what config.json gets), its
parameters ride in the model's weights, and it overrides what its paper changes of ``score``, ``choose``, ``reduce``,
``gates``, ``loss``, ``phase`` and ``calibrate``. It never notices how tokens are removed.

Shapes: B batch, N tokens, S sites (the layers in ``at``).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import View, columns
from .bisection import search
from .cost import LayerCost, LayerCount, dense_macs, macs
from .tokens import Tokens

VERSION = 1
MODULE = "token_pruner"  # the name of the method among the modules of the model that it prunes
MISSED = 0.1  # of a target: so far from it what was found is no budget met
METHODS: dict[str, type[TokenPruner]] = {}


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of the model it serves."""

    name: str
    depth: int
    last_site: int  # the last layer whose score can still save something
    reads_first_only: bool  # the head reads the first token alone
    protected: tuple[int, ...]  # the model's own special tokens, as positions among the live tokens
    max_tokens: int | None
    costs: tuple[LayerCost, ...]
    first_site: int = 0
    inside: bool = True  # tokens leave before the FFN of their layer
    hidden: int = 0  # C
    causal: bool = False

    @property
    def finds_answers(self) -> bool:
        """Whether the head finds an answer in the text."""
        return self.name.endswith("ForQuestionAnswering")


@dataclass
class Record:
    """What happened in one forward: the views of the scored layers and the tokens of every layer."""

    views: list[View]
    counts: list[LayerCount]
    costs: list[LayerCost]
    answers: Any = None  # the model's output, where a trainer looks at held-out inputs

    @property
    def used(self) -> Tensor:
        """Scalar: MACs of the forward, expected ones in a soft stage (differentiable)."""
        return macs(self.costs, self.counts).sum()

    @property
    def dense(self) -> Tensor:
        """Scalar: MACs of the dense model on the same tokens without padding."""
        return dense_macs(self.costs, self.counts[0].n_attention).sum()

    def flops_fraction(self) -> Tensor:
        """Scalar: ``used / dense``."""
        return self.used / self.dense


@dataclass(eq=False, repr=False)
class TokenPruner(nn.Module):
    """Base class of the methods.

    Args:
        at: 0-based layers after whose attention tokens leave; the score of layer i decides what goes on from i.
            Default: a quarter, a half and three quarters of the depth.
        protect: tokens that never leave: positions among the live tokens (negative ones from the end), or
            ``{"ids": [...]}`` for token ids. Default: the first token of text encoders, the last of decoders, class,
            distillation and register tokens of vision models. At run time a bool (B, N) may be assigned as well.
    """

    target_flops: ClassVar[float | None] = None  # a field where a method has such a budget
    at: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)
    protect: Any = dataclasses.field(default=None, kw_only=True)

    name: ClassVar[str] = ""
    lr: ClassVar[float] = 2e-2  # learning rate of its own parameters, where no other is given
    needs_attention: ClassVar[bool] = True
    needs_values: ClassVar[bool] = False  # whether the score takes the keys or values of the layer
    scores_all: ClassVar[bool] = True  # whether the score takes all attention probabilities, which are then charged
    merges: ClassVar[bool] = False  # whether tokens are merged into others
    sized: ClassVar[bool] = False  # whether keys then weigh by the number of tokens that they stand for
    ranks_teacher: ClassVar[bool] = False  # whether ``loss`` wants the teacher's ranking
    learned: ClassVar[tuple[str, ...]] = ()  # fields that training or calibration changes; the state dict has them
    needs_table: ClassVar[bool] = False  # whether the budget is one of time, priced by ``table``, a LatencyTable

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls) and cls.name:
            METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        super().__init__()
        if self.target_flops is not None and not 0 < self.target_flops <= 1:
            raise ValueError(f"target_flops={self.target_flops}: expected a fraction of the dense MACs in (0, 1]")
        self.at = None if self.at is None else tuple(int(i) for i in self.at)
        self.info: ModelInfo | None = None
        self.record: Record | None = None
        self.hooks: Any = None  # while it prunes a model
        self.progress = 1.0
        self.counts: Tensor | None = None
        self.predictor_macs = 0  # that a score of its own takes, for each token at a site

    @property
    def statistic(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What the score takes of the attention probabilities, as ``View.over`` does: it is made with the attention
        where that is possible. Default: the attention received."""
        return columns

    # --- what a method overrides ---------------------------------------------------------------------------------
    def score(self, view: View) -> Tensor:
        """(B, N): the importance of each token. Default: the attention it receives, relative to uniform."""
        return view.attention_received()

    def choose(self, score: Tensor, view: View) -> Tensor:
        """(B, N) bool: the tokens that stay. Dead ones are removed and protected ones added afterwards."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tokens to keep")

    def reduce(self, view: View) -> Tokens:
        """The tokens after this site, ``view.keep`` being the choice. Default: drop the others."""
        return view.tokens.drop(view.keep, self.width(view.keep.shape[1], view.site))

    def gates(self, view: View) -> Tensor:
        """(B, N) logarithm of the gate of each token, while ``soft``."""
        raise NotImplementedError(f"{type(self).__name__} has no soft stage")

    def build(self, info: ModelInfo) -> None:
        """Create the parameters, once the model is known and ``at`` is settled."""

    def default_at(self, info: ModelInfo) -> tuple[int, ...]:
        """The layers to prune at when none were named."""
        quarters = (-(-info.depth * q // 4) - 1 for q in (1, 2, 3))
        return tuple(sorted({min(max(i, info.first_site), info.last_site) for i in quarters}))

    def width(self, slots: int, site: int) -> int | None:
        """An upper bound on the tokens a row keeps of ``slots`` at a site, where it follows from the shape alone."""
        return None

    def keeps_all(self, site: int) -> bool:
        """Whether nothing leaves at a site, whatever the input: in evaluation the site is then passed by, without
        ``score``, ``choose`` and ``reduce``; not so under torch.compile."""
        return False

    def phase(self, progress: float) -> str:
        """Name of the training stage at ``progress`` (0..1)."""
        return "hard"

    def loss(self, forward: Callable, batch: dict, record: Record, teacher: Any = None) -> Tensor | float:
        """What the method adds to the task loss. ``forward(**override)`` runs the model again on the batch."""
        return 0.0

    def prepare(self, forward: Callable, batches: Iterable[dict]) -> None:
        """Look at inputs before a training begins or goes on; arguments as in ``calibrate``. Nothing by default."""

    def knob(self) -> Callable[[float], None] | None:
        """A function of one number that changes how much the method removes: 0 as it is now, more removes more. It is
        turned until ``target_flops`` is met. None: there is no such number."""
        return None

    @torch.no_grad()
    def calibrate(self, forward: Callable, batches: Iterable[dict]) -> dict[str, float]:
        """Bring the method onto its budget on ``batches``; returns what was reached (empty: it has no budget).

        Default: turn the ``knob`` until ``target_flops`` is met. ``forward(batch)`` runs the model and returns the
        ``Record``. Raises ValueError where the target cannot be reached.
        """
        turn = None if self.target_flops is None else self.knob()
        if turn is None:
            return {}
        batches, tried = list(batches), []

        def fraction(by: float) -> float:
            turn(by)
            records = [forward(batch) for batch in batches]
            tried.append((float(sum(r.used for r in records) / sum(r.dense for r in records)), by))
            return tried[-1][0]

        reached = search(fraction, self.target_flops)
        least = min(tried)[0] > self.target_flops * 1.02
        if least or abs(reached - self.target_flops) > MISSED * self.target_flops:
            turn(0.0)
            found = "with all gone that may leave" if least else f"the nearest that {self.name} came,"
            raise ValueError(
                f"target_flops={self.target_flops} cannot be reached at={list(self.sites)}: {found} {reached:.3f} of "
                f"the MACs are left; prune at {'earlier' if least else 'other'} layers or choose another target"
            )
        return {"flops_fraction": reached, "shift": tried[-1][1]}

    def ablations(self, judge: Callable[[], tuple[float, float]]) -> dict[str, float]:
        """Measure, once training is over, what a part of the method is worth; the method is then as before.

        judge: gives quality in points, and the share of the dense MACs, on the validation part as the method is now.
        """
        return {}

    def metrics(self) -> dict[str, float]:
        """What to watch while training; ``PruningTrainer`` logs it."""
        return {}

    # --- what is the same for all --------------------------------------------------------------------------------
    @property
    def soft(self) -> bool:
        """Whether tokens fade (gates) instead of leaving: only in training, in a soft phase."""
        return self.training and self.phase(self.progress) == "soft"

    def bind(self, info: ModelInfo) -> None:
        """Settle ``at`` for a model and create the parameters.

        Raises:
            ValueError: a layer in ``at`` does not exist or can save nothing.
        """
        self.info = info
        at = self.default_at(info) if self.at is None else self.at
        for layer in at:
            if not info.first_site <= layer <= info.last_site:
                raise ValueError(
                    f"at={list(at)}: layer {layer} is not possible in {info.name}; its {info.depth} layers can be "
                    f"pruned at {info.first_site}..{info.last_site} (0-based)"
                )
        if list(at) != sorted(set(at)):
            raise ValueError(f"at={list(at)}: expected rising layers without repetition")
        self.sites = tuple(at)
        self.build(info)

    def site(self, layer: int) -> int:
        """Position of a layer in ``at``; -1 where it is not scored."""
        return self.sites.index(layer) if layer in self.sites else -1

    def protection(self, alive: Tensor, ids: Tensor | None) -> Tensor:
        """(B, N) bool: the protected tokens among those ``alive`` (B, N)."""
        protect = self.info.protected if self.protect is None else self.protect
        if isinstance(protect, Tensor):
            if protect.shape != alive.shape:
                raise ValueError(f"protect has shape {tuple(protect.shape)}, the batch has {tuple(alive.shape)}")
            return protect.to(alive.device) & alive
        if isinstance(protect, dict):
            if ids is None:
                raise ValueError("protect={'ids': ...} needs input_ids, the model was called without")
            return torch.isin(ids, torch.as_tensor(protect["ids"], device=ids.device)) & alive
        rank, live = alive.cumsum(1) - 1, alive.sum(1, keepdim=True)
        protected = torch.zeros_like(alive)
        for position in protect:
            protected = protected | (rank == (position if position >= 0 else live + position))
        return protected & alive

    def select(self, view: View) -> Tensor:
        """(B, N) bool: the method's choice among the live tokens, never empty, protected tokens included."""
        view.score = self.score(view)
        keep = self.choose(view.score, view) & view.alive | view.protected
        protect = self.info.protected if self.protect is None else self.protect
        if isinstance(protect, (tuple, list)) and {0, -1} & set(protect):  # which every row has
            return keep
        best = view.score.masked_fill(~view.alive, float("-inf")).argmax(1, keepdim=True)
        only = torch.zeros_like(keep).scatter(1, best, True) & view.alive
        return keep | only & ~keep.any(1, keepdim=True)

    def check_readout(self, info: ModelInfo) -> None:
        """Raise ValueError where no token is protected whose attention a score could go by."""
        protect = info.protected if self.protect is None else self.protect
        if isinstance(protect, (tuple, list)) and not protect:
            raise ValueError(
                f"{self.name} is not possible with {info.name}, which has no class token: name one whose attention "
                "counts, as in protect=(0,)"
            )

    def remember(self, views: list[View], counts: list[LayerCount]) -> None:
        """Take over the record of a forward."""
        if torch.compiler.is_compiling():
            return
        views = [view for view in views if view.site >= 0]
        if not torch.is_grad_enabled():
            for view in views:
                view.release()
        self.record = Record(views, counts, list(self.info.costs))

    @property
    def report(self) -> list[dict]:
        """The last forward, layer by layer: tokens entering, tokens kept, MACs, and the fraction of the dense MACs.

        Sums over the batch; padding is not counted.
        """
        if self.record is None:
            raise RuntimeError(
                "no forward has been recorded yet: call the model first (compiled models record nothing)"
            )
        rows = []
        start = self.record.counts[0].n_attention.float()
        for layer, (cost, count) in enumerate(zip(self.record.costs, self.record.counts, strict=True)):
            used = macs([cost], [count]).sum().item()
            after = self.record.counts[layer + 1].n_attention if layer + 1 < len(self.record.counts) else count.n_ffn
            rows.append(
                {
                    "layer": layer,
                    "tokens_in": count.n_attention.sum().item(),
                    "tokens_kept": after.sum().item(),
                    "macs": used,
                    "dense_macs": cost.macs(start, start).sum().item(),
                }
            )
        return rows

    def to_dict(self) -> dict:
        """What config.json gets; ``from_dict`` takes it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["at"] = list(self.sites) if hasattr(self, "sites") else self.at
        if isinstance(fields["protect"], Tensor):
            fields["protect"] = None  # belongs to one batch
        return {"method": self.name, "version": VERSION, **fields}

    @staticmethod
    def from_dict(config: Mapping) -> TokenPruner:
        """The method a configuration describes; keys it does not know are ignored.

        Raises:
            ValueError: unknown method, a newer version or values that the method cannot take.
        """
        entry = "the token_pruning entry of config.json"
        if not isinstance(config, Mapping):
            raise ValueError(f"{entry} is {config!r}: expected an object with the method's name and values")
        version = config.get("version", VERSION)
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(f"{entry} has version {version!r}, this thresher reads up to {VERSION}: update thresher")
        if config.get("method") not in METHODS:
            raise ValueError(f"unknown pruning method {config.get('method')!r}; known: {', '.join(sorted(METHODS))}")
        method = METHODS[config["method"]]
        known = {f.name for f in dataclasses.fields(method)}
        try:
            return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{entry} is nothing that {method.__name__} can take: {error}") from error

    def get_extra_state(self) -> Tensor:
        """``to_dict`` as JSON, (bytes,) uint8: weight files hold tensors alone."""
        return torch.frombuffer(bytearray(json.dumps(self.to_dict()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the fields in ``learned``. Raises ValueError where it cannot be read; see ``adopt``."""
        self.adopt(read_state(state))

    def adopt(self, entry: Mapping) -> None:
        """Take over the fields in ``learned`` from what ``to_dict`` said; what else a user chose stays as it is.

        Raises:
            ValueError: it is of another method.
        """
        method = TokenPruner.from_dict(entry)
        if method.name != self.name:
            raise ValueError(f"what was saved is of {method.name}, the model is pruned with {self.name}")
        for field in self.learned:
            setattr(self, field, getattr(method, field))

    def _apply(self, fn: Callable, recurse: bool = True) -> TokenPruner:
        """Move to another device, never to another precision: a threshold rounded to bfloat16 is another threshold."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def train(self, mode: bool = True) -> TokenPruner:
        """As in torch; raises RuntimeError where peft has frozen the method and trains the rest of the model."""
        model = self.hooks.model if mode and self.hooks is not None else None
        if model is not None and pruner_of(model) is self and not all(p.requires_grad for p in self.parameters()):
            adapted = any(hasattr(module, "adapter_layer_names") for module in model.modules())
            if adapted and any(parameter.requires_grad for parameter in model.parameters()):
                raise RuntimeError(
                    f"peft has frozen the parameters of {self.name} and would not save them: prune() after "
                    "get_peft_model, or give its configuration modules_to_save=['token_pruner']"
                )
        return super().train(mode)

    def __deepcopy__(self, memo: dict) -> TokenPruner:
        """Copy the method with the model that it prunes, or alone: its copy is then free for another model."""
        state = self.__getstate__()
        alone = self.hooks is not None and id(self.hooks.model) not in memo
        shared = {"hooks": state.pop("hooks")} if alone else {}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(state, memo), **shared)
        return copied

    def __getstate__(self) -> dict:
        """What a copy takes along: not the record of the last forward, whose tensors belong to a graph."""
        return {**self.__dict__, "record": None, "counts": None}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k not in ("method", "version"))


def pruner_of(model: nn.Module) -> TokenPruner | None:
    """The method that prunes ``model``, None where nothing does.

    peft's ``modules_to_save`` puts a wrapper in its place, with a copy for each adapter: the active one's acts. It is
    handed what was set on the wrapper.
    """
    module = getattr(model, MODULE, None)
    if module is None or isinstance(module, TokenPruner):
        return module
    active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
    method = module.modules_to_save[active[0]] if active else module.original_module
    for name in [name for name in vars(module) if not name.startswith("_") and name != "training"]:
        setattr(method, name, vars(module).pop(name))
    return method


def read_state(state: Tensor) -> dict:
    """What ``TokenPruner.get_extra_state`` wrote."""
    try:
        return json.loads(bytes(state.tolist()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of the token pruner is no JSON ({error})") from error


def falling(target: float, share: float) -> float:
    """The share of the MACs that is due when a ``share`` of a soft stage is over: from 1 to ``target`` in its first
    half."""
    return 1 + (target - 1) * min(1.0, 2 * share)


def budget_penalty(record: Record, due: float, weight: float | None = None) -> Tensor:
    """Scalar: ``weight`` (10) times the squared distance of the share of the MACs from what is due (Bonnaerens and
    Dambre, TMLR 2023)."""
    return (10.0 if weight is None else weight) * (record.flops_fraction() - due) ** 2


def ranks(score: Tensor, alive: Tensor) -> Tensor:
    """(B, N) long: the place of each live token by its score, 0 the best, the others behind; ties go to the lower
    position."""
    order = score.masked_fill(~alive, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def top_k(score: Tensor, k: Tensor, alive: Tensor) -> Tensor:
    """(B, N) bool: the ``k`` (B,) best-scored live tokens of each row."""
    return (ranks(score, alive) < k[:, None]) & alive


def kept_count(keep: float | int, live: Tensor, protected: Tensor | int = 0) -> Tensor:
    """(B,) = max(protected, 1, ceil(keep * live)) for a fraction, in thousandths; a count is clipped to ``live``
    (B,)."""
    if isinstance(keep, int):
        k = live.clamp(max=keep)
    else:
        k = live * round(keep * 1000) + 999
        k = (k - k % 1000) // 1000  # OpenVINO fuses a division by whole numbers into one that rounds
    return torch.maximum(k.clamp(min=1), torch.as_tensor(protected, device=live.device))


def check_keep(keep: Any, what: str = "keep") -> None:
    """Raise ValueError unless ``keep`` is a fraction in (0, 1] or a count >= 1."""
    ok = not isinstance(keep, bool) and (
        (isinstance(keep, int) and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)
    )
    if not ok:
        raise ValueError(f"{what}={keep!r}: expected a fraction in (0, 1] or a whole number of tokens from 1 up")
