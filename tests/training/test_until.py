"""Training until it is trained: when it ends, how the rate falls, and that a resumed one ends alike."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from support.training import rows, trainer
from thresher import LTP, TopK
from thresher.training.until import UntilTrained

LOOKS = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant"}
LOOKS |= {"eval_dataset": rows(16, seed=1), "max_steps": 40}


class Rates(TrainerCallback):
    """The rate of every step; and it may stop the training, as a lost machine does."""

    def __init__(self, stop: int | None = None):
        self.rates, self.stop = [], stop

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.stop


def run(folder, until, losses=None, stop=None, resume=None, method=None, **options):
    """A training whose loss on held-out rows is what ``losses`` say, look by look."""
    watch = Rates(stop)
    made = trainer(folder, method or TopK(keep=0.5, at=(1,)), **LOOKS | options)
    looked = list(losses or [])

    class Said(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if looked:
                metrics["eval_loss"] = looked[min(state.global_step // 2, len(looked)) - 1]

    for callback in (Said(), until, watch):
        made.add_callback(callback)
    made.train(resume_from_checkpoint=resume)
    return made, watch.rates


def test_it_ends_where_the_loss_no_longer_falls(tmp_path):
    losses = [1.0, 0.9, 0.8, 0.8, 0.81, 0.79, 0.1]  # looks at 2, 4, ...; two that bring nothing end at step 10
    made, rates = run(tmp_path, UntilTrained(patience=2, cooldown=0.4), losses)
    assert made.state.global_step == 14 == made.state.max_steps, "and 0.4 times as many with a falling rate"
    assert rates[:10] == [1e-3] * 10
    assert rates[10:] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert made.pruner.progress == 1


def test_a_little_lower_is_not_lower(tmp_path):
    losses = [1.0, 0.999, 0.998, 0.5]
    made, _ = run(tmp_path, UntilTrained(patience=2, cooldown=0.5, least=0.01), losses)
    assert made.state.global_step == 9


def test_the_ceiling_has_a_falling_rate_too(tmp_path):
    losses = [1 / n for n in range(1, 30)]
    made, rates = run(tmp_path, UntilTrained(cooldown=0.25), losses, max_steps=20)
    assert made.state.global_step == 20
    assert rates[:16] == [1e-3] * 16 and rates[16:] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_looks_before_the_hard_stage_do_not_count(tmp_path):
    losses = [0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.2, 0.2]
    method = LTP(target_flops=0.7, soft_until=0.25)
    made, _ = run(tmp_path, UntilTrained(patience=2, cooldown=0.25, after=10), losses, method=method)
    assert made.state.global_step == 20, "best at step 12, nothing lower at 14 and 16"
    assert made.pruner.phase(made.pruner.progress) == "hard"


@pytest.mark.parametrize("stop", [6, 12], ids=["at the constant rate", "while it falls"])
def test_a_resumed_training_ends_alike(tmp_path, stop):
    losses = [1.0, 0.9, 0.8, 0.8, 0.81, 0.79, 0.1]
    whole, rates = run(tmp_path / "a", UntilTrained(cooldown=0.4), losses)
    saves = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path / "b", UntilTrained(cooldown=0.4), losses, stop=stop, **saves)
    resume = str(tmp_path / "b" / f"checkpoint-{stop}")
    again, rest = run(tmp_path / "b", UntilTrained(cooldown=0.4), losses, resume=resume, **saves)
    assert again.state.global_step == whole.state.global_step == 14 and rest == pytest.approx(rates[stop:])


@pytest.mark.parametrize("steps, expected", [(None, [0, 0.1, 0.2]), (4, [0, 0.125, 0.25])])
def test_a_soft_stage_has_so_many_steps(tmp_path, steps, expected):
    made = trainer(tmp_path, LTP(target_flops=0.7, soft_until=0.5), max_steps=10)
    made.soft_steps = steps
    found = []

    class Progress(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            found.append(made.pruner.progress)

    made.add_callback(Progress())
    made.train()
    assert found[:3] == pytest.approx(expected) and made.pruner.progress == 1
    assert torch.isfinite(torch.tensor(found)).all() and found == sorted(found)
    if steps:
        assert found[4] == 0.5, "the hard stage begins with the fifth step"
