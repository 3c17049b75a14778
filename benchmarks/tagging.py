"""A tagger of personal data (Rampart, MiniLM-L6, 17 types): which entities of the dense model a pruned one still finds.

    python benchmarks/tagging.py measure     rows land in results/tagging, method by method
    python benchmarks/tagging.py why         what random tokens lose that leave early, late, or for some layers alone
    python benchmarks/tagging.py time        seconds, in turns; nothing else may run on the machine

Wants ``python benchmarks/weights.py rampart-dequantised`` and ``THRESHER_DATA``, with ``squad`` and ``20newsgroups``.

There are no labels: what is measured is the agreement with the dense model. Texts: "sentences", made of templates with
invented names, addresses and numbers; "letters", paragraphs of Wikipedia (SQuAD) with three such sentences among
theirs; "posts" of 20 Newsgroups with their headers and signatures, 256 word pieces at most.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time as clock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weights import RAMPART, available, pretrained

RESULTS = Path(__file__).resolve().parent / "results" / "tagging"
LONGEST, BATCH = 256, 16
COUNTS = {"sentences": 300, "letters": 80, "posts": 40}
CHOICE, FEW = 32, 8  # texts, of others than the test part's, on which layers are chosen, and budgets met
FEWER, DEPTH = (1.5, 2.0), 6  # times fewer MACs, of the layers
WHERE = (None, (2,))  # layers at which tokens leave, of which the best is taken; None: the method's own

FIRST = ["Maria", "James", "Aisha", "Wei", "Olga", "Carlos", "Priya", "Tom", "Fatima", "Noah", "Ingrid", "Kofi", "Yuki"]
FIRST += ["Liam", "Elena", "Omar", "Grace", "Pavel"]
LAST = ["Gonzalez", "Miller", "Khan", "Chen", "Petrova", "Silva", "Sharma", "Baker", "Haddad", "Weber", "Larsen"]
LAST += ["Mensah", "Tanaka", "Murphy", "Rossi", "Novak"]
STREETS = ["Maple Avenue", "Oak Street", "Elm Road", "Lincoln Boulevard", "Mill Lane", "Cedar Drive", "Park Place"]
CITIES = ["Springfield Illinois", "Portland Oregon", "Austin Texas", "Boise Idaho", "Tampa Florida", "Denver Colorado"]
CITIES += ["Madison Wisconsin", "Albany New York", "Reno Nevada", "Boston Massachusetts"]
TEMPLATES = """\
My name is {first} {last} and I live at {number} {street}, {city}, {state} {zip}.
Please send the invoice to {mail} before Friday.
You can reach {first} at {phone} after six in the evening.
{first} {last} moved from {city} to {number} {street}, Apartment {flat}, last spring.
The account {account} with routing number {routing} belongs to {first} {last}.
Her social security number is {ssn}, and her passport number is {passport}.
Hello, this is {first} {last} from {city}; call me back at {phone}.
The driver's license {license} was issued in {state} to {last}, {first}.
More about the trip is at {url}, or write to {mail}.
Ship the parcel to {first} {last}, {number} {street}, Suite {flat}, {city}, {state} {zip}.
His tax number {ssn} stands on the form that {first} signed in {city}.
Dear Ms. {last}, your order was delivered to {number} {street} on Monday.
Wire the deposit to account {account}, routing {routing}, by noon.
{first} wrote to {mail} and to {phone}, and nobody answered.
Passport {passport} of {first} {last} expires in May.
We had dinner in {city} with {first} and {first} {last}.
The meeting was moved to Thursday because the room was taken.
Nothing in this message is about anybody; the weather was fine and the train was late.""".splitlines()


def value(name: str, draw: random.Random) -> str:
    """An invented value of a place in a template."""
    digits: Callable[[int], str] = lambda n: "".join(draw.choice("0123456789") for _ in range(n))  # noqa: E731
    first, last = draw.choice(FIRST), draw.choice(LAST)
    made = {
        "first": lambda: first,
        "last": lambda: last,
        "number": lambda: str(draw.randint(1, 9999)),
        "street": lambda: draw.choice(STREETS),
        "city": lambda: draw.choice(CITIES).split()[0],
        "state": lambda: draw.choice(CITIES).split(" ", 1)[1],
        "zip": lambda: digits(5),
        "flat": lambda: f"{draw.randint(1, 30)}{draw.choice('ABC')}",
        "mail": lambda: f"{first.lower()}.{last.lower()}@{draw.choice(('example.com', 'mail.org', 'work.net'))}",
        "url": lambda: f"https://www.{last.lower()}{digits(2)}.com/{first.lower()}",
        "phone": lambda: f"({draw.randint(201, 989)}) 555-{digits(4)}",
        "ssn": lambda: f"{draw.randint(100, 665)}-{digits(2)}-{digits(4)}",
        "passport": lambda: f"{draw.choice('ABCDEF')}{digits(8)}",
        "license": lambda: f"{draw.choice('DKLMS')}{digits(7)}",
        "account": lambda: digits(10),
        "routing": lambda: "0" + digits(8),
    }
    return made[name]()


def sentence(draw: random.Random) -> str:
    """A template, filled."""
    parts = draw.choice(TEMPLATES).split("{")
    filled = (part.partition("}") for part in parts[1:])
    return parts[0] + "".join(value(name, draw) + rest for name, _, rest in filled)


def column(folder: str, part: str, name: str) -> list[str]:
    """A column of a data set."""
    import pyarrow.parquet as parquet

    file = Path(os.environ["THRESHER_DATA"]) / folder / f"{part}.parquet"
    return parquet.read_table(file, columns=[name])[name].to_pylist()


def texts(kind: str, count: int, seed: int) -> list[str]:
    """Texts of one kind; another seed draws others."""
    draw = random.Random(f"{kind} {seed}")
    if kind == "sentences":
        return [sentence(draw) for _ in range(count)]
    if kind == "posts":
        posts = [post for post in column("20newsgroups", "train" if seed else "test", "text") if len(post) > 300]
        return draw.sample(posts, count)
    paragraphs = sorted({*column("squad", "validation", "context")})
    made = []
    for paragraph in draw.sample(paragraphs[seed::2], count):
        own = paragraph.split(". ")
        for _ in range(3):
            own.insert(draw.randint(0, len(own)), sentence(draw).removesuffix("."))
        made.append(". ".join(own))
    return made


def batches(rows: list[list[int]], size: int, pad: int) -> Iterator[tuple[list[int], dict]]:
    """Numbers of texts and the inputs of their batch, in order of length."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), size):
        some = order[start : start + size]
        longest = max(len(rows[i]) for i in some)
        ids = torch.tensor([rows[i] + [pad] * (longest - len(rows[i])) for i in some])
        lengths = torch.tensor([len(rows[i]) for i in some])
        yield some, {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def found(net: Any, rows: list[list[int]], pad: int) -> tuple[list, float, float]:
    """The entities of each text, and MACs used and dense. A special token at either end has no label."""
    import torch

    from thresher.evaluation.entities import entities

    named, answers, used, dense = net.config.id2label, [None] * len(rows), 0.0, 0.0
    with torch.inference_mode():
        for some, inputs in batches(rows, BATCH, pad):
            best = net(**inputs).logits.argmax(-1).tolist()
            for i, labels in zip(some, best, strict=True):
                inner = [named[label] for label in labels[1 : len(rows[i]) - 1]]
                answers[i] = entities([None, *inner, None])  # type: ignore[call-overload]
            if (pruner := getattr(net, "token_pruner", None)) is not None:
                used, dense = used + float(pruner.record.used), dense + float(pruner.record.dense)
    return answers, used, dense


def methods() -> dict[str, Callable[..., Any]]:
    """The methods, by name: functions of a budget and of layers."""
    from thresher import ATS, VATP, Cut, Entropy, Random, ToMe, TopK

    def states(**given: Any) -> Any:
        return ToMe(metric="states", r=0.2, **given)

    def cut(target_flops: float, at: Any) -> Any:
        """All tokens pass the first layers, and leave; the labels are read off what they were then."""
        return Cut(at=(round(DEPTH * target_flops) - 1,))

    named = (Random, TopK, VATP, Entropy, ToMe, ATS)
    return {method.name: method for method in named} | {"tome-states": states, "cut": cut}


def pruned(net: Any, make: Callable[..., Any], target: float, at: Any, rows: list[list[int]], pad: int) -> Any:
    """A copy of ``net`` on a budget; None where the method refuses."""
    from thresher import prune

    def forward(inputs: dict) -> Any:
        net(**inputs)
        return net.token_pruner.record

    net = copy.deepcopy(net)
    try:
        prune(net, make(target_flops=target, at=at))
        net.token_pruner.calibrate(forward, [inputs for _, inputs in batches(rows[:FEW], BATCH, pad)])
    except ValueError as error:
        print(f"  refused: {error}", flush=True)
        return None
    return net


def score(dense: list, answers: list) -> Any:
    """Agreement over texts and types."""
    from thresher.evaluation.entities import agreement, together

    return together(one for pair in zip(dense, answers, strict=True) for one in agreement(*pair).values())


def interval(dense: list, answers: list) -> tuple[float, float]:
    """95 % of 2,000 bootstrap draws of the texts: what F1 lacks of 100."""
    import numpy as np

    parts = np.array([score([d], [a]) for d, a in zip(dense, answers, strict=True)])
    drawn = parts[np.random.default_rng(0).integers(0, len(parts), (2000, len(parts)))].sum(1)
    low, high = np.percentile(100 * (1 - 2 * drawn[:, 0] / np.maximum(1, drawn[:, 1] + drawn[:, 2])), (2.5, 97.5))
    return float(low), float(high)


def told(dense: list, answers: list) -> Iterator[tuple[str, Any]]:
    """Each type that ten entities of the dense model are of, most first, and its agreement."""
    from thresher.evaluation.entities import agreement, together

    by: dict[str, list] = {}
    for pair in zip(dense, answers, strict=True):
        for kind, own in agreement(*pair).items():
            by.setdefault(kind, []).append(own)
    sums = {kind: together(own) for kind, own in by.items()}
    yield from sorted(((kind, own) for kind, own in sums.items() if own.dense >= 10), key=lambda one: -one[1].dense)


def measure() -> None:
    """Rows of every kind of text, method and budget: F1 against the dense model's entities, over all types, then type
    by type. Layers are chosen on texts of the same kind."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row, write_rows

    tokenizer = AutoTokenizer.from_pretrained(pretrained(RAMPART))
    net, pad = AutoModelForTokenClassification.from_pretrained(pretrained(RAMPART)).eval(), tokenizer.pad_token_id
    for kind, count in COUNTS.items():
        asked, choice = (
            tokenizer(texts(kind, n, seed), truncation=True, max_length=LONGEST)["input_ids"]
            for n, seed in ((count, 0), (CHOICE, 1))
        )
        whole, before = found(net, asked, pad)[0], found(net, choice, pad)[0]
        length = sum(map(len, asked)) / len(asked)
        print(f"{kind}: {length:.0f} tokens, {sum(map(len, whole))} entities", flush=True)
        for name, make in methods().items():
            target = RESULTS / f"{kind}-{name}.json"
            if target.exists():
                continue
            rows = []
            for fewer in FEWER:
                tried = {}
                for at in WHERE:
                    own = pruned(net, make, 1 / fewer, at, choice, pad)
                    if own is not None:
                        tried[own.token_pruner.sites] = score(before, found(own, choice, pad)[0]).f1, own
                if not tried:
                    continue
                sites, (_, best) = max(tried.items(), key=lambda one: one[1][0])
                answers, used, dense = found(best, asked, pad)
                common = {"task": kind, "model": RAMPART, "method": f"{name}-untrained", "target_flops": 1 / fewer}
                common |= {"seed": 0, "runtime": "torch", "precision": "fp32", "mode": "pruned", "layout": "auto"}
                common |= {"threads": torch.get_num_threads(), "metric": "entity f1", "quality_dense": 100.0}
                common |= {"flops_ratio": dense / used, "split": "test", "selected_on": "validation"}
                common |= {"max_length": LONGEST, "tokens_mean": length, "tried": len(tried), **environment()}
                low, high = interval(whole, answers)
                say = f"layers {sites}" if len(sites) < 5 else "every layer"
                rows.append(
                    row(**common, quality=100 * score(whole, answers).f1, n_examples=count, note=say)
                    | {"interval_low": low, "interval_high": high}
                )
                print(f"{kind} {name} {fewer}x: {rows[-1]['quality']:.1f} ({say})", flush=True)
                for type_, own in told(whole, answers):
                    say = f"{type_}: {own.both} of {own.dense} found, {own.pruned - own.both} that dense has not"
                    rows.append(row(**common, quality=100 * own.f1, n_examples=own.dense, note=say))
            write_rows(target, rows)


def away(net: Any, ids: list[int], first: int, back: int, keep: float, draw: random.Random) -> list[str]:
    """The labels of a text's tokens, of which a share ``keep``, drawn at random, alone passes the layers from ``first``
    on; the others are put back, as they were, before layer ``back``, the depth: behind the last one."""
    import torch

    inner = range(1, len(ids) - 1)
    chosen = [0, *sorted(draw.sample(inner, round(keep * len(inner)))), len(ids) - 1]
    states = whole = net.bert.embeddings(input_ids=torch.tensor([ids]))
    for i, layer in enumerate([*net.bert.encoder.layer, None]):
        if i == first:
            whole, states = states, states[:, chosen]
        if i == back:
            whole[:, chosen] = states
            states = whole
        if layer is not None:
            states = layer(states)
    return [net.config.id2label[i] for i in net.classifier(states)[0].argmax(-1).tolist()]


def why() -> None:
    """Rows of F1 in sentences of random tokens that are away for so many layers as cost a third of the MACs."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from thresher.evaluation.entities import entities
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row, write_rows

    tokenizer = AutoTokenizer.from_pretrained(pretrained(RAMPART))
    net = AutoModelForTokenClassification.from_pretrained(pretrained(RAMPART)).eval()
    asked, rows = tokenizer(texts("sentences", COUNTS["sentences"], 0))["input_ids"], []
    dense = found(net, asked, tokenizer.pad_token_id)[0]
    for first, back in ((1, 6), (2, 6), (3, 6), (4, 6), (0, 5), (1, 5), (2, 5), (0, 4), (1, 4)):
        keep, draw = 1 - (DEPTH - DEPTH / FEWER[0]) / (back - first), random.Random(0)
        with torch.inference_mode():
            labels = [away(net, ids, first, back, keep, draw) for ids in asked]
        answers = [entities([None, *own[1:-1], None]) for own in labels]
        own = {"task": "sentences", "model": RAMPART, "method": f"random, away in layers {first} to {back - 1}"}
        own |= {"runtime": "torch", "precision": "fp32", "seed": 0, "metric": "entity f1", "quality_dense": 100.0}
        own |= {"quality": 100 * score(dense, answers).f1, "n_examples": len(asked), "keep": keep, "split": "test"}
        low, high = interval(dense, answers)
        own |= {"interval_low": low, "interval_high": high, "threads": torch.get_num_threads(), **environment()}
        rows.append(row(**own, mode="put back", flops_ratio=FEWER[0], note=f"{keep:.0%} of the tokens stay"))
        print(f"{own['method']}: keep {keep:.2f}, F1 {own['quality']:.1f}", flush=True)
    write_rows(RESULTS / "why.json", rows)


def time(tiny: bool) -> None:
    """Seconds of a pass over letters and over sentences, dense and pruned in turns, batches of 16 of one length;
    ``tiny``: one batch, once, and no rows."""
    import numpy as np
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row, write_rows

    tokenizer = AutoTokenizer.from_pretrained(pretrained(RAMPART))
    net, pad = AutoModelForTokenClassification.from_pretrained(pretrained(RAMPART)).eval(), tokenizer.pad_token_id
    rows, count, repeats = [], *((BATCH, 1) if tiny else (4 * BATCH, 5))
    for kind in ("sentences", "letters"):
        asked, choice = (
            tokenizer(texts(kind, n, seed), truncation=True, max_length=LONGEST)["input_ids"]
            for n, seed in ((count, 0), (CHOICE, 1))
        )
        nets = {("dense", None): net}
        for name in ("topk", "tome-states"):
            for fewer in FEWER:
                at = (2,) if name == "topk" else None
                own = pruned(net, methods()[name], 1 / fewer, at, choice, pad)
                if own is not None:
                    nets[name, fewer] = own
        calls = [inputs for _, inputs in batches(asked, BATCH, pad)]
        taken = np.empty((len(nets), 1 + repeats, len(calls)))
        with torch.inference_mode():
            for repeat in range(1 + repeats):
                for c, inputs in enumerate(calls):
                    for turn in range(len(nets)):
                        i = (turn + repeat + c) % len(nets)
                        start = clock.perf_counter()
                        [*nets.values()][i](**inputs)
                        taken[i, repeat, c] = clock.perf_counter() - start
        taken = taken[:, 1:]
        totals = np.median(taken, 1).sum(1)
        for i, ((name, fewer), one) in enumerate(nets.items()):
            own = {"task": kind, "model": RAMPART, "method": name, "target_flops": fewer and 1 / fewer}
            own |= {"runtime": "torch", "precision": "fp32", "batch_size": BATCH, "threads": torch.get_num_threads()}
            own |= {"mode": "pruned" if i else "dense-unpadded", "n_timed": len(asked), "repeats": repeats}
            own |= {"latency_ms_p50": float(1000 * np.median(taken[i])), "speedup_unpadded": totals[0] / totals[i]}
            own |= {"spread": float(np.subtract(*np.percentile(taken[i].sum(1), (75, 25))) / totals[i])}
            if i:
                _, used, dense = found(one, asked, pad)
                own |= {"flops_ratio": dense / used, "efficiency": totals[0] / totals[i] / (dense / used)}
            rows.append(row(**own, **environment()))
    if not tiny:
        write_rows(RESULTS / "time.json", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "why", "time"))
    parser.add_argument("--tiny", action="store_true", help="of time: try it, and write no rows")
    given = parser.parse_args()
    if not available(RAMPART):
        parser.error(f"{pretrained(RAMPART)} is not there: python benchmarks/weights.py {RAMPART}")
    {"measure": measure, "why": why, "time": lambda: time(given.tiny)}[given.step]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
