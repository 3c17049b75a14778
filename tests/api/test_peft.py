"""PEFT: the method is trained, saved and loaded with the adapter, in either order of prune and get_peft_model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForSequenceClassification as Auto
from transformers import TrainingArguments

from support.families import FAMILIES, difference
from support.training import collate, rows
from thresher import LTP, TopK, Transkimmer, dense, prune, unprune
from thresher.core.pruner import pruner_of
from thresher.training.trainer import PruningTrainer

# peft 0.21.2 asks for a name that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
BERT = FAMILIES["bert"]
SAVED = {"modules_to_save": ["token_pruner"]}


@pytest.fixture
def base(tmp_path):
    BERT.build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora(**options) -> LoraConfig:
    return LoraConfig(task_type="SEQ_CLS", r=4, target_modules=options.pop("target", ["query", "value"]), **options)


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BERT.batch()).logits


def moved(model, threshold: float = 1.2):
    """With thresholds as a training leaves them."""
    with torch.no_grad():
        pruner_of(model.get_base_model()).threshold.fill_(threshold)
    return model


def soft_loss(model) -> torch.Tensor:
    method = pruner_of(model.get_base_model())
    model.train()
    method.progress = 0.1
    loss = model(**BERT.batch(), labels=torch.tensor([0, 1, 2])).loss
    return loss + method.loss(lambda **_: None, {}, method.record)


def pruned_first(base, method):
    return get_peft_model(prune(Auto.from_pretrained(base), method), lora(**SAVED))


def pruned_last(base, method):
    return prune(get_peft_model(Auto.from_pretrained(base), lora()), method)


def pruned_twice(base, method):
    tuned = get_peft_model(prune(Auto.from_pretrained(base), method), lora())
    return prune(tuned, tuned.token_pruner)


ORDERS = [pruned_first, pruned_last, pruned_twice]


@pytest.mark.parametrize("order", ORDERS)
def test_thresholds_learn_in_the_soft_stage(base, order):
    tuned = order(base, LTP(target_flops=0.5))
    soft_loss(tuned).backward()
    method = pruner_of(tuned.get_base_model())
    assert method.threshold.grad.abs().min() > 0 and any(p is method.threshold for p in tuned.parameters())
    assert tuned.token_pruner.report[0]["tokens_in"] == 52


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", [True, False], ids=["prune, then load", "load, then prune"])
def test_the_adapter_brings_the_thresholds(base, order, before, tmp_path):
    tuned = moved(order(base, LTP(target_flops=0.5)))
    expected, kept = answers(tuned), [row["tokens_kept"] for row in tuned.token_pruner.report]
    tuned.save_pretrained(tmp_path / "adapter")
    model = Auto.from_pretrained(base)
    if before:
        again = PeftModel.from_pretrained(prune(model, LTP(target_flops=0.5)), tmp_path / "adapter")
    else:
        again = PeftModel.from_pretrained(model, tmp_path / "adapter")
        again = prune(again, checkpoint=tmp_path / "adapter")
    assert torch.equal(answers(again), expected)
    assert [row["tokens_kept"] for row in again.token_pruner.report] == kept
    again.save_pretrained(tmp_path / "again")
    last = prune(Auto.from_pretrained(base), checkpoint=tmp_path / "again")
    assert last.token_pruner.threshold.tolist() == pytest.approx([1.2] * 4)


def test_thresholds_that_were_not_loaded_are_told(base, tmp_path):
    moved(pruned_last(base, LTP())).save_pretrained(tmp_path / "adapter")
    prune(Auto.from_pretrained(base), LTP()).save_pretrained(tmp_path / "pruned base")
    for folder in (base, tmp_path / "pruned base"):
        tuned = PeftModel.from_pretrained(Auto.from_pretrained(folder), tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"the adapter brings a token_pruner of its own, .* pass checkpoint="):
            prune(tuned)


@pytest.mark.parametrize("target", [["query", "value"], "all-linear"])
@pytest.mark.parametrize("method", [LTP, Transkimmer])
def test_frozen_methods_are_not_trained_past_silently(base, target, method):
    tuned = get_peft_model(prune(Auto.from_pretrained(base), method()), lora(target=target))
    with pytest.raises(RuntimeError, match=r"peft has frozen the parameters of .*modules_to_save=\['token_pruner'\]"):
        tuned.train()
    tuned.eval()


@pytest.mark.parametrize("order", [pruned_last, pruned_first])
def test_all_linear_leaves_the_methods_own_perceptrons_alone(base, order):
    config = lora(target="all-linear", **(SAVED if order is pruned_first else {}))
    model = Auto.from_pretrained(base)
    if order is pruned_first:
        tuned = get_peft_model(prune(model, Transkimmer()), config)
    else:
        tuned = prune(get_peft_model(model, config), Transkimmer())
    assert not [n for n, _ in tuned.named_modules() if "token_pruner" in n and "lora" in n]
    soft_loss(tuned).backward()
    assert all(p.grad is not None for p in pruner_of(tuned.get_base_model()).parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_set_on_the_attribute_reaches_the_method(base, order):
    tuned = order(base, TopK(keep=0.9))
    few = answers(order(base, TopK(keep=0.3)))
    before = answers(tuned)
    tuned.token_pruner.keep = 0.3
    assert torch.equal(answers(tuned), few) and not torch.equal(before, few)
    assert tuned.token_pruner.keep == pruner_of(tuned.get_base_model()).keep == 0.3


def test_unprune_and_dense_reach_the_model_inside(base, tmp_path):
    tuned = get_peft_model(Auto.from_pretrained(base), lora())
    expected = answers(tuned)
    prune(tuned, TopK(keep=0.4))
    assert (answers(tuned) - expected).abs().max() > 1e-3
    with dense(tuned):
        assert torch.equal(answers(tuned), expected)
    unprune(tuned)
    assert torch.equal(answers(tuned), expected)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(answers(PeftModel.from_pretrained(Auto.from_pretrained(base), tmp_path)), expected)
    with pytest.raises(ValueError, match="PeftModelForSequenceClassification is not pruned"):
        unprune(tuned)


@pytest.mark.parametrize("order", ORDERS)
def test_merging_keeps_the_method_at_work(base, order):
    tuned = moved(order(base, LTP()))
    expected = answers(tuned)
    merged = tuned.merge_and_unload()
    assert difference({"logits": answers(merged)}, {"logits": expected}) <= 1e-5
    assert type(merged.token_pruner) is LTP and merged.config.token_pruning["method"] == "ltp"


def test_each_adapter_has_its_own_thresholds(base):
    tuned = moved(pruned_first(base, LTP()), 0.5)
    one = answers(tuned)
    tuned.add_adapter("other", lora(**SAVED))
    tuned.set_adapter("other")
    other = answers(moved(tuned, 1.4))
    tuned.set_adapter("default")
    assert torch.equal(answers(tuned), one) and not torch.equal(one, other)


def test_virtual_tokens_are_pruned_too(base, tmp_path):
    tuned = get_peft_model(Auto.from_pretrained(base), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    expected = answers(moved(prune(tuned, LTP())))
    assert tuned.token_pruner.report[0]["tokens_in"] == 52 + 3 * 4
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(prune(Auto.from_pretrained(base), LTP()), tmp_path / "adapter")
    assert torch.equal(answers(again), expected)


def test_an_adapter_that_saves_no_module_is_refused(base):
    tuned = get_peft_model(
        Auto.from_pretrained(base), TrainableTokensConfig(token_indices=[7], target_modules=["word_embeddings"])
    )
    expected = answers(tuned)
    with pytest.raises(ValueError, match="an adapter of TrainableTokensConfig saves no module beside its own"):
        prune(tuned, LTP())
    assert torch.equal(answers(tuned), expected) and pruner_of(tuned.get_base_model()) is None


@pytest.mark.parametrize("method", [lambda: LTP(target_flops=0.6, soft_until=0.5), lambda: TopK(target_flops=0.6)])
def test_the_trainer_trains_saves_and_resumes_the_method_with_the_adapter(base, tmp_path, method):
    def trainer(folder, steps):
        tuned = prune(get_peft_model(Auto.from_pretrained(base), lora()), method())
        made = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=8, save_strategy="steps", save_steps=2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return PruningTrainer(tuned, made, collate, rows(), pruner_lr=0.05)

    whole = trainer(tmp_path / "whole", 4)
    start = [p.detach().clone() for p in whole.pruner.parameters()]
    whole.train()
    assert whole.reached["flops_fraction"] == pytest.approx(0.6, rel=0.02)
    assert all(not torch.equal(p, q) for p, q in zip(start, whole.pruner.parameters(), strict=True))
    resumed = trainer(tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.pruner.to_dict() == whole.pruner.to_dict()
    for name, parameter in whole.pruner.named_parameters():
        torch.testing.assert_close(resumed.pruner.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)
    again = PeftModel.from_pretrained(prune(Auto.from_pretrained(base), method()), tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(answers(again), answers(whole.model))


def test_a_method_that_the_adapter_would_not_save_is_not_trained(base, tmp_path):
    tuned = get_peft_model(prune(Auto.from_pretrained(base), TopK(target_flops=0.5)), lora())
    with pytest.raises(ValueError, match=r"would not be saved with the adapter: prune\(\) after get_peft_model"):
        PruningTrainer(tuned, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), collate, rows())
