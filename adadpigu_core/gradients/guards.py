"""Guards against weights and models under which clipping does not bound what a record contributes.

A clipped sum has sensitivity C only if a record's gradient does not depend on the records that are computed beside it.
In exact arithmetic it does not; in float32 its last bits do, since kernels sum in an order that depends on the size of
a batch. A server that sends chaotic weights, or a mask and a scale that leave nothing but last bits, can blow these
bits up until other records' contributions move by more than the noise hides.

So before anything is charged, the mean is compared with the clipping norm, and the standardised gradients of made-up
records are computed twice: with the weights as they are, and with weights that differ in their last bits. If the two
point in different directions, the request is refused. This is a test by samples and not a proof; one record at a time
would be one, and cost many times the training.

In bfloat16 a last bit is 65,000 times larger. There a record's gradient has to be the same whatever is computed beside
it, which the kernels of a device keep or not; made-up batches of several sizes show it beforehand.
"""

import copy
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError, MessageError, ModelError
from adadpigu_core.gradients.clipping import DEFAULTS, ClippedSum, GradientOptions, Loss, losses_of
from adadpigu_core.gradients.engine import clipped_sum
from adadpigu_core.models import check_isolation, check_private
from adadpigu_core.parameters import ParameterLayout
from adadpigu_core.sampling import seeded
from adadpigu_core.trials import kinds, larger, made_up, redrawn

_SEEDS = 8  # of a model's random draws
_BATCHES = (12, 130)  # more than 8, and than 128, from which on a model may do something else
# Of the losses of records beside each other.
_SIZES = (1.0, 1e3, 1e-3, 30.0)
_FIRST, _OTHERS = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 30.0, 300.0])
_PROBES = 3
_LAST_BITS = 2.0**-22  # relative to a weight: four times its rounding error
_LARGEST_MEANS = 1e5  # clipping norms, over all records; in runs that learn it is some hundreds
_LARGEST_DISAGREEMENT = 1e-4  # networks in ordinary training are at 1e-6, chaotic ones above 1e-3
_TOLERANCE = 1e-3
_FLOAT32 = 1e-5  # of what was added and taken off again
_NEIGHBOURS = (1, 7, 32)  # kernels change with the size of a batch
_LARGEST_CHANGE = 1e-4  # of the largest gradient: float32 is at 1e-6, a bit of bfloat16 at 1e-3


def check_rounding(
    model: nn.Module,
    loss: Loss,
    input_shape: tuple[int, ...],
    num_classes: int,
    clipping_norm: float,
    num_records: int,
    standardisation: Standardisation,
) -> None:
    """Refuse a model, mean, mask and scale under which gradients are made of rounding errors.

    Args:
        model: Current weights.
        loss: Losses of records.
        input_shape: Shape of the features of one record.
        num_classes: Labels are 0 ... num_classes - 1.
        clipping_norm: C.
        num_records: Of the data set.
        standardisation: Mask, mean and scale, each [d].

    Raises:
        MessageError: If the mean is far longer than C, or if the gradients of most made-up records change with the last
            bits of the weights.
    """
    # Records whose gradients are all but the mean are not clipped. The last bits of each change with the size of a
    # batch, by 3e-8 of the mean, and those of alike records all in one direction: by 0.003 C at most.
    mean = (standardisation.mean / standardisation.scale)[standardisation.mask]
    length = float(torch.linalg.vector_norm(mean, dtype=torch.float64)) / clipping_norm
    most = _LARGEST_MEANS / num_records
    if not length <= most:
        text = (
            f"gradient-mean: over the scale it is {length:.3g} times as long as the clipping norm, and for "
            f"{num_records} records {most:.3g} is the most; nothing is released. Train without adaptive-clipping.centre"
        )
        raise MessageError(text, text)
    if disagreement(model, loss, input_shape, num_classes, standardisation) > _LARGEST_DISAGREEMENT:
        text = "weights: under these weights, mask and scale gradients consist of rounding errors; nothing is released"
        raise MessageError(text, text)


def disagreement(
    model: nn.Module, loss: Loss, input_shape: tuple[int, ...], num_classes: int, standardisation: Standardisation
) -> float:
    """Median distance of the directions of gradients under weights that differ in their last bits; at most 2."""
    generator = torch.Generator().manual_seed(0)
    records = made_up(input_shape, num_classes, _PROBES)
    nearby = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearby.parameters():
            signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + _LAST_BITS * signs.to(parameter.device))
    change = _directions(model, loss, records, standardisation) - _directions(nearby, loss, records, standardisation)
    # a single kink of an activation may flip honestly: most probes decide
    return float(torch.linalg.vector_norm(change, dim=1).median())


def check_model(model: nn.Module, loss: Loss, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse a model whose records cannot be told apart, forwards or backwards, on copies of it.

    Privacy: a model that mixes records, or a rule that is wrong for it, would break the bound silently. On made-up
    records of several kinds, under the model's weights and under others, no output may depend on other records, and
    the engine's gradients must be ordinary ones, in sum and record by record.

    Args:
        model: Any model.
        loss: Losses of records.
        input_shape: Shape of the features of one record.
        num_classes: Labels are 0 ... num_classes - 1.

    Raises:
        ModelError: Records are mixed, gradients differ, or the engine has to refuse the model.
    """
    check_private(model)
    tried = list(kinds(model, input_shape, num_classes))
    if not tried:
        text = f"{type(model).__name__} takes no made-up records; make it give numbers for every record"
        raise ModelError(text, text)
    check_isolation(model, tried[0].features, seeds=_SEEDS)
    for count in _BATCHES:
        check_isolation(model, larger(tried[0], count).features)
    _try(model, loss, tried)
    for other in redrawn(model):
        _try(other, loss, kinds(other, input_shape, num_classes))


def _try(model: nn.Module, loss: Loss, several: Iterable[Records]) -> None:
    for records in several:
        check_isolation(model, records.features)
        _check_gradients(model, loss, records)
        _check_training(model, loss, records)


def check_outputs(model: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Of `check_model` only what needs no gradients, and under the model's present weights and buffers only."""
    for records in kinds(model, input_shape, num_classes):
        check_isolation(model, records.features)


def _check_gradients(model: nn.Module, loss: Loss, records: Records) -> None:
    """Compare gradients of losses of very unlike size, by which what is done to those of a whole batch shows itself."""
    copied = copy.deepcopy(model).eval()  # without dropout, so that two passes agree
    alone = [_gradient(copied, _times(loss, size), records.select([i])) for i, size in enumerate(_SIZES)]
    expected, sizes = torch.stack(alone), torch.tensor(_SIZES)
    found, norms = _clipped(copied, loss, records, sizes), expected.double().norm(dim=1) / sizes
    if (
        not bool(torch.isfinite(expected).all())
        or (found.total - expected.sum(0)).norm() > _TOLERANCE * expected.norm()
        or not torch.allclose(found.norms / sizes, norms, rtol=_TOLERANCE, atol=_TOLERANCE * float(norms.norm()))
    ):
        _refuse(model)


def _check_training(model: nn.Module, loss: Loss, records: Records) -> None:
    """In training mode the gradients of two records must add up with those of others, however large these are."""
    copied = copy.deepcopy(model).train()
    first, others, both = (
        _clipped(copied, loss, records, sizes).total for sizes in (_FIRST, _OTHERS, _FIRST + _OTHERS)
    )
    allowed = _TOLERANCE * first.norm() + _FLOAT32 * others.norm()
    if not bool((both - first - others).norm() <= allowed):
        _refuse(model)


def _clipped(model: nn.Module, loss: Loss, records: Records, sizes: Tensor) -> ClippedSum:
    """Sum and norms with losses of some sizes, [n], always with the same random draws."""

    def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
        return loss(outputs, labels) * sizes.to(outputs.device)

    identity = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    with seeded(0, next(model.parameters()).device):
        return clipped_sum(model, weighted, records, identity, float("inf"))


def _refuse(model: nn.Module) -> NoReturn:
    text = (
        f"the gradients of records in {type(model).__name__} do not add up to ordinary ones: leave out layers and "
        "losses that mix records, and uses of parameters that torch does not show"
    )
    raise ModelError(text, text)


def _times(loss: Loss, size: float) -> Loss:
    return lambda outputs, labels: loss(outputs, labels) * size


def check_precision(
    model: nn.Module, loss: Loss, input_shape: tuple[int, ...], num_classes: int, options: GradientOptions
) -> None:
    """Refuse a precision in which one more record changes what others contribute; float32 needs no look.

    Raises:
        ConfigurationError: The precision does not keep records apart on this device.
    """
    if options.precision == DEFAULTS.precision:
        return
    model = copy.deepcopy(model).eval()  # without dropout, so that passes agree
    records = made_up(input_shape, num_classes, max(_NEIGHBOURS) + 1)
    identity = Standardisation.identity(ParameterLayout.of(model).num_parameters)

    def total(start: int, stop: int) -> Tensor:
        chosen = records.select(list(range(start, stop)))
        return clipped_sum(model, loss, chosen, identity, float("inf"), options=options).total.double()

    for count in _NEIGHBOURS:
        alone = total(count, count + 1)
        change = total(0, count + 1) - total(0, count) - alone
        if not change.norm() <= _LARGEST_CHANGE * alone.norm():
            text = (
                f"precision: in {options.precision} the gradient of a record depends on what is computed beside it, on "
                "this device; use float32"
            )
            raise ConfigurationError(text, text)


def _directions(model: nn.Module, loss: Loss, records: Records, given: Standardisation) -> Tensor:
    """Unit standardised gradients, float64 [n, d]; zero where a gradient is zero or not finite."""
    rows = []
    for number in range(len(records)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)
            gradient = _gradient(model, loss, records.select([number]))
        rows.append(torch.where(given.mask, (gradient - given.mean) / given.scale, 0.0).double())
    standardised = torch.stack(rows)
    norms = torch.linalg.vector_norm(standardised, dim=1, keepdim=True)
    usable = torch.isfinite(norms) & (norms > 0)
    return torch.where(usable, standardised / torch.where(usable, norms, 1.0), 0.0)


def _gradient(model: nn.Module, loss: Loss, record: Records) -> Tensor:
    """The ordinary gradient of one record, float32 [d]."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    with torch.enable_grad():
        value = losses_of(loss, model(record.features.to(device)), record.labels.to(device)).sum()
        found = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
    pairs = zip(parameters, found or [None] * len(parameters), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]).cpu()
