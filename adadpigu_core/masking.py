"""Masks that grow: progressive unfreezing.

A ranking and a retention ratio r(t) give the mask of a round: the first round(r d) coordinates of the ranking. The
ratio never decreases, so that the masks of one ranking are nested; where coordinates are ranked anew during training,
one that was retained may be left out later, and come back. What is ranked may be groups of coordinates, which are
retained as a whole.
"""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core.exceptions import ConfigurationError, MessageError

SCHEDULES = ("constant", "linear", "cosine", "step")
NUM_STEPS = 5
RETAINED_AS = ("coordinate", "row", "column", "layer")


def retention_ratio(schedule: str, initial: float, final: float, progress: float) -> float:
    """Share of coordinates that are retained.

    Args:
        schedule: ``constant`` (initial, always), ``linear``, ``cosine`` (slow at both ends) or ``step`` (equal jumps).
        initial: Ratio at progress 0, in (0, 1].
        final: Ratio at progress 1, at least ``initial``.
        progress: Share of the unfreezing period that has passed; values above 1 count as 1.

    Returns:
        A ratio that does not decrease with progress.

    Raises:
        ConfigurationError: For an unknown schedule or a ratio that would shrink.
    """
    if not 0 < initial <= final <= 1:
        raise ConfigurationError(f"retention: need 0 < initial-ratio <= final-ratio <= 1, got {initial} and {final}")
    time = min(max(progress, 0.0), 1.0)
    shapes = {
        "constant": 0.0,
        "linear": time,
        "cosine": (1 - math.cos(math.pi * time)) / 2,
        "step": math.floor(time * NUM_STEPS + 1e-9) / NUM_STEPS,
    }
    if schedule not in shapes:
        raise ConfigurationError(f"retention.schedule: unknown value {schedule!r}; use one of {', '.join(SCHEDULES)}")
    return initial + (final - initial) * shapes[schedule]


def mask_of(ranking: Tensor, ratio: float, group: Tensor | None = None) -> Tensor:
    """Retain the head of a ranking: at most round(ratio d) coordinates, but at least one group.

    Args:
        ranking: Permutation of the groups, int64 [G].
        ratio: Share of the coordinates, in (0, 1].
        group: Index of the group of each coordinate, int64 [d]; None = every coordinate is its own.

    Returns:
        Mask, bool [d], True = retained.
    """
    most = len(ranking) if group is None else len(group)
    count = max(1, round(ratio * most))
    if group is not None:
        sizes = torch.bincount(group, minlength=len(ranking))[ranking]
        count = max(1, int((sizes.cumsum(0) <= count).sum()))
    mask = torch.zeros(len(ranking), dtype=torch.bool)
    mask[ranking[:count]] = True
    return mask if group is None else mask[group]


def pack(mask: Tensor) -> NDArray[np.uint8]:
    """Pack a mask into bits, eight coordinates a byte."""
    return np.packbits(mask.numpy())


def fingerprint(mask: Tensor) -> str:
    """Short hash by which both sides refer to a mask."""
    return hashlib.sha256(pack(mask).tobytes()).hexdigest()[:16]


def unpack(bits: NDArray[np.uint8], num_parameters: int) -> Tensor:
    """Unpack the bits of a mask.

    Raises:
        MessageError: If the bits do not hold exactly ``num_parameters`` coordinates, or retain none.
    """
    if bits.dtype != np.uint8 or bits.shape != (math.ceil(num_parameters / 8),):
        text = (
            f"mask: {bits.dtype} {bits.shape} does not hold {num_parameters} coordinates; "
            f"expected uint8 ({math.ceil(num_parameters / 8)},)"
        )
        raise MessageError(text, text)
    flags = np.unpackbits(bits)
    if flags[num_parameters:].any() or not flags.any():
        text = f"mask: must retain between 1 and {num_parameters} coordinates"
        raise MessageError(text, text)
    return torch.from_numpy(flags[:num_parameters].astype(bool))
