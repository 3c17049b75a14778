"""A language model that learns to see in minutes: what is left of its answers when tokens of the picture leave.

    python benchmarks/visual.py train --seed 0  # 2 rounds of 1,200 steps, then 300 of lower resolutions; resumes
    python benchmarks/visual.py ask --seed 0      # a row for each method and number of tokens, as it is found; resumes
    python benchmarks/visual.py table             # of all seeds

Pictures of noise with eight times eight cells hold six objects of six different colours and four shapes, three of
which have another one at their right. Questions: the shape of the red one, its row (one hop), the shape and the colour
of what is right of it (two hops). Answers are one token. The model is a LLaVA of our own, of a tower of one layer and a
language model of six. While it trains a head on the projector names colour and shape of each cell, without which it
learns nothing in so short a time. The baseline of a lower resolution is a copy that went on to learn with pictures
shrunk to 6, 4, 3 and 2 patches in a row. Everything is made here; nothing is downloaded. Rows go to
``results/visual``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from thresher import (
    DART,
    CDPruner,
    DivPrune,
    FastV,
    Grid,
    Pool,
    PyramidDrop,
    Random,
    SparseVLM,
    TopK,
    VisionZip,
    VisPruner,
    calling,
    prune,
    unprune,
)

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE.parent / "runs" / "visual", HERE / "results"
CELLS, PATCH, COLOURS, SHAPES, PAIRS, HIDDEN, LAYERS = 8, 8, 6, 4, 3, 64, 6
KINDS = ("shape", "row", "right shape", "right colour")
ANSWERS = (SHAPES, CELLS, SHAPES, COLOURS)
PAD, BOS, IMAGE, ASK, COLOUR, ANSWER = 0, 1, 2, 3, 7, 13  # ids; kinds, colours and answers begin at the last three
OFFSETS = [ANSWER + sum(ANSWERS[:kind]) for kind in range(len(ANSWERS))]
VOCABULARY = ANSWER + sum(ANSWERS)
TOKENS = CELLS * CELLS
SIDES = {32: 6, 16: 4, 7: 3, 4: 2}  # tokens kept: patches in a row of a picture with no fewer
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.float32)


@dataclass(frozen=True)
class Run:
    """A training: a step takes ``batch`` pictures, which have one of the ``sides``, patches in a row; every kind of
    question is asked ``times`` times of each."""

    seed: int
    steps: int
    batch: int
    times: int
    sides: tuple[int, ...]
    rate: float


def shapes() -> Tensor:
    """(4, 8, 8): a cross, a square, a ring and a bar."""
    drawn = torch.zeros(SHAPES, PATCH, PATCH)
    drawn[0, 3:5, 1:7] = drawn[0, 1:7, 3:5] = 1
    drawn[1, 2:6, 2:6] = 1
    drawn[2, 1:7, 1:7] = 1
    drawn[2, 3:5, 3:5] = 0
    drawn[3, 1:7, 2:4] = 1
    return drawn


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 64, 64) and objects (count, 6, 4): row, column and shape of the object of each colour, and
    the colour of what is right of it, -1 of nothing; three have the others at their right."""
    colours = torch.rand(count, COLOURS, generator=generator).argsort(1).view(count, PAIRS, 2)
    places = torch.rand(count, CELLS * (CELLS // 2), generator=generator).argsort(1)[:, :PAIRS, None].expand(-1, -1, 2)
    column = 2 * (places % (CELLS // 2)) + torch.arange(2)
    found = torch.randint(SHAPES, (count, PAIRS, 2), generator=generator)
    right = torch.stack([colours[..., 1], torch.full((count, PAIRS), -1)], 2)
    told = torch.stack([places // (CELLS // 2), column, found, right], 3).flatten(1, 2)
    objects = torch.empty_like(told).scatter_(1, colours.flatten(1)[..., None].expand_as(told), told)
    pixels = 0.3 * torch.randn(count, 3, CELLS * PATCH, CELLS * PATCH, generator=generator)
    cells = pixels.view(count, 3, CELLS, PATCH, CELLS, PATCH).permute(0, 2, 4, 1, 3, 5)
    row, column, shape, _ = objects.unbind(2)
    cells[torch.arange(count)[:, None], row, column] += 1.5 * PALETTE[:, :, None, None] * shapes()[shape][:, :, None]
    return pixels, objects


def ask(objects: Tensor, kind: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of each scene one question: colours asked for (B,), answers (B,) as ids, and the cells (B, 64) that it needs."""
    count = len(objects)
    weights = torch.ones(count, COLOURS) if kind < 2 else (objects[..., 3] >= 0).float()
    colour = torch.multinomial(weights, 1, generator=generator)[:, 0]
    rows = torch.arange(count)
    one = objects[rows, colour]
    other = objects[rows, one[:, 3].clamp(min=0)]
    answer = (one[:, 2], one[:, 0], other[:, 2], one[:, 3])[kind] + OFFSETS[kind]
    needed = torch.zeros(count, TOKENS, dtype=torch.bool)
    needed[rows, one[:, 0] * CELLS + one[:, 1]] = True
    if kind >= 2:
        needed[rows, other[:, 0] * CELLS + other[:, 1]] = True
    return colour, answer, needed


def build(seed: int) -> LlavaForConditionalGeneration:
    """The model, untrained."""
    torch.manual_seed(seed)
    vision = {"model_type": "siglip_vision_model", "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": CELLS * PATCH, "patch_size": PATCH}
    text = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": PAD}
    options: Any = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": IMAGE}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **options))


def prompts(colours: Tensor, kinds: Tensor, answers: Tensor | None = None, side: int = CELLS) -> Tensor:
    """(B, 1 + side² + 2 or 3 times the questions): the picture, then kinds and colours (B, questions) with their
    answers."""
    parts = [ASK + kinds, COLOUR + colours] + ([] if answers is None else [answers])
    asked = torch.stack(parts, 2).flatten(1)
    start = torch.tensor([BOS] + [IMAGE] * side * side).expand(len(asked), -1)
    return torch.cat([start, asked], 1)


def seen(model: LlavaForConditionalGeneration, pixels: Tensor, side: int = CELLS) -> Any:
    """What the tower makes of pictures that are shrunk to ``side`` times ``side`` patches."""
    if side != CELLS:
        pixels = F.interpolate(pixels, size=(side * PATCH, side * PATCH), mode="bilinear", antialias=True)
    return model.get_image_features(pixels, interpolate_pos_encoding=side != CELLS)


def loss_of(model: LlavaForConditionalGeneration, head: nn.Module, generator: torch.Generator, run: Run) -> Any:
    """The loss of new pictures with questions, all of one side; and that with what ``head`` says of each cell, where
    the picture is whole."""
    batch, side = run.batch, run.sides[int(torch.randint(len(run.sides), (1,), generator=generator))]
    pixels, objects = scenes(batch, generator)
    asked = [ask(objects, kind, generator)[:2] for kind in range(len(KINDS)) for _ in range(run.times)]
    order = torch.randperm(len(asked), generator=generator)
    colours = torch.stack([asked[k][0] for k in order], 1)
    told = torch.stack([asked[k][1] for k in order], 1)
    ids = prompts(colours, (order // run.times).expand(batch, -1), told, side)
    labels = torch.full_like(ids, -100)
    labels[:, side * side + 3 :: 3] = ids[:, side * side + 3 :: 3]
    image = seen(model, pixels, side)
    states = torch.stack([*image.pooler_output])
    loss = model(input_ids=ids, mm_encoder_outputs={"image": image}, labels=labels, use_cache=False).loss
    if side != CELLS:
        return loss, loss
    cells = torch.zeros(2, batch, TOKENS, dtype=torch.long)
    place = objects[..., 0] * CELLS + objects[..., 1]
    cells[0].scatter_(1, place, torch.arange(1, COLOURS + 1).expand(batch, -1))
    cells[1].scatter_(1, place, objects[..., 2] + 1)
    colour, shape = head(states).split([COLOURS + 1, SHAPES + 1], -1)
    named = F.cross_entropy(colour.flatten(0, 1), cells[0].flatten())
    return loss, loss + 2 * (named + F.cross_entropy(shape.flatten(0, 1), cells[1].flatten()))


def train(model: LlavaForConditionalGeneration, run: Run, target: Path) -> dict:
    """Train; goes on from ``target``, which is written every fifty steps. Returns the loss of the last hundred steps
    and the seconds of the processor."""
    head = nn.Linear(HIDDEN, COLOURS + 1 + SHAPES + 1)
    generator = torch.Generator().manual_seed(run.seed)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=run.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, run.steps, pct_start=0.1)
    parts = {"model": model, "head": head, "optimizer": optimizer, "schedule": schedule}
    step, losses, seconds = 0, [], 0.0
    if target.exists():
        kept = torch.load(target, weights_only=True)
        if kept["run"] != asdict(run):
            raise SystemExit(f"{target} is of another training ({kept['run']}): delete it, or ask for the same")
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        generator.set_state(kept["generator"])
        step, losses, seconds = kept["step"], kept["losses"], kept["seconds"]
    begun = time.process_time() - seconds
    while step < run.steps:
        loss, together = loss_of(model, head, generator, run)
        optimizer.zero_grad()
        together.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses, step = [*losses[-99:], loss.item()], step + 1
        if step % 50 == 0 or step == run.steps:
            seconds = time.process_time() - begun
            kept = {name: part.state_dict() for name, part in parts.items()}
            kept |= {"run": asdict(run), "step": step, "losses": losses, "seconds": seconds}
            kept["generator"] = generator.get_state()
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, target.with_suffix(".partial"))
            os.replace(target.with_suffix(".partial"), target)
            print(f"step {step}: loss {sum(losses) / len(losses):.3f}, {seconds:.0f} s", flush=True)
    return {"loss": round(sum(losses) / len(losses), 4), "seconds": round(seconds)}


@torch.no_grad()
def answers(model: Any, data: list[dict], side: int, oracle: bool) -> tuple[Tensor, float, float]:
    """Which answers of a pruned model are right (kinds, n) bool, of pictures with ``side`` patches in a row; the MACs
    of the language model's layers, and the tokens of a picture in a layer, the mean over layers. With ``oracle`` the
    cells that a question needs stay."""
    right, used, tokens = [], 0.0, []
    for kind, part in enumerate(data):
        ids = prompts(part["colours"], torch.full_like(part["colours"], kind), side=side)
        told = {"input_ids": ids, "mm_encoder_outputs": {"image": seen(model, part["pixels"], side)}}
        with calling(model, protect=F.pad(part["needed"], (1, 2))) if oracle else nullcontext():
            logits = model(**told, use_cache=False).logits[:, -1]
        first = OFFSETS[kind]
        right.append(logits[:, first : first + ANSWERS[kind]].argmax(1) + first == part["answers"])
        record, text = model.token_pruner.record, ids.shape[1] - side * side
        used += float(record.used)
        tokens += [float((count.n_attention - text).float().mean()) for count in record.counts]
    return torch.stack(right), used, sum(tokens) / len(tokens)


def methods_of(kept: int) -> dict[str, Any]:
    """The methods that leave ``kept`` of 64 tokens to the last layer. Those "at equal MACs" act after layer 0 and leave
    as many as cost what ``kept`` tokens do that left before it, where that can be."""
    side, equal = SIDES[kept], round((LAYERS * kept - TOKENS) / (LAYERS - 1))
    inside = {"Random": Random, "TopK": TopK, "FastV": FastV, "SparseVLM": SparseVLM, "DART": DART}
    return {
        "Random": Random(keep=kept, at=(-1,)),
        "Grid": Grid(keep=kept),
        f"Pool {side}x{side}": Pool(side=side),
        "DivPrune": DivPrune(keep=kept),
        "CDPruner": CDPruner(keep=kept),
        "CDPruner without text": CDPruner(keep=kept, relevance=False),
        "VisionZip": VisionZip(keep=kept),
        "VisPruner": VisPruner(keep=kept),
        "oracle": Random(keep=kept, at=(-1,)),
        **{f"{name} after layer 1": kind(keep=kept, at=(1,)) for name, kind in inside.items()},
        "PyramidDrop": PyramidDrop(keep=(2 * kept, kept, max(1, kept // 2))),
        **{f"{n} at equal MACs": kind(keep=equal, at=(0,)) for n, kind in inside.items() if equal > 0},
    }


def plan(model: Any, lower: Any) -> Iterator[tuple[str, int, Any, Any, int]]:
    """Name, tokens kept, model, method and patches in a row of every row."""
    whole = Grid(keep=1.0)
    yield "dense", TOKENS, model, whole, CELLS
    yield "no picture", 0, model, whole, CELLS
    for kept, side in SIDES.items():
        for name, method in methods_of(kept).items():
            yield name, kept, model, method, CELLS
        yield f"lower resolution {side}x{side}", kept, lower, whole, side
        yield f"lower resolution {side}x{side}, not trained on", kept, model, whole, side


def evaluate(model: Any, lower: Any, settings: dict, target: Path) -> None:
    """Write a row for each method and number of tokens to ``target`` as it is found; those that are there stay."""
    generator, count = torch.Generator().manual_seed(10_000 + settings["seed"]), settings["pictures"]
    pixels, objects = scenes(count, generator)
    data = []
    for kind in range(len(KINDS)):
        colour, answer, needed = ask(objects, kind, generator)
        data.append({"colours": colour[:, None], "pixels": pixels, "answers": answer, "needed": needed})
    kept = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {**settings, "rows": []}
    if {k: v for k, v in kept.items() if k != "rows"} != settings:
        raise SystemExit(f"{target} has rows of other settings: delete it")
    rows = kept["rows"]
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, many, asked, method, side in plan(model, lower):
        if any((row["method"], row["kept"]) == (name, many) for row in rows):
            continue
        prune(asked, copy.deepcopy(method))
        blind = [part | {"pixels": torch.zeros_like(pixels)} for part in data]
        found = answers(asked, blind if name == "no picture" else data, side, name == "oracle")
        unprune(asked)
        rows.append(row_of(name, many, *found, rows[0]["macs"] if rows else found[1]))
        print({k: v for k, v in rows[-1].items() if k != "right"}, flush=True)
        target.with_suffix(".partial").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        os.replace(target.with_suffix(".partial"), target)


def row_of(name: str, kept: int, right: Tensor, macs: float, tokens: float, dense: float) -> dict:
    """What one method answers: accuracy in percent with its 95 % interval over pictures, and by kind of question; how
    many of the four questions of each picture; MACs of the language model's layers, and times fewer than dense."""
    together = right.float().mean(0)
    mean, half = float(together.mean()), 1.96 * float(together.std()) / len(together) ** 0.5
    return {
        "method": name,
        "kept": kept,
        "accuracy": round(100 * mean, 2),
        "interval": [round(100 * (mean - half), 2), round(100 * (mean + half), 2)],
        "by_kind": {kind: round(100 * float(x.float().mean()), 1) for kind, x in zip(KINDS, right, strict=True)},
        "macs": macs,
        "fewer": round(dense / macs, 3),
        "tokens": round(tokens, 2),
        "right": "".join(map(str, right.sum(0).tolist())),
    }


def gap(rows: list[dict], others: list[dict]) -> str:
    """Points by which ``rows`` are above ``others`` (one of each seed), with the 95 % interval over all pictures."""
    parts = [[int(digit) for row in some for digit in row["right"]] for some in (rows, others)]
    apart = 25.0 * (torch.tensor(parts[0]) - torch.tensor(parts[1])).float()
    half = 1.96 * float(apart.std()) / len(apart) ** 0.5
    return f"{float(apart.mean()):+.1f} ± {half:.1f}"


def read(folder: Path) -> dict[tuple[int, str], list[dict]]:
    """The rows of all seeds by tokens kept and method, of those that every seed has."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("seed*.json"))]
    rows: dict[tuple[int, str], list[dict]] = {}
    for row in (row for run in found for row in run["rows"]):
        rows.setdefault((row["kept"], row["method"]), []).append(row)
    return {key: some for key, some in rows.items() if len(some) == len(found)}


def average(some: list[dict], what: str) -> float:
    return sum(row[what] for row in some) / len(some)


def table(folder: Path) -> list[str]:
    """A line for each method and number of tokens."""
    rows = read(folder)
    head = ["kept of 64", "method", "accuracy of each seed", *KINDS, "tokens, mean of layers", "× fewer MACs"]
    head += ["points over Random", "over the oracle"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (kept, name), some in rows.items():
        cells = [str(kept), name, ", ".join(f"{row['accuracy']:.1f}" for row in some)]
        cells += [f"{sum(row['by_kind'][kind] for row in some) / len(some):.0f}" for kind in KINDS]
        cells += [f"{average(some, what):.1f}" for what in ("tokens", "fewer")]
        cells += [gap(some, rows[kept, to]) if (kept, to) in rows else "" for to in ("Random", "oracle")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(folder: Path) -> Iterator[str]:
    """Three tables for readers: what leaves before the language model, within it, and within it at equal MACs."""
    rows = read(folder)
    for what, end, against in (
        ("Before the language model", "", "Random"),
        ("After layer 1", " after layer 1", "Random after layer 1"),
        ("After layer 0, at the MACs of as many that leave before", " at equal MACs", "Random at equal MACs"),
    ):
        found: dict[str, dict[int, str]] = {}
        for (kept, name), some in rows.items():
            ends = " at equal MACs" if name.endswith(" at equal MACs") else " after layer 1"
            inside = name.endswith(ends) or name == "PyramidDrop"
            if kept not in SIDES or (ends if inside else "") != end:
                continue
            label = re.sub(r" \dx\d", "", name.removesuffix(end))
            apart = "" if name == against else f" ({gap(some, rows[kept, against])})"
            cell = f"{average(some, 'accuracy'):.1f}{apart}"
            found.setdefault(label, {})[kept] = cell + (f", {average(some, 'fewer'):.1f}×" if label == "Random" else "")
        kept = [many for many in SIDES if any(many in of for of in found.values())]
        if found:
            head = [what, *(f"{many} of {TOKENS}" for many in kept)]
            yield from (f"| {' | '.join(head)} |", "|" + "---|" * len(head))
            yield from (f"| {' | '.join([name, *(of.get(many, '') for many in kept)])} |" for name, of in found.items())
            yield ""


def models(seed: int, rounds: int, steps: int, lower_steps: int, batch: int) -> tuple[Any, Any, list[dict]]:
    """The model, the one that went on with lower resolutions, and how their trainings went. In each round the rate
    rises and falls anew; all but the first ask twice as much."""
    model, told = build(seed), []
    for number in range(rounds):
        run = Run(seed + 1000 * number, steps, batch, 2 if number else 1, (CELLS,), 2e-3)
        told.append(train(model, run, RUNS / f"seed{seed}{f'-{number + 1}' if number else ''}.pt"))
    lower = copy.deepcopy(model)
    run = Run(seed, lower_steps, batch, 2, tuple(SIDES.values()), 1e-3)
    told.append(train(lower, run, RUNS / f"seed{seed}-lower.pt"))
    return model.eval(), lower.eval(), told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "ask", "table"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200, help="of a round")
    parser.add_argument("--lower-steps", type=int, default=300, help="with pictures of lower resolutions, afterwards")
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step")
    parser.add_argument("--pictures", type=int, default=600, help="of the test")
    args = parser.parse_args()
    if args.step == "table":
        print("\n".join(table(RESULTS / "visual")))
        return
    torch.set_num_threads(1)
    model, lower, told = models(args.seed, args.rounds, args.steps, args.lower_steps, args.batch)
    if args.step == "ask":
        settings = {
            "seed": args.seed,
            "rounds": args.rounds,
            "steps": args.steps,
            "batch": args.batch,
            "pictures": args.pictures,
        }
        settings |= {"trained": told}
        evaluate(model, lower, settings, RESULTS / "visual" / f"seed{args.seed}.json")


if __name__ == "__main__":
    main()
