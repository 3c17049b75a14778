"""Methods that learn what to keep from the task: TR-BERT's policies, and a training of AdapLeR's predictors as well."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification as Auto

from support.families import FAMILIES, difference
from support.soft import batch, learning, loss_of
from support.toy import FILLERS, OPTIONS, make_toy
from support.training import losses, rows, trainer
from thresher import TRBERT, AdapLeR, prune
from thresher.data.models import load
from thresher.experiments import train as jobs
from thresher.methods.parts.saliency import saliency

BERT = FAMILIES["bert"]
TOLD = ("wheat", "chaff")
NEW = {"trbert": TRBERT, "adapler": AdapLeR}


# --- REINFORCE -------------------------------------------------------------------------------------------------------
def run_by_hand(model, method, inputs: dict):
    """One run, in plain loops: of each row the task loss, the MACs, the dense MACs, and the choices that were free,
    as (site, chosen - chance, states of the policy's hidden layer)."""
    with torch.no_grad():
        logits = model(**inputs).logits
    record, found = method.record, []
    for row, label in enumerate(inputs["labels"].tolist()):
        free = []
        for view in record.sites:
            score = view.score[row].tolist()
            live = view.alive[row].nonzero()[:, 0].tolist()
            rising = sorted(live, key=lambda slot: (view.protected[row, slot].item(), score[slot]))
            for slot in rising[: -method.min_keep]:
                more = view.keep[row, slot].item() - 1 / (1 + math.exp(-score[slot]))
                free.append((view.number, more, view.inner[row, slot]))
        pairs = list(zip(record.costs, record.counts, strict=True))
        used = sum(c.macs(n.n_attention[row].item(), n.n_ffn[row].item(), n.scored, n.predictor) for c, n in pairs)
        words = inputs["attention_mask"][row].sum().item()
        found.append(
            (-logits[row].log_softmax(-1)[label].item(), used, sum(c.macs(words, words) for c, _ in pairs), free)
        )
    return found


@pytest.fixture
def shown(monkeypatch):
    """Views also hold what the hidden layer of their policy said."""
    score = TRBERT.score

    def kept(method, view):
        view._shown.inner = F.gelu(method.policies[view.site][0](view.hidden.detach())).detach()
        return score(method, view)

    monkeypatch.setattr(TRBERT, "score", kept)


@pytest.mark.parametrize("target", [None, 0.4])
def test_the_gradient_is_reinforce_in_plain_loops(target, shown):
    weight, runs, inputs = (0.7, 3, batch()) if target is None else (None, 3, batch())
    options = {"target_flops": target, "weight": weight, "rollouts": runs, "guided": 0.0, "soft_until": 0.5}
    model, method = learning(TRBERT(start=0.3, min_keep=2, **options), progress=0.2)
    model(**inputs)
    torch.manual_seed(5)
    method.loss(lambda: model(**inputs), inputs, method.record).backward()
    torch.manual_seed(5)
    drawn = [run_by_hand(model, method, inputs) for _ in range(runs)]
    left = sum(row[1] for run in drawn for row in run) / sum(row[2] for run in drawn for row in run)
    alpha = weight if target is None else 20 * (left - (1 - 0.6 * 0.2 / 0.25))
    reward = [[-task - alpha * used / dense for task, used, dense, _ in run] for run in drawn]
    expected = {name: torch.zeros_like(p) for name, p in method.policies.named_parameters()}
    for run, rewards in zip(drawn, reward, strict=True):
        for row, (_, _, _, free) in enumerate(run):
            advantage = (rewards[row] - sum(r[row] for r in reward) / runs) / (runs * len(run))
            for site, more, inner in free:
                expected[f"{site}.2.bias"] -= advantage * more
                expected[f"{site}.2.weight"] -= advantage * more * inner
    for name in ("0.2.bias", "0.2.weight", "1.2.bias", "1.2.weight"):
        found = dict(method.policies.named_parameters())[name].grad
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-3)
        assert found.abs().max() > 1e-4
    assert method.metrics()["reward"] == pytest.approx(sum(map(sum, reward)) / (runs * 3), abs=1e-5)
    assert method.metrics()["alpha"] == pytest.approx(alpha, abs=1e-5)


def test_choices_are_drawn_in_the_sampled_stage_alone():
    model, method = learning(TRBERT(start=0.0))

    def kept():
        model(**batch((24, 18, 10)))
        return method.record.sites[0].keep

    assert not torch.equal(kept(), kept())
    method.progress = 1.0
    assert torch.equal(kept(), kept())
    method.progress, _ = 0.1, model.eval()
    assert torch.equal(kept(), method.record.sites[0].score >= 0) or method.min_keep > 1
    assert torch.equal(kept(), kept())


def test_a_token_stays_as_often_as_the_policy_says():
    model, method = learning(TRBERT(start=0.8, at=(0,), min_keep=1))
    with torch.no_grad():
        often = torch.stack([model(**batch((24, 24, 24))) and method.record.sites[0].keep for _ in range(300)])
    (view,) = method.record.sites
    assert often[..., 0].all(), "the first token never leaves"
    free = ~view.protected & (view.score < view.score.max(1, keepdim=True).values)
    assert (often.float().mean(0) - view.score.sigmoid())[free].abs().max() < 0.12


@pytest.mark.parametrize("name", NEW)
def test_gradients_reach_the_policy_and_nothing_else(name):
    model, method = learning(NEW[name](target_flops=0.5))
    inputs = batch()
    loss = loss_of(model, method, inputs)
    if name == "adapler":  # its budget is an expectation over gates, which the model's states decide as well
        model.zero_grad()
        loss = torch.stack(
            list(map(method.apart, method.record.sites, saliency(method, lambda: model(**inputs))))
        ).mean()
    loss.backward()
    learned = method.policies if name == "trbert" else method.predictors[:-1]  # nothing is salient after the last layer
    assert all(p.grad.abs().sum() > 0 for part in learned for p in part.parameters())
    others = [p for n, p in model.named_parameters() if not n.startswith("token_pruner") and p.grad is not None]
    assert not any(p.grad.any() for p in others)


@pytest.mark.parametrize("name", NEW)
def test_what_runs_meanwhile_leaves_the_record_and_the_method_as_they_were(name):
    model, method = learning(NEW[name](target_flops=0.5))
    inputs = batch()
    model(**inputs)
    record = method.record
    method.loss(lambda: model(**inputs), inputs, record)
    assert method.record is record
    assert not {"gates", "phase"} & set(vars(method)) and getattr(method, "guide", None) is None


def test_the_price_of_macs_rises_until_the_budget_is_met():
    method = TRBERT(target_flops=0.4, soft_until=0.5)
    method.progress = 0.5
    assert method.slope(0.9) > method.slope(0.5) > 0 > method.slope(0.3) and abs(method.slope(0.4)) < 1e-9
    method.progress = 0.0
    assert method.slope(1.0) == 0, "nothing is asked for at the start"
    assert TRBERT(weight=3.0).slope(0.9) == TRBERT(weight=3.0).slope(0.1) == 3.0, "without a target the paper's"


def test_the_guide_is_followed_and_imitated(monkeypatch):
    """By as many of the most salient tokens as the policy expects to stay; the likelihood of that choice rises."""
    model, method = learning(TRBERT(start=0.0, rollouts=2, min_keep=1, weight=0.0), progress=0.1)
    inputs, followed, run = batch((20, 16, 18)), [], TRBERT._run

    def watched(method, forward, inputs):
        result = run(method, forward, inputs)
        if method.guide is not None:
            followed.append(([g.clone() for g in method.guide], method.record.sites))
        return result

    monkeypatch.setattr(TRBERT, "_run", watched)
    optimizer, likely = torch.optim.Adam(method.parameters(), 1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, method, inputs).backward()
        optimizer.step()
        likely.append(torch.stack([method.likelihood(view, mean=True) for view in followed[-1][1]]).mean().item())
    assert len(followed) == 40, "once in each step"
    first = followed[0][1][0]
    for row, length in enumerate((20, 16, 18)):
        count = round(first.score[row, :length].sigmoid().sum().item())
        salient = followed[0][0][0][row, :length].clone()
        salient[0] = math.inf
        best = {*salient.topk(count).indices.tolist(), first.score[row, :length].argmax().item()}
        assert set(first.keep[row].nonzero()[:, 0].tolist()) in (best, best - {first.score[row].argmax().item()})
    assert likely[0] < -0.6 and likely[-1] > likely[0] + 0.2
    method.progress = 0.3
    loss_of(model, method, inputs)
    assert len(followed) == 40, "in the guided share alone"


@pytest.mark.parametrize("name", NEW)
def test_a_checkpointed_layer_repeats_what_was_drawn(name):
    """The same choices, the same losses and the same gradients as without."""
    found = []
    for how in (None, {"use_reentrant": False}):
        model, method = learning(NEW[name](target_flops=0.5, **({"start": 0.0} if name == "trbert" else {"init": 0.9})))
        if how:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        torch.manual_seed(3)
        inputs = batch((12, 9, 12))
        task = model(**inputs).loss
        counts = [count.n_ffn.tolist() for count in method.record.counts]
        loss = task + method.loss(lambda model=model, inputs=inputs: model(**inputs), inputs, method.record)
        loss.backward()
        found.append((counts, loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (counts, loss, expected), (again, other, gradients) = found
    assert counts == again if name == "trbert" else counts[0] == pytest.approx(again[0])
    assert other == pytest.approx(loss, abs=1e-5) and gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


# --- what cannot be --------------------------------------------------------------------------------------------------
def test_what_cannot_be_learned_from_is_said():
    inputs = batch()
    bare = {k: v for k, v in inputs.items() if k != "labels"}
    for method in (TRBERT(), AdapLeR()):
        model, method = learning(method)
        with pytest.raises(ValueError, match="give labels with every batch"):
            loss_of(model, method, bare)
        assert not {"gates", "phase"} & set(vars(method)), "and it can go on"
    llama = FAMILIES["llama"]
    model, method = learning(TRBERT(), llama.build())
    words = llama.batch() | {"use_cache": False}
    with pytest.raises(ValueError, match=r"no loss of single texts .* of a decoder"):
        loss_of(model, method, words | {"labels": words["input_ids"]})
    model, method = learning(AdapLeR(), llama.build())
    assert loss_of(model, method, words | {"labels": words["input_ids"]}) > 0, "its gradient is that of any loss"


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        (TRBERT, {"rollouts": 1}, "rollouts=1: expected 2 at least"),
        (TRBERT, {"guided": 1.5}, r"guided=1.5: expected a share"),
        (TRBERT, {"target_flops": 1.5}, "target_flops=1.5"),
        (AdapLeR, {"sharpen": 0.5}, "sharpen=0.5: expected a number from 1 up"),
        (AdapLeR, {"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_values_that_cannot_be_are_refused(method, wrong, said):
    with pytest.raises(ValueError, match=said):
        method(**wrong)


def test_sites_and_the_macs_of_policies():
    model = prune(BERT.build(), TRBERT(start=50.0))
    with torch.no_grad():
        BERT.run(model, BERT.batch((24, 18, 10)))
    assert model.token_pruner.sites == (0, 1)
    more = [row["macs"] - row["dense_macs"] for row in model.token_pruner.report]
    assert more == [52 * (32 * 32 + 32)] * 2 + [0, 0]
    assert prune(FAMILIES["bert"].build(num_hidden_layers=12), TRBERT()).token_pruner.sites == (0, 5)
    assert prune(FAMILIES["bert"].build(num_hidden_layers=1), TRBERT()).token_pruner.sites == (0,)


# --- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NEW)
def test_a_training_that_resumes_is_the_one_that_was_not_interrupted(name, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer(tmp_path / "whole", NEW[name](target_flops=0.6, soft_until=0.7), data=rows(), **options)
    whole.train()
    again = trainer(tmp_path / "again", NEW[name](target_flops=0.6, soft_until=0.7), data=rows(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)
    for (n, expected), found in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    logged = "reward" if name == "trbert" else "saliency_kl"
    assert [logged in line for line in whole.state.log_history if "loss" in line] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", NEW)
def test_what_is_saved_comes_back(name, tmp_path):
    torch.manual_seed(0)
    model = prune(BERT.build(), NEW[name](**({"start": 0.0} if name == "trbert" else {"init": 1.0})))
    with torch.no_grad():
        for parameter in model.token_pruner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = BERT.answers(model, BERT.batch())
        model.save_pretrained(tmp_path)
        restored = prune(Auto.from_pretrained(tmp_path))
        assert difference(BERT.answers(restored, BERT.batch()), expected) == 0
    assert restored.token_pruner.report == model.token_pruner.report
    assert restored.token_pruner.to_dict() == model.token_pruner.to_dict()


@pytest.fixture(scope="module", params=NEW)
def learned(request, tmp_path_factory) -> SimpleNamespace:
    """A model that was trained to a budget on texts whose class one word says."""
    folder = tmp_path_factory.mktemp(request.param)
    toy, out = make_toy(folder), folder / "out"
    options = OPTIONS | {"prune_epochs": 6, "target_flops": 0.65, "pruner_lr": 1e-2}
    jobs.train(toy.model, toy.data, str(out), **options | {"method": request.param})
    return SimpleNamespace(out=out, name=request.param, summary=json.loads((out / jobs.SUMMARY).read_text()))


def test_the_budget_is_met_and_the_answers_are_right(learned):
    dense, pruned = learned.summary["rows"]
    assert learned.summary["reached"]["flops_fraction"] == pytest.approx(0.65, rel=0.02)
    assert 1 / pruned["flops_ratio"] == pytest.approx(0.65, rel=0.1), "on texts that chose nothing"
    assert dense["quality"] > 90 and pruned["quality"] > 90


def kept_by_word(model, tokenizer, texts: list[str]) -> dict[str, float]:
    """How often the first site keeps each word."""
    found = {word: [] for word in (*FILLERS, *TOLD)}
    for text in texts:
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for word, stays in zip(text.split(), model.token_pruner.record.sites[0].keep[0, 1:-1].tolist(), strict=True):
            found[word].append(stays)
    return {word: sum(stays) / len(stays) for word, stays in found.items()}


def texts(folder: Path, part: str) -> tuple[list[str], list[str]]:
    with open(folder / f"{part}.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [line["text"] for line in table], [line["label"] for line in table]


def test_useful_tokens_are_told_from_useless_ones(learned):
    """The words that are the class stay, of the others less than half, on texts that were not trained on."""
    kept = kept_by_word(*load(str(learned.out)), texts(learned.out.parent / "farm", "test")[0])
    fillers = sum(kept[word] for word in FILLERS) / len(FILLERS)
    assert min(kept[word] for word in TOLD) > 0.75 and fillers < 0.5


@pytest.mark.parametrize("learned", ["trbert"], indirect=True)
def test_reinforcement_alone_finds_what_counts(learned):
    """Nothing guides and no weight learns but the policy's: the reward rises, and the words that are the class stay."""
    model, tokenizer = load(str(learned.out / "dense"))
    words, labels = texts(learned.out.parent / "farm", "train")
    inputs = tokenizer(words[:32], padding=True, return_tensors="pt")
    inputs |= {"labels": torch.tensor([model.config.label2id[label] for label in labels[:32]])}
    model, method = learning(TRBERT(weight=1.0, guided=0.0, start=1.0, min_keep=1, rollouts=6), model)
    optimizer, rewards = torch.optim.Adam(method.parameters(), 1e-2), []
    torch.manual_seed(0)
    for _ in range(50):
        optimizer.zero_grad()
        method.loss(lambda: model(**inputs), inputs, None).backward()
        optimizer.step()
        rewards.append(method.metrics()["reward"])
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.1
    kept = kept_by_word(model.eval(), tokenizer, words)
    assert max(kept[word] for word in TOLD) > sum(kept[word] for word in FILLERS) / len(FILLERS) + 0.3
