"""What the gradients of a parameter follow from: inputs and output gradients of the layers that use it.

A ``Use`` knows what the engine wants of the gradients g_i of n records, and needs not all of them at once: the
gradients of a few records and, where a layer has a short cut, their weighted squared norms and their weighted sum.

With K augmented views a record has K rows in every activation; its gradient is the sum over them, so that views are
nothing but further positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adadpigu_core.gradients.transform import Block, Part

UNIT = 2.0**-24  # rounding error of float32
_CACHED_FLOATS = 250_000  # 1 MB
_LONGEST_RUN = 120  # torch adds up long rows in shorter runs, and then their sums
_MOST_CANCELLATION = 5.0  # terms over their sum
_LARGEST_SHIFT, _TINY = 120, 2.0**-40  # of the exponents of float32, which end at 127, and its numbers, at 2^-126
UNDERFLOW = 2.0**-124  # what squares of numbers too small for float32 lose, each at most


@dataclass(frozen=True)
class Factors:
    """Clipping factors c_i of n records.

    Args:
        values: Float32 [n]; zero for records that do not count.
        broken: Bool [n], records with values that are not finite, which zero times anything would not remove; None if
            there are none.
    """

    values: Tensor
    broken: Tensor | None

    def apply(self, tensor: Tensor) -> Tensor:
        """Multiply the records of [n, ...] by their factors."""
        return self.clean(tensor * self.values.view(-1, *[1] * (tensor.dim() - 1)))

    def of(self, start: int, stop: int) -> "Factors":
        """Those of some records."""
        return Factors(self.values[start:stop], None if self.broken is None else self.broken[start:stop])

    def clean(self, tensor: Tensor) -> Tensor:
        """Replace the records of [n, ...] that do not count by zeros."""
        if self.broken is None:
            return tensor
        return tensor.masked_fill(self.broken.view(-1, *[1] * (tensor.dim() - 1)), 0.0)


@dataclass(frozen=True)
class SquaredNorms:
    """Squared standardised norms of n records, without the part of coordinates that have no gradient.

    Args:
        values: Float64 [n].
        doubt: Bound of how far below the true values they may be, float64 [n] or one number.
    """

    values: Tensor
    doubt: Tensor | float = 0.0


class Use(ABC):
    """One use of a parameter by n records.

    A use may have an order of its own for the coordinates of a gradient, the one in which its kernels write them.
    """

    num_records: int
    positions: int
    """How many products are added up for one coordinate."""
    held: int
    """Floats a record that are held until the sum is made."""

    @abstractmethod
    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records, float32 [stop - start, P], in the use's own order."""

    def write_gradients(self, start: int, stop: int, target: Tensor) -> None:
        """Write gradients of some records to ``target``, float32 [stop - start, P], in the use's own order."""
        target.copy_(self.gradients(start, stop))

    def restricted(self, part: Part) -> "Use | None":
        """The same use of some rows and columns of the parameter only, if that is less work."""
        return None

    @abstractmethod
    def forget(self) -> None:
        """Let go of what gradients are made from, once they are kept elsewhere."""

    def arranged(self, values: Tensor) -> Tensor:
        """Put values of a parameter, [*shape], into the own order, [P]."""
        return values.flatten()

    def restored(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bring [..., P] in the own order back to [..., *shape]."""
        return values.reshape((*values.shape[:-1], *shape))

    def chunk(self, size: int, times: int) -> int:
        """How many gradients of P numbers to make at a time: so many times what stays inside a CPU's cache."""
        return max(1, times * _CACHED_FLOATS // size)


class ShortCut(Use):
    """A use that has, for some blocks, a cheaper way to norms and sum than through ``gradients``."""

    @abstractmethod
    def squared_norms(self, block: Block) -> SquaredNorms | None:
        """Norms by the short cut; None if there is none for this block."""

    @abstractmethod
    def add_weighted_sum(self, factors: Factors, total: Tensor) -> None:
        """Add the sum of c_i g_i to ``total``, float32 or float64 [*shape], computed as precisely as that is."""


class Dense(Use):
    """Gradients that are there already, such as those of biases.

    Args:
        values: Float32 [n, *shape].
    """

    positions = 1

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.num_records = len(values)
        self.held = values[:1].numel()

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records."""
        return self.values[start:stop].reshape(stop - start, -1)

    def forget(self) -> None:
        """Let go of the gradients as they were."""
        self.values = self.values.new_empty(0)


class Product(ShortCut):
    """A matrix W [O, I] that is applied to T positions of a record: g = sum_t e_t x_t^T.

    For one position and V^2 = w, the squared norm is

        (e^2)^T w (x^2) - 2 e^T (w a) x + sum(w a^2),

    three matrix products for all records together. Rounding errors of float32 products of length L, which are then
    added up in runs of at most R, are at most (L + R + 8) 2^-24 times the sum of the absolute terms, which is at most
    twice the first term plus the last: this is the doubt. Where nearly everything cancels, the gradient of the record
    is made after all.

    Args:
        inputs: x, float32 [n, T, I].
        errors: Gradients of the outputs e, float32 [n, T, O].
    """

    def __init__(self, inputs: Tensor, errors: Tensor) -> None:
        self.inputs = inputs
        self.errors = errors
        self.num_records, self.positions = inputs.shape[:2]
        self.held = inputs[:1].numel() + errors[:1].numel()

    def forget(self) -> None:
        """Let go of inputs and output gradients."""
        self.inputs = self.errors = self.inputs.new_empty(0)

    def restricted(self, part: Part) -> "Product":
        """Some outputs and some inputs."""
        errors = self.errors if part.rows is None else self.errors.index_select(2, part.rows)
        inputs = self.inputs if part.columns is None else self.inputs.index_select(2, part.columns)
        return type(self)(inputs, errors)

    @staticmethod
    def joined(uses: "Sequence[Product]") -> "Product":
        """Several uses of one matrix are one use at more positions."""
        return Product(torch.cat([use.inputs for use in uses], 1), torch.cat([use.errors for use in uses], 1))

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records."""
        return torch.bmm(self.errors[start:stop].transpose(1, 2), self.inputs[start:stop]).flatten(1)

    def write_gradients(self, start: int, stop: int, target: Tensor) -> None:
        """Write gradients of some records to where they are kept, without a copy."""
        errors, inputs = self.errors[start:stop].transpose(1, 2), self.inputs[start:stop]
        torch.bmm(errors, inputs, out=target.view(stop - start, errors.shape[1], inputs.shape[2]))

    def add_weighted_sum(self, factors: Factors, total: Tensor) -> None:
        """Add the sum of c_i g_i as one product."""
        inputs, errors = _balanced(*(values.to(total.dtype) for values in (self.inputs, self.errors)))
        if inputs.shape[2] < errors.shape[2]:
            inputs, errors = factors.apply(inputs), factors.clean(errors)
        else:
            inputs, errors = factors.clean(inputs), factors.apply(errors)
        total.view(errors.shape[2], -1).addmm_(errors.flatten(0, 1).t(), inputs.flatten(0, 1))

    def squared_norms(self, block: Block) -> SquaredNorms | None:
        """The short cut for one position; for more, a gradient costs no more than the product it replaces.

        With a mean some records have to be corrected. An accelerator's host would have to wait to know which.
        """
        if self.inputs.shape[1] != 1 or (block.mean is not None and self.inputs.device.type != "cpu"):
            return None
        (e, e_size), (x, x_size) = _normalised(self.errors[:, 0]), _normalised(self.inputs[:, 0])
        size = (e_size * x_size).square()
        lost = size * block.underflow
        if block.common_weight is not None:
            return SquaredNorms(size * block.common_weight * _squares(e) * _squares(x), lost)
        shorter, longer = sorted((e.shape[1], x.shape[1]))
        rounding = (shorter + min(longer, _LONGEST_RUN) + 8) * UNIT
        if block.mean is None:
            first = size * _bilinear(e.square(), x.square(), block.inverse_scale, None)
            return SquaredNorms(first, rounding * first + lost)
        cross = size.sqrt() * _bilinear(e, x, block.inverse_scale, block.mean)
        first = size * _bilinear(e.square(), x.square(), block.inverse_scale, None)
        absolute = first + block.offset
        values = absolute - 2 * cross
        doubt = 2 * rounding * absolute + lost
        self._correct(values, doubt, ~(absolute <= _MOST_CANCELLATION * values), block)
        return SquaredNorms(values, doubt)

    def _correct(self, values: Tensor, doubt: Tensor, wrong: Tensor, block: Block) -> None:
        """Make the gradients of records of which the mean takes nearly all away."""
        assert block.mean is not None  # noqa: S101  # nothing cancels without one
        for record in wrong.nonzero().flatten().tolist():
            gradient = self.gradients(record, record + 1).view_as(block.mean)
            values[record] = ((gradient - block.mean) * block.inverse_scale).square().sum()
            doubt[record] = block.mean.numel() * UNDERFLOW


def _balanced(inputs: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Shift powers of two from inputs to output gradients or back until the largest of each record is about 1.

    A small factor times small numbers would leave the normal ones, among which alone rounding is relative, although
    their product with large numbers does not. It is left where both are far from that, which a CPU knows.
    """
    largest = [torch.maximum(values.amax((1, 2)), -values.amin((1, 2))) for values in (inputs, errors)]
    if inputs.device.type == "cpu" and all(bool(((size > _TINY) | (size == 0)).all()) for size in largest):
        return inputs, errors
    exponents = torch.frexp(largest[1]).exponent.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT).view(-1, 1, 1)
    return torch.ldexp(inputs, exponents), torch.ldexp(errors, -exponents)


def _normalised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with largest absolute value 1, and that value, float64 [n]: squares of extreme values stay in range."""
    size = torch.maximum(values.amax(1, keepdim=True), -values.amin(1, keepdim=True))
    return values / torch.where(size > 0, size, 1.0), size[:, 0].double()


def _squares(values: Tensor) -> Tensor:
    """Sum of squares of each row, float64 [n]."""
    return values.square().sum(1).double()


def _bilinear(e: Tensor, x: Tensor, inverse_scale: Tensor, mean: Tensor | None) -> Tensor:
    """e_i^T M x_i for every record, float64 [n], with M = V^2 or V^2 a; products run over the shorter side.

    M is made some rows at a time, inside the cache, and never exists as a whole.
    """
    out, width = inverse_scale.shape
    step = max(1, _CACHED_FLOATS // width) if e.device.type == "cpu" else out
    short = e.new_zeros(len(e), width) if out <= width else None
    values = torch.zeros(len(e), dtype=torch.float64, device=e.device)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        matrix = inverse_scale[rows].square()
        if mean is not None:
            matrix *= mean[rows]
        if short is not None:
            short.addmm_(e[:, rows], matrix)
        else:
            values += (x @ matrix.t()).mul_(e[:, rows]).sum(1)
    return values if short is None else short.mul_(x).sum(1).double()
