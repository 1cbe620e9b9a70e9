"""Made-up photographs: leaves that fall over one another, which look much like the world and show nothing of it.

What most photographs share is that things of all sizes cover one another, have edges, and are shaded and striped.
The dead leaves model (Lee, Mumford and Huang 2001) has just that: shapes with sizes from a power law, each in a colour
of its own, thrown on a canvas until it is full. So its statistics over a few pixels are near to those of photographs.

Like all drawings of this package they come from a formula and a fixed seed, and cost no privacy. Left out: perspective,
and objects of more than one part.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PICTURES = 4000
_LEAVES = 40  # a picture
_SMALLEST, _LARGEST = 2 / 32, 20 / 32  # half sizes, of the side
_POWER = 2.6  # of the size, in its density
_STRETCH = 0.5  # standard deviation of the logarithm of length over breadth
_COLOUR = 0.35  # standard deviation of each channel about the brightness, whose own is 1
_STRIPES = 0.35  # of their height
_COARSEST, _FINEST = 0.2, 2.5  # radians a pixel
_SHADE = 0.3  # of the brightness at the end of a leaf
_OUTSIDE = 2  # pixels about the canvas where leaves fall, too

Array = NDArray[np.float64]


def pictures(channels: int, height: int, width: int) -> Tensor:
    """Make 4,000 pictures, always the same, about 0; float64 [n, channels, height, width]."""
    generator = np.random.default_rng(0)
    canvas = np.empty((_PICTURES, channels, height, width))
    canvas[:] = _colours(generator, channels)
    for _ in range(_LEAVES):
        covered, inside = _leaf(generator, height, width)
        colours = _colours(generator, channels)
        for channel in range(channels):
            canvas[:, channel] += covered * (colours[:, channel] + inside - canvas[:, channel])
    return torch.from_numpy(canvas)


def _colours(generator: np.random.Generator, channels: int) -> Array:
    """Colours, [n, channels, 1, 1]."""
    found = generator.normal(0, 1, (_PICTURES, 1)) + generator.normal(0, _COLOUR, (_PICTURES, channels))
    return found[:, :, None, None]


def _leaf(generator: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    """One leaf for each picture: what share of a pixel it covers, and how its brightness varies; both [n, h, w]."""

    def each(low: float, high: float) -> Array:
        return generator.uniform(low, high, (_PICTURES, 1, 1))

    side = min(height, width)
    ends = (np.array([_LARGEST, _SMALLEST]) * side) ** (1 - _POWER)
    size = each(*ends) ** (1 / (1 - _POWER))
    rows = np.arange(height)[:, None] - each(-_OUTSIDE, height + _OUTSIDE)
    columns = np.arange(width)[None, :] - each(-_OUTSIDE, width + _OUTSIDE)
    along, across = _turned(rows, columns, each(0, np.pi))
    stretch = np.exp(_STRETCH / 2 * generator.standard_normal((_PICTURES, 1, 1)))
    along, across = along / stretch, across * stretch
    ellipse, rectangle = np.hypot(along, across), np.maximum(np.abs(along), np.abs(across))
    reach = np.where(each(0, 1) < 0.5, ellipse, rectangle)
    covered = np.clip(size - reach + 0.5, 0, 1)
    phase, _ = _turned(rows, columns, each(0, np.pi))
    pitch = np.exp(each(np.log(_COARSEST), np.log(_FINEST)))
    stripes = np.abs(generator.normal(0, _STRIPES, (_PICTURES, 1, 1))) * np.sin(pitch * phase + each(0, 2 * np.pi))
    shade = generator.normal(0, _SHADE, (_PICTURES, 1, 1)) * along / np.maximum(size, 1)
    return covered, stripes + shade


def _turned(rows: Array, columns: Array, angle: Array) -> tuple[Array, Array]:
    return np.cos(angle) * columns + np.sin(angle) * rows, np.cos(angle) * rows - np.sin(angle) * columns
