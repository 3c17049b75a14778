"""The README's table: a row for every kind of reader, written from benchmarks/results, the longest texts first."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entries import ENTRIES, Entry
from leaderboard import on_board
from paired_drops import against_dense, in_points, mean, pooled_drop, row_drop

ENOUGH = 50  # examples of a row
SAID = (
    "Against the dense model on the same texts **without padding**; speeds are of batches, over the fastest way to run "
    "the dense model in the same runtime and precision (int8: ONNX Runtime), on two cores. Points lost: below 0 is a "
    "gain, in brackets the 95 % interval; an empty cell was not measured. MiniLM-L6 where no other model is named."
)
HEAD = (
    "what you have",
    "tokens",
    "our stand-in",
    "× fewer MACs",
    "points lost [95 %]",
    "× as fast, torch fp32",
    "int8",
)
CLASSIFIED = (  # what a reader has, the page that tells more, the stand-in, the tasks that may stand in
    ("reviews", "expect.md", "IMDB", ("imdb-open", "imdb")),
    ("documents to sort", "expect.md", "20 Newsgroups", ("20newsgroups-open", "20newsgroups")),
    ("questions about a paragraph", "expect.md", "SQuAD", ("squad",)),
    ("pairs of sentences", "expect.md", "MRPC", ("mrpc-open", "mrpc")),
    ("questions and answers to rank", "expect.md", "TREC QA", ("trecqa-open", "trecqa")),
    ("how alike two sentences are", "expect.md", "STS-B", ("stsb-open", "stsb")),
    ("single sentences", "expect.md", "SST-2", ("sst2-open", "sst2")),
    ("sentences of twelve words", "expect.md", "CoLA", ("cola-open", "cola")),
)
METHODS = ("top", "topk")
NAMES = {"top": "ToP", "topk": "TopK"}
METRICS = {"qa_f1": "F1", "f1": "F1", "map": "MAP", "pearson": "Pearson's r", "matthews": "Matthews"}


@dataclass(frozen=True)
class Case:
    """A row: what a reader has, the page that tells more, tokens of a text, and the other cells as they are shown."""

    what: str
    page: str
    tokens: float
    stand_in: str
    fewer: str
    drop: str
    torch: str = ""
    int8: str = ""

    def line(self) -> str:
        """The row in Markdown."""
        cells = (f"[{self.what}](docs/{self.page})", f"{self.tokens:.0f}", self.stand_in, self.fewer, self.drop)
        return "| " + " | ".join([*cells, self.torch, self.int8]) + " |"


def told_of(task: str, method: str, results: dict[str, dict]) -> list[Entry]:
    """The landed entries of a method at one budget: that of most seeds, the smallest of those; no leaderboard's."""
    budgets = defaultdict(list)
    for entry in ENTRIES:
        if (entry.task, entry.method, entry.variant, entry.kind) == (task, method, "", "train") and not on_board(entry):
            budgets[entry.target].append(entry)
    landed = [[entry for entry in entries if entry.name in results] for entries in budgets.values()]
    return max((of for of in landed if of), key=lambda of: (len(of), -(of[0].target or 1)), default=[])


def speeds_of(entry: Entry, results: dict[str, dict]) -> list[str]:
    """Speed-ups at batch 32 of an entry's model, torch fp32 and ONNX int8, where they were timed."""
    timed = [e for e in ENTRIES if e.kind == "runtimes" and entry.name in e.needs and e.name in results]
    rows = [r for e in timed for r in results[e.name]["rows"] if r["mode"] == "pruned" and r["batch_size"] == 32]
    found = {(r["runtime"], r["precision"]): f"{r['speedup_unpadded']:.1f}" for r in rows}
    return [found.get(kind, "") for kind in (("torch", "fp32"), ("onnx", "int8"))]


def classified(results: dict[str, dict]) -> Iterator[Case]:
    """Trained models of MiniLM-L6, at the smallest budget that most seeds have."""
    for what, page, name, tasks in CLASSIFIED:
        found = [told_of(task, method, results) for task in tasks for method in METHODS]
        entries = next((of for of in found if of and of[0].model == "minilm-l6"), None)
        if entries is None:
            continue
        runs = [results[entry.name] for entry in entries]
        rows, metric = [run["rows"][0] for run in runs], runs[0]["rows"][0]["metric"]
        drop = in_points(*pooled_drop(metric, against_dense(runs, list(runs[0]["labels"]))), digits=1)
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        yield Case(
            what,
            page,
            mean(r["tokens_mean"] for r in rows),
            f"{name}, {NAMES[entries[0].method]}{seeds}",
            f"{mean(r['flops_ratio'] for r in rows):.1f}",
            f"{drop} of {METRICS.get(metric, metric)}",
            *speeds_of(entries[0], results),
        )


def rows_of(file: Path) -> list[dict]:
    """The rows of a file; none where it has not landed."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def reranked(results: Path) -> Iterator[Case]:
    """Candidates of a query, at a width of 256 tokens."""
    judged = rows_of(results / "passages/minilm-l6-quality-s0.json")
    timed = rows_of(results / "passages/minilm-l6-time-s0.json")
    which = ("early", "ndcg@10", "torch")
    for row in (r for r in judged if (r["method"], r["metric"], r["runtime"]) == which):
        own = [r for r in timed if (r["method"], r["mode"], r["max_length"]) == ("topk", "pruned", row["max_length"])]
        speeds = {(r["runtime"], r["precision"]): f"{r['speedup_unpadded']:.1f}" for r in own}
        kinds = (("torch", "fp32"), ("onnx", "int8"))
        yield Case(
            "passages to rerank",
            "rerank.md",
            row["tokens_mean"],
            "SQuAD's paragraphs, TopK",
            f"{row['flops_ratio']:.1f}",
            f"{row_drop(row, digits=1)} of nDCG@10",
            *(speeds.get(kind, "") for kind in kinds),
        )


def embedded(results: Path) -> Iterator[Case]:
    """Documents to embed: the trained merging at half of the MACs."""
    judged, timed = (rows_of(results / f"embedding/minilm-l6-{part}.json") for part in ("quality", "time"))
    judged, timed = ([row for row in rows if row["max_length"] == 256] for rows in (judged, timed))
    speed = {row["method"]: f"{row['speedup']:.1f}" for row in timed}
    for row in (r for r in judged if r["method"] == "tome-trained-2x"):
        name = {"cranfield": "Cranfield's abstracts", "20newsgroups": "20 Newsgroups' posts"}[row["task"]]
        timed_here = speed.get(row["method"], "") if row["task"] == "20newsgroups" else ""
        yield Case(
            "documents to embed",
            "rerank.md",
            row["tokens_mean"],
            f"{name}, ToMe by states",
            f"{row['flops_ratio']:.1f}",
            f"{row_drop(row, digits=1)} of nDCG@10",
            timed_here,
        )


def prompted(results: Path) -> Iterator[Case]:
    """A decoder's cache at a half: the question in the prompt, and behind it."""
    rows = rows_of(results / "longcontext/smollm2-135m-dequantised-quality.json")
    wanted = {
        ("before", "snapkv"): ("a prompt that ends in its question", "SnapKV"),
        ("after", "kvzip"): ("a prompt that is asked about later", "KVzip"),
    }
    alike = {"task": "needle", "keep": 0.5, "precision": "bf16", "length": 300, "digits": 3}
    rows = [row for row in rows if alike.items() <= row.items() and row["n_examples"] >= ENOUGH]
    most = {(r["when"], r["method"]): r for r in sorted(rows, key=lambda row: row["n_examples"])}
    for row in (most[one] for one in wanted if one in most):
        what, name = wanted[row["when"], row["method"]]
        cells = (f"a number to find, SmolLM2-135M, {name}", f"cache {row['tokens'] / row['held']:.1f}")
        drop = in_points(row["drop"], row["interval_low"], row["interval_high"], digits=1)
        yield Case(what, "long-prompts.md", row["tokens"], *cells, f"{drop} of the numbers")


def pictured(results: Path) -> Iterator[Case]:
    """Small pictures."""
    rows = rows_of(results / "vision/vit-digits-methods-s0.json")
    wanted = ("evit", 0.5, 32)
    for row in (r for r in rows if (r["method"], r["target_flops"], r["batch_size"]) == wanted):
        drop = f"{row_drop(row, digits=1)} of {row['metric']}"
        speed = f"{row['speedup_unpadded']:.1f}"
        name = "digits, a ViT of four layers, EViT"
        yield Case("small pictures", "vision.md", row["tokens_mean"], name, f"{row['flops_ratio']:.1f}", drop, speed)


def headline(results: Path, found: dict[str, dict]) -> str:
    """The table, and what its figures are."""
    cases = [*classified(found), *reranked(results), *embedded(results), *prompted(results), *pictured(results)]
    if not cases:
        return "No result has landed yet."
    lines = [case.line() for case in sorted(cases, key=lambda case: -case.tokens)]
    return "\n".join([SAID, "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *lines])
