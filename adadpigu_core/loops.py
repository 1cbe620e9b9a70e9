"""The loop of `box_muller` for Numba to compile; only `box_muller` imports this, where Numba is installed.

Products and sums may be contracted (one rounding instead of two) and nothing else is rearranged.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import njit
from numpy.typing import NDArray

Loop = Callable[..., None]


def _compiled(loop: Loop) -> Loop:
    """Compile at the first call, and keep the machine code on disk where there is a place for it."""
    compile_loop = partial(njit, error_model="numpy", fastmath={"contract"})
    try:
        return compile_loop(cache=True)(loop)
    except RuntimeError:  # neither beside this file nor in a folder of the user's
        return compile_loop()(loop)


_LN2 = math.log(2.0)
_SQUARE_ROOT_HALF = np.int64(0x3FE6A09E667F3BCD)  # as bits of a float64
_SMALL, _MORE = 2.0**-20, 2.0**-76  # as `box_muller` has them
_TURN = 2.0 * math.pi * 2.0**-52


@_compiled
def box_muller(bits: NDArray[np.uint64], values: NDArray[np.float64]) -> None:
    """See `box_muller.standard_normals`.

    Logarithm, cosine and sine are their series, to where the rest is below half a unit in the last place.
    """
    half = len(bits) // 2
    fraction = np.uint64(2**52 - 1)
    for i in range(half):
        # log u: u = m 2^e with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1))
        coarse = 1.0 - np.float64(bits[i] & fraction) * 2.0**-52
        more = 0.0
        if coarse < _SMALL:
            more = np.float64(bits[i] >> np.uint64(52)) * 4096.0 + np.float64(bits[half + i] >> np.uint64(52))
        u = np.float64(coarse - more * _MORE)
        as_bits = u.view(np.int64)
        e = (as_bits - _SQUARE_ROOT_HALF) >> np.int64(52)
        m = np.int64(as_bits - (e << np.int64(52))).view(np.float64)
        s = (m - 1.0) / (m + 1.0)
        z = s * s
        series = 1 / 19 + z * (1 / 21)
        series = 1 / 15 + z * (1 / 17 + z * series)
        series = 1 / 11 + z * (1 / 13 + z * series)
        series = 1 / 7 + z * (1 / 9 + z * series)
        series = z * (1 / 3 + z * (1 / 5 + z * series))
        radius = math.sqrt(-2.0 * (np.float64(e) * _LN2 + (2.0 * s + 2.0 * s * series)))
        # the angle as a multiple of a quarter turn, and what remains of it, at most an eighth
        k = np.int64(bits[half + i] & fraction)
        quarter = (k + np.int64(2**49)) >> np.int64(50)
        x = np.float64(k - (quarter << np.int64(50))) * _TURN
        y = x * x
        sine = 1 / 6227020800 - y * (1 / 1307674368000)
        sine = -1 / 5040 + y * (1 / 362880 + y * (-1 / 39916800 + y * sine))
        sine = x + x * (y * (-1 / 6 + y * (1 / 120 + y * sine)))
        cosine = -1 / 87178291200 + y * (1 / 20922789888000)
        cosine = 1 / 40320 + y * (-1 / 3628800 + y * (1 / 479001600 + y * cosine))
        cosine = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * cosine)))
        odd = quarter & np.int64(1)
        first, second = (sine, cosine) if odd else (cosine, sine)
        values[i] = -radius * first if (quarter + np.int64(1)) & np.int64(2) else radius * first
        values[half + i] = -radius * second if quarter & np.int64(2) else radius * second
