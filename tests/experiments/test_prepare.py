"""An encoder is made ready for pruning on texts without labels: it comes nearer to its dense states."""

from __future__ import annotations

import json
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, TrainingArguments
from typer.testing import CliRunner

from support.families import FAMILIES
from support.tiny import save_tiny, tiny_tokenizer
from support.toy import FILLERS
from support.training import build
from thresher import TopK, prune
from thresher.cli import app as cli
from thresher.core.architecture import find_architecture
from thresher.data.embedder import Embedder, Pooling, is_embedder, load_embedder
from thresher.data.task import DataError
from thresher.experiments import prepare as jobs
from thresher.experiments import stages
from thresher.experiments.spec import SUMMARY, PrepareSpec
from thresher.search.schedules import Space
from thresher.training.preparing import Minutes, Preparing
from thresher.training.trainer import Collator

SHORT = {"steps": 30, "lr": 2e-3, "batch_size": 16, "max_length": 32, "bf16": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Texts, one a line, and a plain encoder and an embedder, of which every token matters."""
    folder, draw = tmp_path_factory.mktemp("prepare"), random.Random(0)
    lines = {" ".join(draw.choices(FILLERS, k=draw.randint(6, 20))) for _ in range(200)}
    (folder / "texts.txt").write_text("\n".join(sorted(lines)) + "\n\n")
    config = FAMILIES["bert"].build(0, num_hidden_layers=3, initializer_range=0.3).config
    torch.manual_seed(0)
    net = BertModel(config)
    net.save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    Embedder(net, Pooling()).save_pretrained(folder / "embedder", tiny_tokenizer())
    return SimpleNamespace(data=str(folder / "texts.txt"), folder=folder, lines=len(lines))


@pytest.fixture(scope="module", params=["plain", "embedder"])
def prepared(request, made, tmp_path_factory) -> SimpleNamespace:
    out, model = tmp_path_factory.mktemp(request.param) / "out", str(made.folder / request.param)
    rows = jobs.prepare(model, made.data, out, **SHORT | {"steps": 200})
    return SimpleNamespace(kind=request.param, model=model, out=out, rows=rows)


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


def test_the_states_of_a_pruned_encoder_come_nearer(prepared):
    stage = json.loads((prepared.out / "stage.json").read_text())
    before, after = stage["before"], stage["after"]
    assert after["states"] > before["states"] + 0.1 * (1 - before["states"])
    assert after["vector"] > before["vector"] and before["vector_dense"] == pytest.approx(1, abs=1e-5)
    assert after["vector_dense"] > after["vector"], "with all tokens it is nearly what it was"
    losses = [line["loss"] for line in stage["history"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]) and stage["steps"] == 200
    first, last = prepared.rows
    assert (first["quality"], last["quality"]) == pytest.approx((100 * before["vector"], 100 * after["vector"]))
    assert (first["trained_steps"], last["trained_steps"]) == (0, 200) and last["metric"] == "cosine"
    assert first["flops_ratio"] == pytest.approx(2, rel=0.15)


def test_the_result_is_an_encoder_like_any_other(prepared, made):
    assert {path.name for path in prepared.out.iterdir()} >= {"config.json", "model.safetensors", "stage.json", SUMMARY}
    assert [path.name for path in prepared.out.parent.iterdir()] == ["out"]
    assert "token_pruning" not in json.loads((prepared.out / "config.json").read_text())
    net, tokenizer = AutoModel.from_pretrained(prepared.out), AutoTokenizer.from_pretrained(prepared.out)
    old = weights(prepared.model)
    assert old.keys() == net.state_dict().keys() and is_embedder(str(prepared.out)) == (prepared.kind == "embedder")
    changed = [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, old[name])]
    assert changed and not any("embeddings" in name for name in changed)
    prune(net, TopK(keep=0.5))
    net(**tokenizer(["the farmer and the grain and the script"], return_tensors="pt"))
    assert net.token_pruner.record.flops_fraction() < 0.8


def test_what_is_reported_is_what_the_folder_does(prepared, made):
    teacher, student = (load_embedder(str(folder), pooling="cls")[0] for folder in (prepared.model, prepared.out))
    spec = PrepareSpec(model=prepared.model, data=made.data, out=prepared.out, **SHORT).completed()
    texts = jobs.read_texts(spec)
    schedule = jobs.space_of(student, texts).falling(jobs.WIDTH, jobs.JUDGED)
    said = jobs.nearness(student, teacher, texts.held_out, lambda: TopK(**schedule))
    stage = json.loads((prepared.out / "stage.json").read_text())
    assert said == pytest.approx(stage["after"], abs=1e-5)


def test_the_same_call_returns_at_once_and_another_is_refused(prepared, made, monkeypatch):
    monkeypatch.setattr(jobs, "run_trainer", lambda *_: pytest.fail("trained again"))
    options = SHORT | {"steps": 200}
    assert jobs.prepare(prepared.model, made.data, prepared.out, **options) == prepared.rows
    with pytest.raises(ValueError, match=r"another recipe \(lr: 0.002 there, 0.001 asked\)"):
        jobs.prepare(prepared.model, made.data, prepared.out, **options | {"lr": 1e-3})


def test_an_interrupted_preparation_goes_on(made, tmp_path, monkeypatch, capsys):
    steps, once = [], stages.Trainer.training_step

    def training_step(self, *arguments, **options):
        steps.append(self)
        if len(steps) == 13:
            signal.raise_signal(signal.SIGINT)
        return once(self, *arguments, **options)

    model = str(made.folder / "plain")
    jobs.prepare(model, made.data, tmp_path / "whole", **SHORT)
    monkeypatch.setattr(stages.Trainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        jobs.prepare(model, made.data, tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists() and len(steps) == 13
    told = []
    jobs.prepare(model, made.data, tmp_path / "out", **SHORT, progress=lambda *what: told.append(what))
    assert len(steps) == 30 and told[0] == ("preparing", 14, 30) and told[-1] == ("preparing", 30, 30)
    assert "resumed: prepare training goes on after step 13" in capsys.readouterr().out
    again = weights(tmp_path / "out")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0, msg=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_minutes_end_it(made, tmp_path):
    rows = jobs.prepare(
        str(made.folder / "plain"), made.data, tmp_path / "out", **SHORT | {"steps": None, "minutes": 0.03}
    )
    stage = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert 1 <= rows[1]["trained_steps"] == stage["steps"] < 5000


def test_the_rate_falls_with_the_time_and_what_was_spent_is_remembered(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("thresher.training.preparing.time.monotonic", lambda: now[0])
    limit, group = Minutes(2.0), {"lr": 1.0}
    state, control = SimpleNamespace(global_step=0, stateful_callbacks={}), SimpleNamespace(should_training_stop=False)
    limit.on_train_begin(None, state, control)
    now[0] += 30
    limit.on_step_begin(None, state, control, optimizer=SimpleNamespace(param_groups=[group]))
    assert group["lr"] == pytest.approx(0.75)
    limit.on_step_end(None, state, control)
    assert not control.should_training_stop
    kept = json.loads(json.dumps(limit.state()))
    other, state = Minutes(2.0), SimpleNamespace(global_step=3, stateful_callbacks={"Minutes": kept})
    now[0] += 1000  # between the two
    other.on_train_begin(None, state, control)
    assert other.share == pytest.approx(0.25)
    now[0] += 90
    other.on_step_end(None, state, control)
    assert control.should_training_stop


def test_schedules_are_of_every_shape_and_drawn_for_each_batch(tmp_path):
    net, teacher = (Embedder(build(seed).bert).eval() for seed in (0, 1))
    method = jobs.drawn(Space(find_architecture(net.model), torch.tensor([24, 18, 10, 21])))
    assert method.at == (0, 1, 2)
    whole = [schedule for schedule in method.schedules if schedule == (1.0, 1.0, 1.0)]
    assert len(whole) == pytest.approx(len(method.schedules) / jobs.WHOLE, abs=1)
    assert any(1 in schedule and isinstance(schedule[schedule.index(1)], int) for schedule in method.schedules)
    seen = []
    prune(net, method)
    draw = method.draw
    method.draw = lambda: draw() or seen.append(method.keep)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Preparing(net, arguments, Collator(tiny_tokenizer()), teacher=teacher)
    batch = FAMILIES["bert"].batch((24, 18, 10))
    torch.manual_seed(0)
    losses = [trainer.compute_loss(net.train(), batch).item() for _ in range(40)]
    assert len({*seen}) > 5 and {*seen} <= {*method.schedules}
    by = dict(zip(seen, losses, strict=True))
    assert len({round(loss, 5) for loss in by.values()}) > 3
    method.draw = lambda: None
    wider = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in batch.items()}
    assert trainer.compute_loss(net, wider).item() == pytest.approx(losses[-1], abs=1e-5)


# --- mistakes --------------------------------------------------------------------------------------------------------
def test_what_cannot_be_prepared_is_told_and_leaves_nothing_behind(made, tmp_path):
    head, cut = save_tiny(tmp_path / "head"), tmp_path / "cut"
    net = prune(AutoModel.from_pretrained(made.folder / "plain"), TopK())
    net.save_pretrained(cut)
    tiny_tokenizer().save_pretrained(cut)
    (tmp_path / "one.txt").write_text("the farmer\n")
    plain, out = made.folder / "plain", tmp_path / "out"
    for model, data, why in (
        (head, made.data, r"has learned a task \(BertForSequenceClassification\), which would be lost"),
        (cut, made.data, "is pruned already: prepare its dense model"),
        (plain, tmp_path / "one.txt", "train has one row"),
        (plain, tmp_path / "none.txt", "no file or folder here"),
    ):
        with pytest.raises((ValueError, DataError), match=why):
            jobs.prepare(str(model), str(data), out, **SHORT)
    with pytest.raises(ValueError, match=r"steps=None, minutes=0: expected numbers above 0"):
        jobs.prepare(str(plain), made.data, out, **SHORT | {"steps": None, "minutes": 0})
    assert not out.exists() and not (tmp_path / ".out.training").exists()
    assert PrepareSpec(model="m", data=made.data, out=out).completed().steps == 2000


def test_the_command_prepares(made, tmp_path):
    words = ["prepare", made.folder / "plain", "--data", made.data, "--out", tmp_path / "out", "--steps", 2]
    words += ["--max-length", 32, "--json", "-"]
    result = CliRunner().invoke(cli.app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["note"] for row in rows] == ["before", "prepared"]
    assert f"the encoder is in {tmp_path / 'out'}" in result.stderr and "after 2 steps" in result.stderr
    shutil.rmtree(tmp_path / "out")


def test_a_decoder_is_refused(tmp_path):
    FAMILIES["gpt2"].build().base_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a decoder, whose first token sees no other"):
        jobs.encoder_of(str(tmp_path))
