"""Handwriting put upright, and the axes along which pen strokes differ, found on drawings that a formula makes.

A picture is first moved so that its ink is centred, and sheared so that it does not lean: a function of that picture
alone, which writers would not notice and which classifiers need not learn.

Its scattering features have 3,969 coordinates for 28 x 28 pixels, and are turned to the axes on which those of made-up
drawings differ (`principal_axes`).

The drawings are random Bezier curves, which know of handwriting that it is made of strokes, and of no data set
anything: they cost no privacy.

Left out: other images. On smooth random fields, the axes are worth nothing for handwriting.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_DRAWINGS = 1000
_CURVES = 3  # a drawing
_POINTS = 24  # a curve
_MARGIN = 5 / 28  # of the side
_PEN = 1.8 / 28
_MOST_SLANT = 1.0  # columns a row
_LEAST_INK, _LEAST_SPREAD = 1e-6, 1e-6  # of a picture that is not blank
_MOST_AXES = 384
_COORDINATES_AN_AXIS = 4  # at least, for small images


def upright(images: Tensor) -> Tensor:
    """Centre the ink of pictures, and shear them until their rows' centres do not drift from top to bottom.

    Ink is what is brighter than a picture's darkest value, which becomes 0 and is what comes in from outside.

    Args:
        images: Floating-point [n, channels, height, width]; all channels move together.

    Returns:
        The same shape and type.
    """
    ink = images - images.amin((1, 2, 3), keepdim=True)
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=images.dtype, device=images.device)[:, None]
    columns = torch.arange(width, dtype=images.dtype, device=images.device)[None, :]
    share = ink.sum(1) / ink.sum((1, 2, 3)).clamp(min=_LEAST_INK)[:, None, None]
    row, column = ((share * place).sum((1, 2), keepdim=True) for place in (rows, columns))
    spread = (share * (rows - row) ** 2).sum((1, 2), keepdim=True)
    drift = (share * (rows - row) * (columns - column)).sum((1, 2), keepdim=True)
    slant = (drift / spread.clamp(min=_LEAST_SPREAD)).clamp(-_MOST_SLANT, _MOST_SLANT)
    below, beside = rows - (height - 1) / 2, columns - (width - 1) / 2
    across = column + beside + slant * below
    source = torch.stack([across, (row + below).expand_as(across)], -1)
    size = source.new_tensor([width - 1, height - 1])
    return F.grid_sample(ink, 2 * source / size - 1, align_corners=True)


def num_axes(num_features: int) -> int:
    """How many axes are kept of so many coordinates."""
    return min(_MOST_AXES, num_features // _COORDINATES_AN_AXIS)


def drawings(height: int, width: int) -> Tensor:
    """Draw pictures in [0, 1], float64 [n, 1, height, width], always the same."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(_MARGIN, 1 - _MARGIN, size=(_DRAWINGS, _CURVES, 4, 2)) * (height, width)
    t = np.linspace(0, 1, _POINTS)
    bezier = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])  # [4, points]
    points = np.einsum("kp,nckd->ncpd", bezier, corners).reshape(_DRAWINGS, -1, 2)
    pen = max(1.0, _PEN * min(height, width))
    pictures = np.zeros((_DRAWINGS, height, width))
    for point in range(points.shape[1]):
        rows = np.arange(height)[None, :, None] - points[:, point, 0, None, None]
        columns = np.arange(width)[None, None, :] - points[:, point, 1, None, None]
        np.maximum(pictures, np.clip(pen - np.sqrt(rows**2 + columns**2), 0, 1), out=pictures)
    return torch.from_numpy(pictures[:, None])
