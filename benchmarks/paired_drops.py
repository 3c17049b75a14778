"""What a model loses against another one: pairs of answers to the same texts, and how a drop is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def mean(values: Iterable[float]) -> float:
    """Of an iterable."""
    values = list(values)
    return sum(values) / len(values)


def against_dense(results: Iterable[dict], labels: list) -> list[tuple]:
    """(labels, answers of dense, answers of the pruned model) of each result, against the dense model that it started
    from: other machines make others from the same command."""
    return [(labels, own["predictions"]["dense"], own["predictions"]["pruned"]) for own in results]


def against_same_steps(results: Mapping[int, dict], continued: Mapping[int, dict], labels: list) -> list[tuple]:
    """The same against the dense model that was trained the same extra steps, by seed; none where one of the seeds
    lacks it, or started from another dense model than the result did."""
    pairs = [(continued.get(seed), own) for seed, own in results.items()]
    if any(base is None or base["predictions"]["dense"] != own["predictions"]["dense"] for base, own in pairs):
        return []
    return [(labels, base["predictions"]["pruned"], own["predictions"]["pruned"]) for base, own in pairs]


def pooled_drop(metric: str, answered: list[tuple]) -> tuple[float, float, float]:
    """The mean drop of (labels, one's answers, another's answers), and its interval."""
    from thresher.stats.bootstrap import pooled_interval
    from thresher.stats.metrics import compute_metric

    drop = mean(compute_metric(metric, a, y) - compute_metric(metric, b, y) for y, a, b in answered)
    return drop, *pooled_interval(metric, answered)


def drop_text(metric: str, answered: list[tuple]) -> str:
    """``pooled_drop`` in words; "" of none."""
    return in_points(*pooled_drop(metric, answered)) if answered else ""


def row_drop(row: dict, digits: int = 2) -> str:
    """What a row lost, with its interval."""
    return in_points(row["quality_dense"] - row["quality"], row["interval_low"], row["interval_high"], digits)


def in_points(drop: float, low: float, high: float, digits: int = 2) -> str:
    """A drop and its 95 % interval in points."""
    return f"{drop:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
