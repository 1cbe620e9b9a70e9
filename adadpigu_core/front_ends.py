"""Fixed features that stand between a record and the network: the same function for everyone, with nothing to learn.

A front end is part of the task, like the network: it is named in the model's specification, so that server, client and
policy speak of the same one. It sees one record at a time and no statistic of any data set, so that a record's features
are as private as the record and cost nothing. They are computed once, not in every step.

    raw          the record as it is
    scattering   wavelet scattering of images (`scattering`), each record's features normalised in groups of channels

Left out: features that were trained on anything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core import scattering
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError

RAW, SCATTERING = "raw", "scattering"
FEATURES = (RAW, SCATTERING)
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
    stride = scattering.STRIDE
    if len(input_shape) != 3 or any(size < _LEAST_SIZE or size % stride for size in input_shape[1:]):
        raise ConfigurationError(
            f"features: scattering takes images whose sides are multiples of {stride} and at least {_LEAST_SIZE}, "
            f"not records of shape {input_shape}; use raw"
        )
    channels, height, width = input_shape
    return channels * scattering.CHANNELS, height // stride, width // stride


def features(name: str, raw: Tensor) -> Tensor:
    """Features of records [n, *input_shape], each a function of that record alone; float32 [n, *feature_shape].

    A record's features have mean 0 and mean square 1 in each group of channels, whatever its contrast, so that no
    setting depends on the data set.
    """
    if name == RAW:
        return raw
    shape = feature_shape(name, tuple(raw.shape[1:]))
    found = torch.empty(len(raw), *shape, device=raw.device)
    for start in range(0, len(raw), _PIECE):
        piece = scattering.scatter(raw[start : start + _PIECE])
        found[start : start + _PIECE] = F.group_norm(piece, _GROUPS * raw.shape[1], eps=1e-12)
    return found


def applied(name: str, records: Records) -> Records:
    """Records with a front end's features in place of their own."""
    return records if name == RAW else Records(features(name, records.features), records.labels)
