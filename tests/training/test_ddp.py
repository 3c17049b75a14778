"""Two processes that share a batch learn what one process learns from the whole of it, thresholds included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__)
STEPS, ROWS = 6, 8
PATHS = (SCRIPT.parents[1], SCRIPT.parents[2] / "src")


def train(folder: str, stage: str) -> None:
    """Train on ``ROWS`` rows a step, in however many processes, and leave each one's parameters in ``folder``."""
    from transformers import TrainerCallback

    from support.training import rows, trainer
    from thresher import LTP, TopK

    torch.set_num_threads(1)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(getattr(model.token_pruner, "threshold", torch.zeros(())).detach().clone())

    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    # the penalty of a budget is not linear: half a batch each has not quite the gradient of the whole
    method = LTP(weight=1.0, soft_until=1.0) if stage == "soft" else LTP(target_flops=0.5, soft_until=0.5)
    method = TopK() if stage == "fields" else method
    options = {"per_device_train_batch_size": ROWS // world, "max_steps": STEPS, "max_grad_norm": 0.0}
    if stage == "soft":
        options |= {"optim": "sgd", "learning_rate": 0.05, "pruner_lr": 1.0}
    else:  # where DDP looks for parameters without a part in the forward, it must not take the resting ones for such
        options |= {"pruner_lr": 0.05, "ddp_find_unused_parameters": True}
    made = trainer(Path(folder) / "checkpoints", method, data=rows(ROWS * STEPS), callbacks=[Watch()], **options)
    before = getattr(made.pruner, "threshold", torch.zeros(())).detach().clone()
    if stage == "fields":  # found otherwise in each process
        made.pruner.calibrate = lambda forward, batches: setattr(made.pruner, "keep", 0.5 + 0.1 * rank) or {}
    made.train()
    found = {name: p.detach() for name, p in made.model.named_parameters()}
    found |= {"keep": torch.tensor(getattr(made.pruner, "keep", 0.0))}
    torch.save({"before": before, "seen": seen, "after": found}, f"{folder}/{world}-{rank}.pt")


def embed(folder: str) -> None:
    """Train an embedder by half batches: those of two processes, or of one that adds up two of them."""
    from torch.utils.data import SequentialSampler
    from transformers import BertModel, TrainingArguments

    from support.tiny import tiny_tokenizer
    from support.training import BERT, rows
    from thresher import LTP, prune
    from thresher.data.embedder import Embedder
    from thresher.evaluation.predict import predict
    from thresher.training.embedding import EmbedTrainer
    from thresher.training.trainer import Collator

    class InOrder(EmbedTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))

    def made(seed: int) -> Embedder:
        torch.manual_seed(seed)
        config = BERT.build(0, num_hidden_layers=3, initializer_range=0.3).config
        return Embedder(BertModel._from_config(config, attn_implementation="eager"))

    net, data = made(0), rows(ROWS * STEPS).remove_columns("labels")
    data = data.add_column("teacher_sentence_embedding", predict(made(1), data).logits.tolist())
    arguments = TrainingArguments(
        f"{folder}/checkpoints",
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2 // world,
        max_steps=STEPS,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    prune(net, LTP(weight=1.0, soft_until=1.0))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = InOrder(net.eval(), arguments, Collator(tiny_tokenizer()), data, pruner_lr=0.05)
    trainer.train()
    found = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save({"before": before, "after": found}, f"{folder}/{world}-{rank}.pt")


def launch(folder: Path, stage: str, processes: int) -> list[dict]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(folder), stage]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=560)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


def assert_close(found: dict, expected: dict, within: float) -> None:
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, atol=within, rtol=within, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_soft_training_is_that_of_one_process(tmp_path):
    (one,), both = launch(tmp_path, "soft", 1), launch(tmp_path, "soft", 2)
    for name in ("before", "after"):
        values = [run[name] if isinstance(run[name], dict) else {name: run[name]} for run in (*both, one)]
        assert_close(values[1], values[0], 0)
        assert_close(values[0], values[2], 1e-4)
    assert ((one["after"]["token_pruner.threshold"] - one["before"]).abs() > 1e-2).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_agree_through_both_stages(tmp_path):
    """Thresholds that rest in the hard stage do not stall the reduction, and both ranks calibrate alike."""
    first, second = launch(tmp_path, "both", 2)
    assert_close(first["after"], second["after"], 0)
    assert all(torch.equal(*pair) for pair in zip(first["seen"], second["seen"], strict=True))
    assert len(first["seen"]) == STEPS and ((first["seen"][1] - first["before"]).abs() > 1e-3).all()
    assert all((one - first["seen"][2]).std() < 1e-6 for one in first["seen"][2:]), "one shift for all"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_agree_on_fields(tmp_path):
    first, second = launch(tmp_path, "fields", 2)
    assert first["after"]["keep"] == second["after"]["keep"] == 0.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_embedder_learns_what_it_learns_in_one_process(tmp_path):
    """Each half batch compares its texts among themselves, whoever reads it."""
    (one,), (first, second) = launch(tmp_path, "embed", 1), launch(tmp_path, "embed", 2)
    assert_close(first["before"], one["before"], 0)
    assert_close(second["after"], first["after"], 0)
    assert_close(first["after"], one["after"], 1e-6)
    moved = {name for name, value in one["before"].items() if (one["after"][name] - value).abs().max() > 1e-5}
    assert any("threshold" in name for name in moved) and any("layer.0" in name for name in moved)


if __name__ == "__main__":
    embed(sys.argv[1]) if sys.argv[2] == "embed" else train(*sys.argv[1:])
