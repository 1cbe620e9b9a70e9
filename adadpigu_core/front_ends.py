"""Fixed features that stand between a record and the network: the same function for everyone, with nothing to learn.

A front end is part of the task, like the network: it is named in the model's specification, so that server, client and
policy speak of the same one. It sees one record at a time and no statistic of any data set, so that a record's features
are as private as the record and cost nothing. They are computed once, not in every step.

    raw          the record as it is
    scattering   wavelet scattering of images (`scattering`), each record's features normalised in groups of channels
    scattering-strokes   these of upright pictures, along the axes on which made-up drawings differ (`strokes`), for
                         handwriting and the like
    patches      how patches of a photograph resemble those of made-up photographs, along the axes on which these differ
                 (`patches`)

Left out: features that were trained on anybody's data.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core import patches, principal_axes, scattering, strokes
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError

RAW, SCATTERING, STROKES, PATCHES = "raw", "scattering", "scattering-strokes", "patches"
FEATURES = (RAW, SCATTERING, STROKES, PATCHES)
_LEAST_SIZE = 8
_GROUPS = 9  # of the 81 channels of scattering
_PIECE = 256


def feature_shape(name: str, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the features of a record of some shape.

    Raises:
        ConfigurationError: If the front end does not take this shape.
    """
    if name == RAW:
        return input_shape
    if name == PATCHES:
        if len(input_shape) != 3 or any(size < patches.LEAST_SIZE for size in input_shape[1:]):
            raise ConfigurationError(
                f"features: {name} takes images whose sides are at least {patches.LEAST_SIZE}, not records of shape "
                f"{input_shape}; use raw"
            )
        return (patches.NUM_AXES,)
    stride = scattering.STRIDE
    if len(input_shape) != 3 or any(size < _LEAST_SIZE or size % stride for size in input_shape[1:]):
        raise ConfigurationError(
            f"features: {name} takes images whose sides are multiples of {stride} and at least {_LEAST_SIZE}, "
            f"not records of shape {input_shape}; use raw"
        )
    channels, height, width = input_shape
    maps = scattering.CHANNELS, height // stride, width // stride
    if name == STROKES:
        return (channels * strokes.num_axes(math.prod(maps)),)
    return channels * maps[0], *maps[1:]


def features(name: str, raw: Tensor) -> Tensor:
    """Features of records [n, *input_shape], each a function of that record alone; float32 [n, *feature_shape].

    Scattering features have mean 0 and mean square 1 in each group of channels, whatever a record's contrast, so that
    no setting depends on the data set.
    """
    if name == RAW:
        return raw
    found = torch.empty(len(raw), *feature_shape(name, tuple(raw.shape[1:])), device=raw.device)
    for start in range(0, len(raw), _PIECE):
        found[start : start + _PIECE] = _FRONT_ENDS[name](raw[start : start + _PIECE])
    return found


def _along_strokes(raw: Tensor) -> Tensor:
    by_channel = _scattered(strokes.upright(raw)).reshape(*raw.shape[:2], -1)
    return _axes(*raw.shape[2:]).project(by_channel).flatten(1)


def _scattered(raw: Tensor) -> Tensor:
    return F.group_norm(scattering.scatter(raw), _GROUPS * raw.shape[1], eps=1e-12)


@lru_cache(maxsize=4)
def _axes(height: int, width: int) -> principal_axes.Axes:
    """Axes for one channel of an image of this size."""
    pictures = strokes.upright(strokes.drawings(height, width))
    drawn = _scattered(pictures).flatten(1).numpy()
    return principal_axes.axes(drawn, strokes.num_axes(drawn.shape[1]))


_FRONT_ENDS = {SCATTERING: _scattered, STROKES: _along_strokes, PATCHES: patches.features}


def applied(name: str, records: Records) -> Records:
    """Records with a front end's features in place of their own."""
    return records if name == RAW else Records(features(name, records.features), records.labels)
