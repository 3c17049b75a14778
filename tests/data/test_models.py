"""Models are trained in fp32, whatever their checkpoint lies in, and loaded for evaluation as they lie there."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from thresher import TopK
from thresher.data.models import for_task, load
from thresher.data.task import Task

TASK = Task(None, None, None, ("text",), "label", ["a", "b"], "classification", "accuracy", "own", "nothing", {})


def saved(folder, dtype, method=None):
    tiny_model(method).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def largest_step(model, folder) -> float:
    """The largest change of any weight in four steps of AdamW."""
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 40, (8,), generator=draw), "labels": torch.tensor(i % 2)} for i in range(16)]
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    settings = {"max_steps": 4, "learning_rate": 5e-5, "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = TrainingArguments(folder, **settings, report_to=[], save_strategy="no", disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
    return max(float((weight.detach() - before[name]).abs().max()) for name, weight in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_trained_in_fp32(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"is saved in {name}: it is trained in float32$"):
        model = for_task(saved(tmp_path / "half", dtype), TASK)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.dtype == model.config.dtype == torch.float32
    # AdamW moves a weight by the learning rate at most; in fp16 its epsilon is 0, and weights jump
    assert 0 < largest_step(model, str(tmp_path / "out")) <= 4 * 5e-5 * 1.01
    model.save_pretrained(tmp_path / "trained")
    tiny_tokenizer().save_pretrained(tmp_path / "trained")
    assert load(str(tmp_path / "trained"))[0].dtype == torch.float32


@pytest.mark.parametrize("method", [None, TopK(keep=0.5)])
def test_a_half_precision_checkpoint_is_loaded_as_it_lies_and_told(tmp_path, method):
    folder = saved(tmp_path / "half", torch.bfloat16, method)
    with pytest.warns(UserWarning, match="half is saved in bfloat16 and runs in it: its answers are not those of fl"):
        model, _ = load(folder)
    assert model.dtype == torch.bfloat16 and hasattr(model, "token_pruner") == (method is not None)


def test_nothing_is_told_of_fp32(tmp_path):
    folder = str(save_tiny(tmp_path / "whole"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder)[0].dtype == for_task(folder, TASK).dtype == torch.float32


def test_a_model_without_a_head_gets_no_random_one(tmp_path):
    folder = save_tiny(tmp_path / "whole")
    load(str(folder))[0].base_model.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder is BertModel, whose head would be random: expected a model that"):
        load(str(tmp_path / "encoder"))
