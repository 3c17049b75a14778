"""The leaderboards: every method at one budget, in two tables for each task, and a picture of each."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from entries import BOARD, Entry, board_speed
from paired_drops import against_dense, row_drop

KINDS = {"trained": "trained with the same steps and teacher", "untrained": "budget met without training"}

TIMES = " × unpadded, padded at batch 32 | at batch 1 |"


def on_board(entry: Entry) -> bool:
    """Whether an entry is one of a leaderboard; those trained "alone" are at other layers, for another comparison."""
    return entry.kind == "train" and entry.target == BOARD and entry.variant != "alone"


def leaderboard_rows(entries: list[Entry], results: dict[str, dict]) -> list[dict]:
    """A row for each method that has a result, best mean quality first, with the pooled drop and its group."""
    from thresher.evaluation.rows import row
    from thresher.stats.bootstrap import pooled_interval
    from thresher.stats.letters import groups

    runs: dict[str, dict[int, dict]] = {}
    for entry in entries:
        if entry.name in results:
            runs.setdefault(entry.label, {})[entry.seed] = results[entry.name]
    if not runs:
        return []
    some = next(iter(next(iter(runs.values())).values()))
    labels, metric = some["labels"], some["rows"][0]["metric"]
    answers = {name: {s: own["predictions"]["pruned"] for s, own in of.items()} for name, of in runs.items()}
    rows = []
    for name, letters in groups(metric, labels, answers).items():
        of = runs[name]
        low, high = pooled_interval(metric, against_dense(of.values(), labels))
        fields = ("quality", "quality_dense", "flops_ratio")
        means = {field: sum(own["rows"][0][field] for own in of.values()) / len(of) for field in fields}
        told = {"method": name, "mode": "pruned", "metric": metric, "target_flops": BOARD, "seeds": sorted(of)}
        rows.append(row(**told, **means, interval_low=low, interval_high=high, group=letters))
    return rows


def reward_lines(entry: Entry, result: dict) -> list[str]:
    """How a method's reward went, where it has one."""
    if entry.kind != "train" or not (rewards := result.get("rewards")):
        return []
    told = (f"{r['reward']:.2f} ({r['task_loss']:.2f}, {r['left']:.2f}, {r['alpha']:+.2f})" for r in rewards)
    price = rewards[-1]["alpha"]
    same = (f"{-r['task_loss'] - price * r['left']:.2f}" for r in rewards)
    return [
        f"{entry.method}, seed {entry.seed}, the reward −task − α · MACs until epoch {rewards[-1]['epoch']:.1f}, where "
        f"its choices are sampled (task loss, MACs left, α): {', '.join(told)}. "
        f"At the last α, so at one price: {', '.join(same)}.",
        "",
    ]


def speedups(rows: list[dict]) -> dict[str, list[str]]:
    """Method -> its speed-ups in one interleaved run at batch sizes 32 and 1, each over dense unpadded and padded."""
    found: dict[str, list[str]] = {}
    for r in sorted(rows, key=lambda r: -r["batch_size"]):
        if r["mode"] == "pruned":
            found.setdefault(r["method"], []).append(f"{r['speedup_unpadded']:.2f}, {r['speedup_padded']:.2f}")
    return found


def leaderboard_section(task: str, entries: list[Entry], results: dict[str, dict], docs: Path) -> list[str]:
    """The leaderboards of a task as lines of ``docs/results.md``, and their pictures in ``docs/img``."""
    from thresher.reports.plots import leaderboard

    lines, timed = [], results.get(board_speed(task).name, {"rows": []})["rows"]
    for kind, said in KINDS.items():
        rows = leaderboard_rows(
            [e for e in entries if e.variant.endswith("untrained") == (kind == "untrained")], results
        )
        if not rows:
            continue
        times = speedups(timed) if kind == "trained" else {}
        lines += [
            f"Every method at {BOARD:g} of the dense MACs, {said}, best first. Methods that share a letter cannot be "
            "told apart (paired bootstrap, Holm's correction, 5 %):",
            "",
            f"| method | group | seeds | {rows[0]['metric']} | drop against dense [95 % interval] | FLOPs |"
            + TIMES * bool(times),
            "|---|---|---|---|---|---|" + "---|---|" * bool(times),
        ]
        for r in rows:
            cells = (r["method"], r["group"], ", ".join(map(str, r["seeds"])), f"{r['quality']:.2f}", row_drop(r))
            cells += (f"{r['flops_ratio']:.2f}", *times.get(r["method"], [""] * 2 * bool(times)))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        if times:
            spread = max(r["spread"] for r in timed)
            lines += [
                f"Times: seed 0, one interleaved run, {timed[0]['repeats']} repeats, {timed[0]['threads']} threads, "
                f"fp32, {timed[0]['hardware']}; the spread of the totals is up to {spread:.2f}.",
                "",
            ]
        lines += [line for e in entries if kind == "trained" for line in reward_lines(e, results.get(e.name, {}))]
        picture = docs / "img" / f"board-{task}-{kind}.svg"
        if find_spec("matplotlib"):
            leaderboard(rows, picture, f"{task}, {BOARD:g} of the MACs, {kind}")
        if picture.exists():
            lines += [f"![{task}, {kind}: drops and their intervals]({picture.relative_to(docs).as_posix()})", ""]
    return lines
