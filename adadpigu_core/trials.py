"""Made-up records and weights, on which a model shows what it does before it sees records of anyone.

What a model does to a batch may depend on the values in it: texts that are all as long stay in their order when they
are sorted by length, the largest of ten thousand uniform numbers is the same for every image, and a gate whose weight
is zero hides everything behind it. So there are several kinds of records, and weights drawn anew.

Left out: mixing that shows itself for yet other values, in larger batches, and at random less often than now and then.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError

_COUNT = 4
_SIZES = (1.0, 0.1, 3.0, 0.3)  # of records beside each other
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
    """Whether a copy of a model gives numbers for each record: what fails or overflows shows nothing.

    Raises:
        ModelError: It does for several together, and not for one.
    """
    together, alone = _outputs(model, (features,)), _outputs(model, list(features.unsqueeze(1)))
    if together is not None and alone is None:
        text = f"{type(model).__name__} takes several records and not one; make it treat each record by itself"
        raise ModelError(text, text)
    return alone is not None and all(bool(torch.isfinite(output).all()) for output in alone)


def _outputs(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor] | None:
    """Outputs of a copy of a model; None if it does not take the batches."""
    copied, device = copy.deepcopy(model), next(model.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return [torch.as_tensor(copied(rows.to(device))) for rows in batches]
    except _NOT_TAKEN:
        return None


def larger(records: Records, count: int) -> Records:
    """Repeat records until there are so many."""
    return records.select([number % len(records) for number in range(count)])


def redrawn(model: nn.Module) -> Iterator[nn.Module]:
    """Copies of a model with other weights and buffers, none of them zero.

    In the first what is positive or negative throughout stays so. In the others all is drawn anew, with one sign and
    with the other; single numbers, which are gates as a rule, are all positive in one and all negative in the other.
    """
    for sign in (0, 1, -1):
        copied = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for values in (*copied.parameters(), *(b for b in copied.buffers() if b.is_floating_point())):
                noise = torch.randn(values.shape, generator=generator).to(values.device)
                size = math.sqrt(len(values) / values.numel()) if values.dim() > 1 and values.numel() else 1.0
                if sign == 0 and (bool((values > 0).all()) or bool((values < 0).all())):
                    values.mul_(torch.exp(noise / 2))
                elif sign == 0 and values.dim() < 2:
                    values.add_(noise.abs() / 2 if not values.requires_grad else noise / 2)
                else:
                    values.copy_((sign or 1) * size * (noise.abs() if values.numel() == 1 else noise))
        yield copied
