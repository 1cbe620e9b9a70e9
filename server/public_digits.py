"""Weights to start from that cost no privacy: trained in seconds on the public digits that come with scikit-learn.

1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998) are enlarged to the size of a task's images, put in
the middle of a black border as MNIST's are, turned, stretched, slanted and shifted a little at random, and learnt by
Adam without any noise. They are other people's handwriting than MNIST's, and public: a network that has seen them is
right for four MNIST images of five before it has seen a client.

Left out: tasks of other classes or colours, and front ends, whose features of ever new views take too long.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core import front_ends
from adadpigu_core.configuration import PUBLIC_DIGITS
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import flatten

_CLASSES = 10
_INK = 20 / 28  # of a side: the rest is the border
_CONTRAST = 2.0  # enlarging blurs what a pen does not
# How far a view goes at most: radians, logarithm of the size, columns a row, share of half a side.
_TURN, _STRETCH, _SLANT, _SHIFT = 0.35, 0.3, 0.5, 1 / 7
_EPOCHS, _BATCH, _RATE = 15, 64, 2e-3


def check(spec: ModelSpec) -> None:
    """Refuse a task that digits do not fit.

    Raises:
        ConfigurationError: If they do not.
    """
    fits = len(spec.input_shape) == 3 and spec.input_shape[0] == 1 and spec.num_classes == _CLASSES
    if not fits or spec.features != front_ends.RAW:
        raise ConfigurationError(
            f"task.weights: {PUBLIC_DIGITS} is for raw images of one channel and {_CLASSES} classes, not for "
            f"{spec.features} records of shape {spec.input_shape} and {spec.num_classes} classes; name a file, or "
            "leave it empty"
        )


@lru_cache(maxsize=16)
def trained(spec: ModelSpec, seed: int) -> Tensor:
    """Trainable weights of a network after training on the digits, float32 [d]: always the same for a seed.

    Raises:
        ConfigurationError: If digits do not fit the task.
    """
    check(spec)
    model = build(spec, seed=seed).train()
    images, labels = enlarged(*spec.input_shape[1:])
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1 / _EPOCHS, _EPOCHS - 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _ in range(_EPOCHS):
            for chosen in torch.split(torch.randperm(len(labels)), _BATCH):
                optimiser.zero_grad()
                loss = F.cross_entropy(model(_views(images[chosen])), labels[chosen])
                torch.autograd.backward(loss)
                optimiser.step()
            decay.step()
    return flatten(model)


def enlarged(height: int, width: int) -> tuple[Tensor, Tensor]:
    """All digits as images, float32 [1797, 1, height, width] from 0 to 1, and their labels, int64 [1797]."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes two seconds

    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    inner = [max(1, round(_INK * side)) for side in (height, width)]
    ink = F.interpolate(small, size=inner, mode="bilinear", align_corners=False)
    above, before = (height - inner[0]) // 2, (width - inner[1]) // 2
    border = (before, width - inner[1] - before, above, height - inner[0] - above)
    return F.pad(ink, border), torch.tensor(labels, dtype=torch.int64)


def _views(images: Tensor) -> Tensor:
    """One random view of each image, from torch's default generator."""
    n = len(images)
    turn, slant, down, right = (reach * _uniform(n) for reach in (_TURN, _SLANT, _SHIFT, _SHIFT))
    tall, wide = (torch.exp(_STRETCH * _uniform(n)) for _ in range(2))
    rows = [torch.stack([turn.cos() / wide, (slant - turn.sin()) / wide, right], 1)]
    rows.append(torch.stack([turn.sin() / tall, turn.cos() / tall, down], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False)
    return ((seen - 0.5) * _CONTRAST + 0.5).clamp(0, 1)


def _uniform(count: int) -> Tensor:
    return 2 * torch.rand(count) - 1
