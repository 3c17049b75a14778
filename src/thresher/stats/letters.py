"""Which methods the answers can tell apart: a leaderboard's letters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import resamples
from .metrics import checked_answers, compute_metric, points_of
from .paired import holm


def groups(
    metric: str, labels: Any, answers: Mapping[str, Any], level: float = 0.05, n: int | None = None, seed: int = 0
) -> dict[str, str]:
    """Return the letters of each method, best mean quality first: methods that share a letter cannot be told apart.

    Every two methods are compared by the paired bootstrap of their difference (as in ``bootstrap.pooled_interval``:
    examples and seeds are drawn anew, the same for both), two-sided, and Holm's correction (Scand. J. Statist. 1979)
    holds the chance of any wrong difference at ``level``. The letters are a compact letter display by insertion and
    absorption (Piepho, JCGS 2004): "a" is the best method and all that may be as good; a method
    with "ab" belongs to both groups, which do not exclude each other. Not being told apart is not being equal.

    Args:
        labels: (N,), as ``compute_metric`` takes them.
        answers: of each method, by seed or in the order of the seeds: logits, classes or values of the N examples. Two
            methods are compared on the seeds that both have; where there is none they are not told apart.
        n: bootstrap draws; default: 2,000, more where so many pairs need a finer p-value.

    Raises:
        ValueError: no answers of a method, or answers that do not fit the labels.
    """
    runs = {name: dict(of if isinstance(of, Mapping) else enumerate(of)) for name, of in answers.items()}
    if empty := [name for name, of_seed in runs.items() if not of_seed]:
        raise ValueError(f"there are no answers of {empty[0]}: expected those of one seed or more")
    quality = {name: np.mean([compute_metric(metric, a, labels) for a in of.values()]) for name, of in runs.items()}
    ordered = sorted(runs, key=lambda name: -quality[name])
    pairs = list(itertools.combinations(ordered, 2))
    values = p_values(metric, labels, runs, pairs, n or max(2000, round(4 / level) * len(pairs)), seed)
    apart = {pair for pair, p in zip(pairs, holm(values), strict=True) if p <= level}
    return letters(ordered, apart)


def p_values(
    metric: str, labels: Any, runs: Mapping[str, Mapping], pairs: Sequence[tuple[str, str]], n: int, seed: int = 0
) -> list[float]:
    """Return two-sided bootstrap p-values of pairs; ``runs`` holds the answers of each method by seed."""
    labels = np.asarray(labels)
    points: dict[tuple, Any] = {}
    given = {(name, s): checked_answers(metric, labels, a) for name, of in runs.items() for s, a in of.items()}
    for times, _ in resamples(len(labels), 1, n, seed):
        for key, answers in given.items():
            points.setdefault(key, []).append(points_of(metric, labels, answers, times))
    points = {key: np.concatenate(drawn) for key, drawn in points.items()}
    chance, values = np.random.default_rng(seed).random((max(map(len, runs.values()), default=1), n)), []
    for a, b in pairs:
        shared = [s for s in runs[a] if s in runs[b]]
        if not shared:
            values.append(1.0)
            continue
        gaps = np.array([points[a, s] - points[b, s] for s in shared])  # (seeds, draws)
        which = (chance[: len(shared)] * len(shared)).astype(int)
        gap = np.take_along_axis(gaps, which, 0).mean(0)
        tail = min((gap <= 1e-9).sum(), (gap >= -1e-9).sum())
        values.append(min(1.0, 2 * (1 + int(tail)) / (n + 1)))
    return values


def letters(ordered: Sequence[str], apart: set[tuple[str, str]]) -> dict[str, str]:
    """Return a compact letter display: two of ``ordered`` share a letter unless they are a pair of ``apart``."""
    sets = [frozenset(ordered)]
    for pair in sorted(apart, key=lambda pair: [ordered.index(name) for name in pair]):
        split = [part for one in sets for part in ([one - {name} for name in pair] if one >= {*pair} else [one])]
        sets = [one for one in dict.fromkeys(split) if not any(one < other for other in split)]
    sets.sort(key=lambda one: sorted(map(ordered.index, one)))
    marks = [chr(ord("a") + i % 26) + str(i // 26 or "") for i in range(len(sets))]
    return {name: "".join(mark for mark, one in zip(marks, sets, strict=True) if name in one) for name in ordered}
