"""What the papers report of ToP and LTP, read at own length, beside what our rows say."""

from __future__ import annotations

from entries import ENTRIES, TASKS
from paired_drops import against_dense, against_same_steps, drop_text, in_points, mean, pooled_drop

# (task, method): (model, times fewer FLOPs than dense on the same texts without padding, drop in points).
# LTP's table says so itself. ToP's factors are against texts padded to 64, 128, 256 or 512; the sparsities of its
# README give those of pruning alone, 1 / (1 - s), and for 20 Newsgroups its released schedule does.
PAPERS = {
    ("sst2", "ltp"): ("RoBERTa-base", 2.09, 0.81),
    ("mrpc", "ltp"): ("RoBERTa-base", 2.10, 0.55),
    ("rte", "ltp"): ("RoBERTa-base", 1.81, 0.00),
    ("stsb", "ltp"): ("RoBERTa-base", 1.95, 0.86),
    ("sst2", "top"): ("BERT-base", 1.67, -0.4),
    ("mrpc", "top"): ("BERT-base", 3.03, 0.1),
    ("rte", "top"): ("BERT-base", 2.44, -2.2),
    ("cola", "top"): ("BERT-base", 1.75, -2.2),
    ("stsb", "top"): ("BERT-base", 3.33, 2.1),
    ("20newsgroups", "top"): ("BERT-base, 512 tokens", 5.35, -0.3),
    ("20newsgroups-512", "top"): ("BERT-base, 512 tokens", 5.35, -0.3),
}
ABOUT = """\
Both at own length: against the dense model on the same texts without padding. The papers' models have twelve layers,
ours six, and they give one number, without an interval.
Their teachers differ from plain fine-tuning (ToP's BERT has 65.7 on RTE and 57.8 on CoLA), and their extra steps, which
alone may be worth a point (the second column of drops), are in their drops too."""


GLUE = ("sst2", "mrpc", "cola", "stsb")  # without RTE, where the dense model answers like chance
MEAN_OF = {"top": "its paper's is 0.26", "ltp": "its paper's, at 2.0x, is 0.7"}


def glue_mean(method: str, results: dict[str, dict], target: float = 0.417) -> list[str]:
    """The mean drop over GLUE's tasks at one budget, with an interval that takes the tasks for independent; nothing
    where a task is missing."""
    drops, reaches, fewer = [], [], []
    for task in GLUE:
        found = [e.name for e in ENTRIES if (e.task, e.method, e.variant, e.target) == (task, method, "", target)]
        runs = [results[name] for name in found if name in results]
        if not runs:
            return []
        drop, low, high = pooled_drop(runs[0]["rows"][0]["metric"], against_dense(runs, list(runs[0]["labels"])))
        drops.append(drop)
        reaches.append((drop - low, high - drop))
        fewer.append(mean(run["rows"][0]["flops_ratio"] for run in runs))
    below, above = (sum(r**2 for r in side) ** 0.5 / len(drops) for side in zip(*reaches, strict=True))
    drop = mean(drops)
    return [
        f"{method}, mean over {', '.join(GLUE)} at {min(fewer):.2f} to {max(fewer):.2f}x: "
        f"{in_points(drop, drop - below, drop + above)}; {MEAN_OF[method]}.",
        "",
    ]


def beside(results: dict[str, dict]) -> list[str]:
    """A line for each budget of ToP and LTP on a task that a paper has, as lines of ``docs/results.md``."""
    lines = []
    for task, method in ((task, method) for task in TASKS for method in ("top", "ltp") if (task, method) in PAPERS):
        landed = [e for e in ENTRIES if e.task == task and e.kind == "train" and e.name in results]
        continued = {e.seed: results[e.name] for e in landed if e.method == "dense-continued"}
        plain = [e for e in landed if e.method == method and (not e.variant or e.variant.endswith("epochs"))]
        for target, variant in sorted({(e.target, e.variant) for e in plain}, key=lambda one: (-one[0], one[1])):
            runs = {e.seed: results[e.name] for e in plain if (e.target, e.variant) == (target, variant)}
            some = next(iter(runs.values()))
            metric, labels = some["rows"][0]["metric"], list(some["labels"])
            fewer = mean(run["rows"][0]["flops_ratio"] for run in runs.values())
            drops = [
                drop_text(metric, against_dense(runs.values(), labels)),
                drop_text(metric, against_same_steps(runs, continued, labels)),
            ]
            model, flops, drop = PAPERS[task, method]
            cells = [
                task,
                f"{method} ({variant})" if variant else method,
                str(len(runs)),
                f"{fewer:.2f}",
                *drops,
                f"{flops:.2f}",
                f"{drop:+.2f}",
                model,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    head = ["task", "method", "seeds", "FLOPs", "drop against dense [95 % interval]", "against dense, same extra steps"]
    head += ["paper's FLOPs", "its drop", "its model"]
    means = [line for method in MEAN_OF for line in glue_mean(method, results)]
    title = ["## Beside the papers", "", *ABOUT.splitlines(), ""]
    return [*title, f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, "", *means]
