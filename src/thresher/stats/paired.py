"""Statistics of paired answers: the same examples answered by two models, in slices of them.

Shapes: N examples, n of them in a slice. ``change`` (N,) is what each example lost: the first model's score minus the
second's. ``unit`` is what a right answer counts more than a wrong one, so that every change is -unit, 0 or unit; then
nothing is drawn. None: scores of any size, 10,000 permutations, a bootstrap of 2,000 draws (seed 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS, RESAMPLES, CHUNK, TINY = 10_000, 2000, 100, 1e-9


def paired_test(change: np.ndarray) -> float:
    """Return p of the exact sign test of ``change`` (n,), two-sided: McNemar's where answers are right or wrong.

    p of as uneven a split between losses and gains, were both equally likely; examples that did not change say nothing.
    """
    from scipy.stats import binomtest

    lost, gained = int((change > 0).sum()), int((change < 0).sum())
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def interval(change: np.ndarray, unit: float | None, level: float = 0.95) -> tuple[float, float] | None:
    """Return the confidence interval of the mean of ``change`` (n,).

    Right or wrong: Tango's score interval (Statistics in Medicine 17, 1998), which has a width where nothing changed.
    Else the percentile bootstrap over examples; None where all changed by the same, of which it knows nothing.
    """
    from scipy.optimize import brentq
    from scipy.stats import bootstrap, norm

    n = len(change)
    if unit is None:
        if n < 2 or np.ptp(change) == 0:
            return None
        options = {"method": "percentile", "n_resamples": RESAMPLES, "batch": CHUNK}
        result = bootstrap((change,), np.mean, confidence_level=level, rng=0, **options)
        return float(result.confidence_interval.low), float(result.confidence_interval.high)
    lost, gained, z = (change > 0).sum(), (change < 0).sum(), norm.isf((1 - level) / 2)

    def away(drop: float) -> float:
        """The score statistic of a ``drop``, squared, with its sign, less that of the level."""
        a, b, c = 2 * n, (2 * n - lost + gained) * drop - lost - gained, -gained * drop * (1 - drop)
        rare = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        spread, distance = n * (2 * rare + drop * (1 - drop)), lost - gained - n * drop
        return abs(distance) - z * math.sqrt(max(0.0, spread))

    mean = (lost - gained) / n
    low = -1.0 if away(-1.0) <= 0 else brentq(away, -1, mean - TINY)
    high = 1.0 if away(1.0) <= 0 else brentq(away, mean + TINY, 1)
    return unit * low, unit * high


def holm(p: Sequence[float]) -> list[float]:
    """Return adjusted p values (Holm, 1979): all that are below a level are wrong with at most that probability."""
    values, adjusted = np.asarray(p, float), np.empty(len(p))
    order = values.argsort()
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1).tolist()


def excess_tests(change: np.ndarray, members: np.ndarray, unit: float | None) -> np.ndarray:
    """Return (S,) the one-sided p of each slice's mean change: as large a one in any n of the N examples.

    members: (S, N) bool. A permutation test of the slice against the other examples. Right or wrong it is exact: of D
    examples that changed, k fall into the slice (hypergeometric), and of these some are losses (the same again).
    """
    if unit is not None:
        lost, gained = int((change > 0).sum()), int((change < 0).sum())
        sums = np.rint((members * change).sum(1) / unit).astype(int)
        sizes = members.sum(1).tolist()
        return np.array([_above(s, n, lost, gained, len(change)) for s, n in zip(sums, sizes, strict=True)])
    rng, weights = np.random.default_rng(0), members.astype(float)
    sums, reached = weights @ change, np.zeros(len(members))
    close = 1e-9 * np.abs(change).sum()  # sums in another order
    for _ in range(DRAWS // CHUNK):
        drawn = weights @ rng.permuted(np.tile(change, (CHUNK, 1)), axis=1).T
        reached += (drawn >= sums[:, None] - close).sum(1)
    return (1 + reached) / (1 + DRAWS)


def detectable(change: np.ndarray, member: np.ndarray, unit: float | None, level: float) -> float | None:
    """Return the least mean change of a slice, ``member`` (N,) bool, at which ``excess_tests`` falls to ``level``.

    The other examples are left as they are. Right or wrong: how many more unchanged examples of the slice would have to
    be lost, found with the test itself; where there are not enough of them, None. Else by the normal approximation.
    """
    from scipy.stats import norm

    n, total, inside = int(member.sum()), len(change), change[member]
    if unit is None:
        spread = change.std() * math.sqrt((total - n) / (n * (total - 1)))
        return float(change.mean() + norm.isf(level) * spread)
    away = change[~member]  # the slice's own losses are forgotten, so that what it did is no part of the answer
    lost, gained, own = int((away > 0).sum()), int((away < 0).sum()), int((inside < 0).sum())
    low, high = 0, n - own + 1  # losses of the slice
    while low < high:
        middle = (low + high) // 2
        if _above(middle - own, n, lost + middle, gained + own, total) <= level:
            high = middle
        else:
            low = middle + 1
    return unit * (low - own) / n if low <= n - own else None


def _above(least: int, n: int, lost: int, gained: int, total: int) -> float:
    """Return P(losses - gains >= ``least``) among ``n`` examples drawn from ``total`` with ``lost`` and ``gained``."""
    from scipy.special import gammaln

    def choices(m: int, k: np.ndarray) -> np.ndarray:
        """Logarithm of the ways to draw k of m."""
        inside = (k >= 0) & (k <= m)
        k = np.where(inside, k, 0)
        return np.where(inside, gammaln(m + 1) - gammaln(k + 1) - gammaln(m - k + 1), -np.inf)

    def likely(m: int) -> np.ndarray:
        """How many of m may be drawn; what is left out has a probability below 1e-20."""
        mean = n * m / total
        far = 12 * math.sqrt(mean) + 40
        return np.arange(max(0, int(mean - far)), min(n, m, math.ceil(mean + far)) + 1)

    a, b = likely(lost)[:, None], likely(gained)[None]
    rest = choices(total - lost - gained, np.arange(n + 1))  # by how many unchanged ones are drawn
    others = n - a - b
    ways = choices(lost, a) + choices(gained, b) + np.where(others >= 0, rest[others.clip(0)], -np.inf)
    return float(np.exp(ways - choices(total, np.array(n)))[a - b >= least].sum().clip(max=1))
