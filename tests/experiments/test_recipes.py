"""Recipes: what a name stands for, and what takes precedence over it."""

from __future__ import annotations

import json

import pytest

from support.toy import OPTIONS, make_toy
from thresher.data.models import make_method
from thresher.experiments import recipes
from thresher.experiments import train as jobs
from thresher.experiments.spec import TrainSpec


@pytest.mark.parametrize("task", recipes.TASKS)
@pytest.mark.parametrize("method", ["ltp", "top"])
def test_every_recipe_is_one_that_train_takes(method, task):
    made = TrainSpec(model="m", data="d", out="o", recipe=f"{method}-{task}").completed()
    assert made.method == make_method(made.method, made.method_options).name == method
    assert made.max_drop == 1.0 and "target_flops" not in made.method_options, "no recipe sets a budget"
    assert made.prune_epochs >= 2 and made.max_length >= 64
    assert made.dropout == (0.0 if task == "embed" else None), "vectors are learned without dropout"


@pytest.mark.parametrize("name", ["top-nothing", "nothing-mrpc", "mrpc", "top", ""])
def test_an_unknown_recipe_is_named(name):
    with pytest.raises(ValueError, match=f"there is no recipe {name!r}: expected a method .* as in top-mrpc"):
        recipes.recipe(name)


def test_what_is_given_takes_precedence(tmp_path):
    toy = make_toy(tmp_path)
    given = {k: v for k, v in OPTIONS.items() if k not in ("target_flops", "lr", "method")} | {
        "epochs": 0,
        "prune_epochs": 0,
    }

    def made(**more) -> dict:
        out = tmp_path / f"out-{'-'.join(more)}"
        jobs.train(toy.model, toy.data, str(out), recipe="top-squad", **given | more)
        return json.loads((out / jobs.SUMMARY).read_text())["recipe"]

    found = made(target_flops=0.7)
    assert (found["lr"], found["epochs"], found["batch_size"]) == (1e-4, 0, 16)
    assert found["method"] == "top" and found["method_options"] == {"bins": 64, "topk": 60, "target_flops": 0.7}
    more = made(target_flops=0.7, method_options={"topk": 9})
    assert more["method_options"] == {"bins": 64, "topk": 9, "target_flops": 0.7}
    assert made(method="topk", keep=0.5)["method_options"] == {"keep": 0.5}, "options of another method do not apply"
