"""Numbers for people that err on the safe side: an epsilon or a noise multiplier is never shown below what it is."""

import math


def up(value: float, digits: int) -> str:
    """Write a number with so many decimals, rounded up.

    >>> up(1.9991, 3), up(2.0, 3), up(0.1 + 0.2, 1), up(math.inf, 3)
    ('2.000', '2.000', '0.3', 'inf')
    """
    # what differs from a printed number by less than this is a rounding error of the number itself
    shown = math.ceil(value * 10**digits - 1e-9) / 10**digits if math.isfinite(value) else value
    return f"{shown:.{digits}f}"
