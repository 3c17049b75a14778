"""A language model that learns to see in minutes: what is left of its answers when tokens of the picture leave.

    python benchmarks/visual.py --seed 0 --out benchmarks/results/visual/seed0.json

Pictures of noise with eight times eight cells hold six objects of six different colours and four shapes, three of
which have another one at their right. Questions: the shape of the red one, its row (one hop), the shape and the colour
of what is right of it (two hops). Answers are one token. The model is a LLaVA of our own, of a tower of one layer and a
language model of six. While it trains a head on the projector names colour and shape of each cell, without which it
learns nothing in so short a time. Everything is made here; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from thresher import (
    CDPruner,
    DivPrune,
    FastV,
    Grid,
    Pool,
    PyramidDrop,
    Random,
    TopK,
    VisionZip,
    calling,
    prune,
    unprune,
)

CELLS, PATCH, COLOURS, SHAPES, PAIRS, HIDDEN, LAYERS = 8, 8, 6, 4, 3, 64, 6
KINDS = ("shape", "row", "right shape", "right colour")
ANSWERS = (SHAPES, CELLS, SHAPES, COLOURS)
PAD, BOS, IMAGE, ASK, COLOUR, ANSWER = 0, 1, 2, 3, 7, 13  # ids; kinds, colours and answers begin at the last three
OFFSETS = [ANSWER + sum(ANSWERS[:kind]) for kind in range(len(ANSWERS))]
VOCABULARY = ANSWER + sum(ANSWERS)
TOKENS = CELLS * CELLS
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.float32)


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
    """Pictures (count, 3, 64, 64) and objects (count, 6, 3): row, column and shape of the object of each colour, of
    which the first three of a random order have the others at their right."""
    objects = torch.zeros(count, COLOURS, 3, dtype=torch.long)
    right = torch.full((count, COLOURS), -1)
    for scene in range(count):
        colours = torch.randperm(COLOURS, generator=generator)
        places = torch.randperm(CELLS * (CELLS // 2), generator=generator)[:PAIRS]
        for pair, place in enumerate(places.tolist()):
            row, column = divmod(place, CELLS // 2)
            left, other = colours[2 * pair], colours[2 * pair + 1]
            found = torch.randint(SHAPES, (2,), generator=generator)
            objects[scene, left] = torch.tensor([row, 2 * column, found[0]])
            objects[scene, other] = torch.tensor([row, 2 * column + 1, found[1]])
            right[scene, left] = other
    pixels = 0.3 * torch.randn(count, 3, CELLS * PATCH, CELLS * PATCH, generator=generator)
    view = pixels.view(count, 3, CELLS, PATCH, CELLS, PATCH)
    drawn = shapes()
    for scene in range(count):
        for colour in range(COLOURS):
            row, column, shape = objects[scene, colour].tolist()
            view[scene, :, row, :, column] += 1.5 * PALETTE[colour][:, None, None] * drawn[shape]
    return pixels, torch.cat([objects, right[..., None]], 2)


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


def prompts(colours: Tensor, kinds: Tensor, answers: Tensor | None = None) -> Tensor:
    """(B, 65 + 2 or 3 times the questions): the picture, then kinds and colours (B, questions) with their answers."""
    parts = [ASK + kinds, COLOUR + colours] + ([] if answers is None else [answers])
    asked = torch.stack(parts, 2).flatten(1)
    start = torch.tensor([BOS] + [IMAGE] * TOKENS).expand(len(asked), -1)
    return torch.cat([start, asked], 1)


def train(model: LlavaForConditionalGeneration, steps: int, seed: int, batch: int = 64) -> float:
    """Train with four questions a picture; returns the loss of the last hundred steps."""
    head = nn.Linear(HIDDEN, COLOURS + 1 + SHAPES + 1)
    generator = torch.Generator().manual_seed(seed)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    seen: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_hook(lambda m, a, output: seen.append(output))
    losses = []
    for step in range(steps):
        pixels, objects = scenes(batch, generator)
        asked = [ask(objects, kind, generator)[:2] for kind in range(4)]
        order = torch.randperm(4, generator=generator)
        colours = torch.stack([asked[k][0] for k in order], 1)
        answers = torch.stack([asked[k][1] for k in order], 1)
        ids = prompts(colours, order.expand(batch, -1), answers)
        labels = torch.full_like(ids, -100)
        labels[:, TOKENS + 3 :: 3] = ids[:, TOKENS + 3 :: 3]
        seen.clear()
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        cells = torch.zeros(2, batch, TOKENS, dtype=torch.long)
        place = objects[..., 0] * CELLS + objects[..., 1]
        cells[0].scatter_(1, place, torch.arange(1, COLOURS + 1).expand(batch, -1))
        cells[1].scatter_(1, place, objects[..., 2] + 1)
        named = head(seen[0].view(batch, TOKENS, HIDDEN))
        named = F.cross_entropy(named[..., : COLOURS + 1].flatten(0, 1), cells[0].flatten()) + F.cross_entropy(
            named[..., COLOURS + 1 :].flatten(0, 1), cells[1].flatten()
        )
        optimizer.zero_grad()
        (loss + 2 * named).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)
    model.model.multi_modal_projector._forward_hooks.clear()
    return sum(losses[-100:]) / 100


@torch.no_grad()
def answers(model, data: list[dict], needed: bool = False) -> tuple[dict[str, Tensor], float, float]:
    """Of each kind of question which were answered rightly, (n,) bool; the share of the dense MACs, and the tokens of
    the picture in a layer, on average over layers."""
    right: dict[str, Tensor] = {}
    used, total, tokens = 0.0, 0.0, []
    for kind, part in zip(KINDS, data, strict=True):
        protect = None
        if needed:
            protect = F.pad(part["needed"], (1, 2))
        if protect is None:
            logits = model(input_ids=part["ids"], pixel_values=part["pixels"], use_cache=False).logits[:, -1]
        else:
            with calling(model, protect=protect):
                logits = model(input_ids=part["ids"], pixel_values=part["pixels"], use_cache=False).logits[:, -1]
        first, many = OFFSETS[KINDS.index(kind)], ANSWERS[KINDS.index(kind)]
        right[kind] = logits[:, first : first + many].argmax(1) + first == part["answers"]
        pruner = getattr(model, "token_pruner", None)
        if pruner is not None:
            record = pruner.record
            used, total = used + float(record.used), total + float(record.dense)
            text = part["ids"].shape[1] - TOKENS
            tokens.append(sum(float((c.n_attention - text).float().mean()) for c in record.counts) / LAYERS)
    return right, used / total if total else 1.0, sum(tokens) / len(tokens) if tokens else float(TOKENS)


def evaluate(model, seed: int, count: int) -> list[dict]:
    """A row for each method and number of tokens that are kept."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    pixels, objects = scenes(count, generator)
    data = []
    for kind in range(4):
        colour, answer, needed = ask(objects, kind, generator)
        ids = prompts(colour[:, None], torch.full((count, 1), kind))
        data.append({"ids": ids, "pixels": pixels, "answers": answer, "needed": needed})
    blind = [part | {"pixels": torch.zeros_like(pixels)} for part in data]
    rows = [row_of("dense", TOKENS, *answers(model, data)), row_of("no picture", 0, *answers(model, blind))]
    for kept in (32, 16, 7, 4):
        side = {32: 6, 16: 4, 7: 3, 4: 2}[kept]
        methods: dict[str, Any] = {
            "Random": Random(keep=kept, at=(-1,)),
            "Grid": Grid(keep=kept),
            f"Pool {side}x{side}": Pool(side=side),
            "DivPrune": DivPrune(keep=kept),
            "CDPruner": CDPruner(keep=kept),
            "CDPruner without text": CDPruner(keep=kept, relevance=False),
            "VisionZip": VisionZip(keep=kept),
            "oracle": Random(keep=kept, at=(-1,)),
            "Random after layer 1": Random(keep=kept, at=(1,)),
            "TopK after layer 1": TopK(keep=kept, at=(1,)),
            "FastV after layer 1": FastV(keep=kept, at=(1,)),
            "PyramidDrop": PyramidDrop(keep=(2 * kept, kept, max(1, kept // 2))),
        }
        for name, method in methods.items():
            prune(model, method)
            rows.append(row_of(name, kept, *answers(model, data, name == "oracle")))
            unprune(model)
            print(rows[-1], flush=True)
    return rows


def row_of(name: str, kept: int, right: dict[str, Tensor], macs: float, tokens: float) -> dict:
    """What one method answers: accuracy in percent with its 95 % interval, by kind of question and in all."""
    together = torch.stack(list(right.values())).float().mean(0)
    mean, half = float(together.mean()), 1.96 * float(together.std()) / len(together) ** 0.5  # of pictures
    by_kind = {kind: round(100 * float(x.float().mean()), 1) for kind, x in right.items()}
    found = {
        "accuracy": round(100 * mean, 2),
        "interval": [round(100 * (mean - half), 2), round(100 * (mean + half), 2)],
    }
    return {
        "method": name,
        "kept": kept,
        **found,
        "by_kind": by_kind,
        "macs": round(macs, 4),
        "tokens": round(tokens, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--pictures", type=int, default=1000, help="of the test")
    parser.add_argument("--weights", type=Path, help="where the trained model is kept, to go on with")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, begun = build(args.seed), time.process_time()
    if args.weights is not None and args.weights.exists():
        model.load_state_dict(torch.load(args.weights, weights_only=True))
        loss, seconds = None, None
    else:
        loss = train(model, args.steps, args.seed)
        seconds = round(time.process_time() - begun)
        if args.weights is not None:
            args.weights.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), args.weights)
    rows = evaluate(copy.deepcopy(model).eval(), args.seed, args.pictures)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    told = {"seed": args.seed, "steps": args.steps, "loss": loss, "seconds": seconds, "pictures": args.pictures}
    args.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
