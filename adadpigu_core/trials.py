"""Made-up records and weights, on which a model shows what it does before it sees records of anyone.

What a model does to a batch may depend on the values in it: texts that are all as long stay in their order when they
are sorted by length, the largest of ten thousand uniform numbers is the same for every image, and a gate whose weight
is zero hides everything behind it. So there are several kinds of records, and weights drawn anew.

Left out: mixing that shows itself for yet other values, and at random less often than now and then.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adadpigu_core.datasets import Records

_COUNT = 4
_SIZES = (1.0, 0.01, 30.0, 0.3)  # of records beside each other
_LENGTHS = (0.5, 0.25, 1.0, 0.125)  # in no order, so that sorting moves them
_TOKENS = 4  # a vocabulary that every model with one has
_NOT_TAKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, AssertionError)


def made_up(input_shape: tuple[int, ...], num_classes: int, count: int = _COUNT) -> Records:
    """Draw records with features from 0 to 1, which every model takes.

    Args:
        input_shape: Shape of the features of one record.
        num_classes: Labels are 0 ... num_classes - 1.
        count: How many.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(count, *input_shape, generator=generator)
    return Records(features, torch.randint(num_classes, (count,), generator=generator))


def kinds(model: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> Iterator[Records]:
    """Give four records of each kind that a model takes.

    The first are from 0 to 1; then of both signs and unlike sizes; then rows of small whole numbers, as tokens of texts
    are, with more or fewer zeros behind them.
    """
    plain = made_up(input_shape, num_classes)
    yield plain
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor(_SIZES).view(-1, *[1] * len(input_shape))
    length = math.prod(input_shape)
    ends = torch.tensor([max(1, round(share * length)) for share in _LENGTHS])
    tokens = torch.randint(1, _TOKENS, (_COUNT, length), generator=generator)
    tokens = tokens.masked_fill(torch.arange(length) >= ends.unsqueeze(1), 0)
    for features in (sizes * torch.randn(_COUNT, *input_shape, generator=generator), tokens.view_as(plain.features)):
        if _takes(model, features.float()):
            yield Records(features.float(), plain.labels)


def _takes(model: nn.Module, features: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = [model(rows.to(next(model.parameters()).device)) for rows in (features, features[:1])]
    except _NOT_TAKEN:
        return False
    return all(bool(torch.isfinite(output).all()) for output in outputs)


def redrawn(model: nn.Module) -> nn.Module:
    """Copy a model and draw its trainable weights anew, so that none of them is zero and layers keep their sizes."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.dim() > 1:
                parameter.copy_(noise * math.sqrt(len(parameter) / parameter.numel()))
            else:
                parameter.add_(noise / 2)
    return copied
