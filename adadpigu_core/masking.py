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


def pack(mask: Tensor, group: Tensor | None = None) -> NDArray[np.uint8]:
    """Pack a mask into bits, eight groups a byte.

    Args:
        mask: Bool [d], alike within each group.
        group: Index of the group of each coordinate, int64 [d]; None = every coordinate is its own.
    """
    if group is not None:
        mask = torch.zeros(int(group.max()) + 1, dtype=torch.bool).index_put((group,), mask)
    return np.packbits(mask.numpy())


def fingerprint(mask: Tensor) -> str:
    """Short hash by which both sides refer to a mask."""
    return hashlib.sha256(pack(mask).tobytes()).hexdigest()[:16]


def unpack(bits: NDArray[np.uint8], count: int, group: Tensor | None = None) -> Tensor:
    """Unpack the bits of a mask.

    Args:
        bits: As ``pack`` gave them.
        count: Number of groups, which are the coordinates themselves without ``group``.
        group: As for ``pack``.

    Raises:
        MessageError: If the bits do not hold exactly ``count`` groups, or retain none.
    """
    what = "coordinates" if group is None else "groups"
    if bits.dtype != np.uint8 or bits.shape != (math.ceil(count / 8),):
        text = f"mask: {bits.dtype} {bits.shape} does not hold {count} {what}; expected uint8 ({math.ceil(count / 8)},)"
        raise MessageError(text, text)
    flags = np.unpackbits(bits)
    if flags[count:].any() or not flags.any():
        text = f"mask: must retain between 1 and {count} {what}"
        raise MessageError(text, text)
    mask = torch.from_numpy(flags[:count].astype(bool))
    return mask if group is None else mask[group]
