"""A guard against weights that turn rounding into a leak.

A clipped sum has sensitivity C only if a record's gradient does not depend on the records that are computed beside it.
In exact arithmetic it does not; in float32 its last bits do, since kernels sum in an order that depends on the size of
a batch. A server that sends chaotic weights, or a mask and a scale that leave nothing but last bits, can blow these
bits up until other records' contributions move by more than the noise hides.

So before anything is charged, the standardised gradients of made-up records, which are public, are computed twice: with
the weights as they are, and with weights that differ in their last bits. If the two point in different directions, the
request is refused. This is a test by samples and not a proof; one record at a time would be one, and cost many times
the training.
"""

import copy

import torch
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import MessageError
from adadpigu_core.gradients.clipping import Loss
from adadpigu_core.gradients.simple import record_gradients, standardise

_PROBES = 3
_LAST_BITS = 2.0**-22  # relative to a weight: four times its rounding error
_LARGEST_DISAGREEMENT = 1e-4  # networks in ordinary training are at 1e-6, chaotic ones above 1e-3


def check_rounding(
    model: nn.Module, loss: Loss, input_shape: tuple[int, ...], num_classes: int, standardisation: Standardisation
) -> None:
    """Refuse a model, mask and scale under which gradients are made of rounding errors.

    Args:
        model: Current weights.
        loss: Loss of one record.
        input_shape: Shape of the features of one record.
        num_classes: Labels are 0 ... num_classes - 1.
        standardisation: Mask, mean and scale, each [d].

    Raises:
        MessageError: If the gradients of most made-up records change with the last bits of the weights.
    """
    if disagreement(model, loss, input_shape, num_classes, standardisation) > _LARGEST_DISAGREEMENT:
        text = "weights: under these weights, mask and scale gradients consist of rounding errors; nothing is released"
        raise MessageError(text, text)


def disagreement(
    model: nn.Module, loss: Loss, input_shape: tuple[int, ...], num_classes: int, standardisation: Standardisation
) -> float:
    """Median distance of the directions of gradients under weights that differ in their last bits; at most 2."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(_PROBES, *input_shape, generator=generator)
    labels = torch.randint(num_classes, (_PROBES,), generator=generator)
    records = Records(features, labels)
    nearby = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearby.parameters():
            signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + _LAST_BITS * signs)
    change = _directions(model, loss, records, standardisation) - _directions(nearby, loss, records, standardisation)
    # a single kink of an activation may flip honestly: most probes decide
    return float(torch.linalg.vector_norm(change, dim=1).median())


def _directions(model: nn.Module, loss: Loss, records: Records, standardisation: Standardisation) -> Tensor:
    """Unit standardised gradients, float64 [n, d]; zero where a gradient is zero or not finite."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        standardised = standardise(record_gradients(model, loss)(records), standardisation).double()
    norms = torch.linalg.vector_norm(standardised, dim=1, keepdim=True)
    usable = torch.isfinite(norms) & (norms > 0)
    return torch.where(usable, standardised / torch.where(usable, norms, 1.0), 0.0)
