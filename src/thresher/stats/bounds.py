"""How sure one can be of a rate after n examples: one-sided exact bounds, and tests one after another.

Pure arithmetic. ``level`` is the probability with which a bound may be wrong, over the draw of the examples, which are
taken to be independent of each other and of whatever chose the schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

LEVEL = 0.05


def upper(errors: int, n: int, level: float = LEVEL) -> float:
    """Return the least rate at which ``errors`` or fewer in ``n`` have a probability of at most ``level``.

    Clopper and Pearson (Biometrika 1934), one-sided: the true rate is above it in at most ``level`` of all draws.

    Raises ValueError unless 0 <= errors <= n, n >= 1 and 0 < level < 1.
    """
    _check(errors, n, level)
    from scipy.stats import beta

    return 1.0 if errors == n else float(beta.ppf(1 - level, errors + 1, n - errors))


def lower(errors: int, n: int, level: float = LEVEL) -> float:
    """Return the counterpart of ``upper``: the true rate is below it in at most ``level`` of all draws."""
    return 1 - upper(n - errors, n, level)


def paired_upper(lost: int, won: int, n: int, level: float = LEVEL) -> float:
    """Return an upper bound on P(lost) - P(won), the drop of accuracy, of ``n`` pairs with so many lost and won.

    ``upper(lost) - lower(won)``, each at half the level: conservative by Bonferroni's inequality, whatever the
    dependence of the two counts. Arguments as ``upper``; a pair cannot be both.
    """
    if lost + won > n:
        raise ValueError(f"{lost} pairs lost and {won} won of {n}: expected no more than there are")
    return upper(lost, n, level / 2) - lower(won, n, level / 2)


def least(limit: float, paired: bool = False, level: float = LEVEL) -> int:
    """Return the fewest examples with which a bound can be at most ``limit``, if not one of them is wrong.

    Raises ValueError unless 0 < limit < 1.
    """
    if not 0 < limit < 1:
        raise ValueError(f"limit={limit}: expected a share between 0 and 1")
    level = level / 2 if paired else level
    n = math.ceil(math.log(level) / math.log1p(-limit))
    while upper(0, n, level) > limit:  # where rounding decides
        n += 1
    return n


def passing(bounds: Iterable[float], limit: float) -> int:
    """Count how many pass before the first bound above ``limit``; later ones are not looked at.

    Testing in a sequence that was fixed before the examples were seen (Maurer, Hothorn and Lehmacher, 1995; so in
    Angelopoulos et al., "Learn then Test", 2021): if each bound is wrong in at most ``level`` of all draws, then in at
    most ``level`` of all draws does anything pass whose true rate is above the limit, however many are tested.
    """
    return len([*takewhile(lambda bound: bound <= limit, bounds)])


def _check(errors: Any, n: Any, level: float) -> None:
    if n < 1 or not 0 <= errors <= n:
        raise ValueError(f"{errors} errors in {n} examples: expected 1 example or more, and no more errors than those")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a probability between 0 and 1")
