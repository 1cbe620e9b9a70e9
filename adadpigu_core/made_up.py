"""Public data sets that are made by a formula: tasks in which coordinates are truly unequal.

    wide-table          20,000 and 4,000 records of 1,000 independent columns, 20 of which bear on two classes
    mnist-background    MNIST whose black pixels are noise, scaled to [-1, 1]: all inputs are active, most say nothing

Noise that a private step puts on the weight of an input reaches every prediction in which that input is active. In
tables of measurements most inputs are active, and few may matter; in the usual images inputs without use are zero, and
noise on their weights does no harm. The formulas have a seed of their own, so that everybody has the same records.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDE_TABLE, MNIST_BACKGROUND = "wide-table", "mnist-background"
NAMES = (WIDE_TABLE, MNIST_BACKGROUND)

_TRAIN, _TEST, _COLUMNS, _INFORMATIVE = 20_000, 4_000, 1_000, 20
# The norm of the logit's coefficients: the best possible accuracy is about 84 %.
_STRENGTH = 3.0

Split = tuple[Tensor, Tensor]


def wide_table() -> tuple[Split, Split]:
    """Draw standard normal columns, and classes by a logistic model of the first few of them.

    Returns:
        Training and test split, each features float32 [n, 1000] and labels int64 [n].
    """
    generator = np.random.default_rng(7)
    coefficients = generator.standard_normal(_INFORMATIVE)
    coefficients *= _STRENGTH / np.linalg.norm(coefficients)
    features = generator.standard_normal((_TRAIN + _TEST, _COLUMNS), dtype=np.float32)
    odds = features[:, :_INFORMATIVE] @ coefficients
    labels = (generator.random(len(odds)) < 1 / (1 + np.exp(-odds))).astype(np.int64)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    return (x[:_TRAIN], y[:_TRAIN]), (x[_TRAIN:], y[_TRAIN:])


def with_background(images: Tensor, seed: int) -> Tensor:
    """Put noise, uniform in [0, 1], behind images in [0, 1], and scale to [-1, 1].

    Args:
        images: float32 [n, 1, height, width].
        seed: Of the noise; another one for each split.
    """
    noise: NDArray[np.float32] = np.random.default_rng(seed).random(tuple(images.shape), dtype=np.float32)
    return 2 * torch.maximum(images, torch.from_numpy(noise)) - 1
