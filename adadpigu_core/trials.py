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
_SIZES = (1.0, 0.01, 3.0, 0.3)  # of records beside each other
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
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor(_SIZES).view(-1, *[1] * len(input_shape))
    length = math.prod(input_shape)
    ends = torch.tensor([max(1, round(share * length)) for share in _LENGTHS])
    tokens = torch.randint(1, _TOKENS, (_COUNT, length), generator=generator)
    tokens = tokens.masked_fill(torch.arange(length) >= ends.unsqueeze(1), 0)
    signed = sizes * torch.randn(_COUNT, *input_shape, generator=generator)
    for features in (plain.features, signed, tokens.view_as(signed).float()):
        if _takes(model, features):
            yield Records(features, plain.labels)


def _takes(model: nn.Module, features: Tensor) -> bool:
    """Whether a copy of a model gives a number for each record alone: what fails or overflows shows nothing."""
    copied, device = copy.deepcopy(model), next(model.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = [copied(row.to(device)) for row in features.unsqueeze(1)]
    except _NOT_TAKEN:
        return False
    return all(isinstance(output, Tensor) and bool(torch.isfinite(output).all()) for output in outputs)


def redrawn(model: nn.Module) -> nn.Module:
    """Copy a model with other weights and buffers, none of them zero; what is positive throughout stays so."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in (*copied.parameters(), *(b for b in copied.buffers() if b.is_floating_point())):
            noise = torch.randn(values.shape, generator=generator).to(values.device)
            if bool((values > 0).all()) or bool((values < 0).all()):
                values.mul_(torch.exp(noise / 2))
            elif not values.requires_grad:
                values.add_(noise.abs() / 2)
            elif values.dim() > 1:
                values.copy_(noise * math.sqrt(len(values) / values.numel()))
            else:
                values.add_(noise / 2)
    return copied
