"""Standard normal variates from random bits, in float64.

Box and Muller's transform of two numbers u in (0, 1] and v in [0, 1), each a multiple of 2^-52:

    sqrt(-2 log u) cos(2 pi v)      and      sqrt(-2 log u) sin(2 pi v)

A u below 2^-20 is a multiple of 2^-76, by the bits that are left over: large variates would lie on few circles
otherwise. The largest variate is 10.3; a normal one is larger with probability 1e-24.

Where Numba is installed and works, which the extra ``fast`` brings, machine code can do it, with the same result but
for rounding. The environment variable ``ADADPIGU_COMPILED=0`` switches that off.
"""

import importlib
import math
import os
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

VARIABLE = "ADADPIGU_COMPILED"
_CHUNK = 65_536  # variates at a time, inside the cache
_MANY = 16_384  # variates in a call, for which loading machine code may pay
_FRACTION = 2**52 - 1  # the bits of a float64 behind the point
_ONE = 1023 << 52  # those of 1.0
_SMALL = 2.0**-20  # of u, from where on it gets the bits before the fractions of both words
_MORE = 2.0**-76


def standard_normals(bits: NDArray[np.uint64], *, long_lived: bool) -> NDArray[np.float64]:
    """Turn random bits into independent standard normal variates.

    Args:
        bits: Uniform, uint64 [n], n even.
        long_lived: Whether this process goes on for long, so that machine code is worth most of a second at the start.

    Returns:
        Float64 [n].
    """
    values = np.empty(len(bits), dtype=np.float64)
    compiled = _compiled() if long_lived and len(bits) >= _MANY else None
    transform = _transform if compiled is None else compiled.box_muller
    for start in range(0, len(bits), _CHUNK):
        transform(bits[start : start + _CHUNK], values[start : start + _CHUNK])
    return values


@cache
def _compiled() -> ModuleType | None:
    """The module of loops, whose first use takes most of a second, or None."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        return importlib.import_module("adadpigu_core.loops")
    except ImportError:  # Numba is not there, or not for this version of NumPy
        return None


def _transform(bits: NDArray[np.uint64], values: NDArray[np.float64]) -> None:
    """Turn the first half of some bits into u and the second into v, and write cosines and then sines to ``values``."""
    half = len(bits) // 2
    words = torch.from_numpy(bits.view(np.int64))
    # a fraction behind a one is a number in [1, 2)
    numbers = words.bitwise_and(_FRACTION).bitwise_or_(_ONE).view(torch.float64)
    u = numbers[:half].neg_().add_(2.0)
    small = torch.nonzero(u < _SMALL).flatten()
    if len(small):
        first, second = ((words[at] >> 52) & 0xFFF for at in (small, small + half))
        u[small] -= (first * 4096 + second).double() * _MORE
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = numbers[half:].mul_(2.0 * math.pi)
    target = torch.from_numpy(values)
    torch.cos(angle, out=target[:half]).mul_(radius)
    torch.sin(angle, out=target[half:]).mul_(radius)
