"""The private names of other libraries are still there, and still mean what core/compat.py takes them for."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from support.families import FAMILIES
from thresher.core import compat


class Ours(compat.TrainerNames, Trainer):
    best = True

    def extra_columns(self):
        return {"teacher_logits"}

    def may_be_best(self):
        return self.best


@pytest.fixture
def trainer(tmp_path):
    data = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [0], "teacher_logits": [[0.0]], "text": ["a"]})
    options = {"metric_for_best_model": "loss", "greater_is_better": False, "use_cpu": True, "report_to": []}
    return Ours(FAMILIES["bert"].build(), TrainingArguments(str(tmp_path), **options), train_dataset=data)


def test_signature_columns(trainer):
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "teacher_logits"} <= {*trainer._signature_columns}


def test_remove_unused_columns(trainer):
    assert {*trainer.used_columns(trainer.train_dataset).column_names} == {"input_ids", "labels", "teacher_logits"}


def test_determine_best_metric(trainer):
    trainer.best = False
    assert not trainer._determine_best_metric({"eval_loss": 0.1}, None) and trainer.state.best_metric is None
    trainer.best = True
    assert trainer._determine_best_metric({"eval_loss": 0.5}, None) and trainer.state.best_metric == 0.5


def test_loss_is_scaled_for_ga_or_model_accepts_loss_kwargs(trainer):
    """One of the two decides whether the loss of an accumulated batch is divided."""
    source = inspect.getsource(Trainer.training_step)
    assert "loss_is_scaled_for_ga" in source or "model_accepts_loss_kwargs" in source
    assert trainer.model_accepts_loss_kwargs is False and trainer.loss_is_scaled_for_ga is False


def test_trainer_state_name():
    assert compat.TRAINER_STATE == TRAINER_STATE_NAME


def test_hf_hook():
    model = cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device="cpu")
    assert isinstance(model[0]._hf_hook, AlignDevicesHook) or hasattr(model[0]._hf_hook, "hooks")
    assert model[0].weight.is_meta and str(compat.execution_device(model)) == "cpu"
    compat.load_offloaded(model)
    assert not model[0].weight.is_meta and model[0].weight.abs().sum() > 0
    assert compat.execution_device(nn.Linear(2, 2)) == torch.device("cpu")


def test_int_mm():
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-9, 9, (32, 32), generator=draw, dtype=torch.int8) for _ in range(2))
    product = compat.int8_product(x, weight.t())
    assert product.dtype == torch.int32 and torch.equal(product, (x.long() @ weight.long().t()).int())


def test_is_amx_tile_supported():
    """The name is there, and says what the kernel says of the processor."""
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert not compat.has_amx() or not flags or "amx_tile" in flags


@pytest.mark.parametrize(("format", "int8"), [("onnx", False), ("onnx", True), ("openvino", False), ("openvino", True)])
def test_exporters(format, int8):
    """Their names, and that batch and length of their graphs are open."""
    exporter, config = compat.graph_exporter(format, int8, [{}])
    assert callable(exporter.export) and config.dynamic is True and (config.quantizer is not None) == int8


@pytest.mark.filterwarnings("ignore")  # of the libraries below, of one another
def test_exported_model_names_its_inputs(tmp_path):
    model, inputs = FAMILIES["bert"].build(), {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    exporter, config = compat.graph_exporter("onnx", False)
    exporter.export(model, inputs, config=config).save_pretrained(tmp_path)
    exported, names = compat.open_exported(str(tmp_path))
    assert names == ("input_ids",) and exported.config.num_labels == model.config.num_labels
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs)["logits"], model(**inputs).logits, atol=1e-4, rtol=0)
