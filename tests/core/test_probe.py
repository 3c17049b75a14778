"""The trial that prune() makes of a model: what it refuses, what it lets pass, and that it leaves no trace."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LayoutLMModel
from transformers.models.bert.modeling_bert import BertLayer

from support.families import FAMILIES
from thresher import LTP, FirstK, TopK, prune, unprune
from thresher.core.architecture import find_architecture
from thresher.core.hooks import Hooks
from thresher.core.probe import kinds_end, probe, structural_copy
from thresher.core.tokens import Packed
from thresher.core.view import View

BERT = FAMILIES["bert"]
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


class ByPlace(BertLayer):
    """Adds a number that goes by the place of a token in the tensor."""

    def forward(self, hidden_states, *args, **kwargs):
        places = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)[:, None]
        return super().forward(hidden_states + places.sin(), *args, **kwargs)


class Mixing(BertLayer):
    """Each token takes a little of the one before it."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states + 0.5 * hidden_states.roll(1, dims=1), *args, **kwargs)


class ByBatch(BertLayer):
    """Tells a batch of one from others."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states * (1 + 0.5 * (hidden_states.shape[0] == 1)), *args, **kwargs)


def bert(layer_class: type[BertLayer] | None = None, seed: int = 0, **options) -> BertModel:
    """A tiny sharpened BERT; of ``layer_class`` from its second layer on."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    if layer_class is not None:
        for layer in list(model.encoder.layer)[1:]:
            layer.__class__ = layer_class
    return model


def trial(model, layouts=("padded", "packed"), method=None):
    """The proof for a model, as prune() asks for it."""
    hooks = Hooks(model, method or TopK(keep=0.5), "auto")
    return probe(hooks, layouts, partial(prune, check=False), unprune)


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.kind != "audio"] + ["whisper-encoder"])
def test_every_family_of_the_matrix_passes(name):
    family = FAMILIES[name]
    proof = trial(family.build(), ("padded", "packed") if family.packed and family.kind != "vision" else ("padded",))
    assert not proof.skipped
    assert not proof.faults


def test_a_layer_that_counts_places_is_refused():
    model = bert(ByPlace)
    with pytest.raises(ValueError, match=r"removed and with hidden tokens differ by .*layout='mask' works"):
        prune(model, TopK(keep=0.5))
    assert not hasattr(model, "token_pruner")
    assert not hasattr(model.config, "token_pruning")
    prune(model, TopK(keep=0.5), layout="mask")


@pytest.mark.parametrize("layout", ["auto", "mask", "padded"])
def test_a_layer_that_mixes_tokens_beside_its_attention_is_refused(layout):
    with pytest.raises(ValueError, match=r"BertModel cannot be pruned: tokens that are hidden .* change the others"):
        prune(bert(Mixing), TopK(keep=0.5), layout=layout)


def test_a_layout_that_fails_alone_is_left_out_of_auto():
    model = bert(ByBatch)
    assert set(trial(model).faults) == {"packed"}
    with pytest.warns(UserWarning, match="layout='auto' is 'padded' for BertModel, since under 'packed' with every"):
        prune(model, TopK(keep=0.5))
    ids = torch.randint(5, 97, (3, 12))
    with torch.no_grad():
        got = model(ids).last_hidden_state
        unprune(model)
        expected = prune(model, TopK(keep=0.5), layout="mask")(ids).last_hidden_state
    assert (got - expected).abs().max() < 1e-5


def test_a_layout_that_was_asked_for_is_refused_and_another_named():
    with pytest.raises(ValueError, match=r"layout='packed' is not possible with BertModel: .*use layout='padded'"):
        prune(bert(ByBatch), TopK(keep=0.5), layout="packed")


def test_attention_that_does_not_say_whether_it_is_causal_is_served():
    config = LayoutLMModel.config_class(**SMALL)
    torch.manual_seed(0)
    model = LayoutLMModel(config).eval()
    ids = torch.randint(5, 97, (2, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
        dense = model(ids).last_hidden_state
        got = prune(model, TopK(keep=1.0))(ids).last_hidden_state
    assert (got - dense).abs().max() < 1e-5


def test_what_a_method_sees_is_compared_too(monkeypatch):
    """Scores that depend on the layout would keep other tokens, though each forward by position is right."""
    seen = View.attention_received
    monkeypatch.setattr(View, "attention_received", lambda view: seen(view) * (1 + isinstance(view.tokens, Packed)))
    faults = trial(bert()).faults
    assert set(faults) == {"packed"}
    assert "what a method sees of removed and of hidden tokens differs" in faults["packed"]


def test_a_method_that_needs_no_attention_is_not_refused_for_it(monkeypatch):
    """``needs_attention`` of the method decides what the trial looks at."""
    model = bert()
    looks, received = [], View.attention_received
    monkeypatch.setattr(View, "attention_received", lambda view: looks.append(1) or received(view))
    assert not trial(model, method=FirstK(keep=0.5)).faults
    assert not looks
    assert not trial(model, method=TopK(keep=0.5)).faults
    assert looks


# --- no trace ---------------------------------------------------------------------------------------------------------
def traces(model: nn.Module) -> dict:
    """All that a trial could leave behind on a model, by name."""
    found = {"config": model.config.to_dict(), "attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        found[name] = (type(module), attributes, sorted(vars(module)), hooks)
    return found


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "vit", "whisper-encoder", "llama", "modernbert"])
def test_a_trial_leaves_no_trace(name, mode):
    family = FAMILIES[name]
    model = getattr(family.build(), mode)()
    weights, before = copy.deepcopy(model.state_dict()), traces(model)
    random = torch.get_rng_state()
    trial(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert traces(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_hooks_of_others_do_not_run():
    model, calls = bert(), []
    model.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    assert not trial(model).faults
    assert not calls
    assert len(model.encoder.layer[0]._forward_hooks) == 1


def test_a_pruned_model_is_tried_as_it_was():
    model = prune(bert(), TopK(keep=0.5))
    with pytest.warns(UserWarning, match="replaces it"):
        prune(model, LTP())
    batch = {"input_ids": torch.randint(5, 97, (2, 9))}
    with torch.no_grad():
        model(**batch)
    assert model.token_pruner.name == "ltp"


# --- the copy ---------------------------------------------------------------------------------------------------------
def test_the_copy_shares_weights_and_has_the_first_layers_alone():
    model = bert()
    hooks = Hooks(model, TopK(keep=0.5), "auto")
    small = structural_copy(hooks, cut=True)
    assert len(small.encoder.layer) == 2 and len(model.encoder.layer) == 4
    assert small.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 4
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in small.parameters())
    assert not {id(m) for m in small.modules()} & {id(m) for m in model.modules()}


def test_the_copy_reaches_the_first_layer_of_every_kind():
    model = FAMILIES["modernbert"].build()
    layers = find_architecture(model).layers
    windows = [layer.attention_type for layer in layers]
    assert set(windows[: kinds_end(layers)]) == set(windows)
    plain = bert()
    assert kinds_end(list(plain.encoder.layer)) == 2
    plain.encoder.layer[3].attention.self.is_causal = True
    assert kinds_end(list(plain.encoder.layer)) == 4


def test_a_fault_of_the_last_layer_is_found():
    model = bert()
    model.encoder.layer[3].__class__ = ByPlace
    assert "padded" in trial(model).faults


# --- what cannot be tried ---------------------------------------------------------------------------------------------
def offloaded(model: BertModel) -> BertModel:
    """``model`` with all of its weights away, as accelerate leaves one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return model


def test_weights_that_are_away_are_tried_as_random_ones():
    model = offloaded(bert())
    assert trial(model) == trial(bert())
    assert "padded" in trial(offloaded(bert(ByPlace))).faults
    assert all(parameter.is_meta for parameter in model.parameters())


def test_many_weights_that_are_away_are_not_tried_and_prune_says_so(monkeypatch):
    monkeypatch.setattr("thresher.core.probe.FILLED", 1000)
    model = offloaded(bert(hidden_size=48))
    with pytest.warns(UserWarning, match="BertModel was pruned without a trial: .*its weights are offloaded"):
        prune(model, TopK(keep=0.5))
    unprune(model)
    prune(model, TopK(keep=0.5), check=False)


def test_a_model_on_the_meta_device_is_not_tried():
    with torch.device("meta"):
        model = BertModel(BertConfig(**SMALL)).eval()
    assert "buffers" in trial(model).skipped


def test_a_model_that_takes_other_inputs_is_not_tried_and_prune_says_so():
    class Named(BertModel):
        def forward(self, input_ids, secret, **kwargs):
            return super().forward(input_ids, **kwargs)

    model = Named(BertConfig(**SMALL)).eval()
    with pytest.warns(UserWarning, match="was pruned without a trial: the dense model does not run .*secret"):
        prune(model, TopK(keep=0.5))


def test_half_precision_passes():
    for dtype in (torch.bfloat16, torch.float16):
        proof = trial(bert().to(dtype))
        assert not proof.skipped and not proof.faults


def test_a_method_that_was_refused_is_free_for_another_model():
    method = LTP()
    with pytest.raises(ValueError, match="cannot be pruned"):
        prune(bert(Mixing), method)
    model = prune(FAMILIES["bert"].build(num_hidden_layers=3), method)
    assert model.token_pruner is method and len(method.threshold) == len(method.sites)
