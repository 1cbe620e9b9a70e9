"""Convolutions in one to three dimensions, transposed ones included.

There are two ways to the gradients of n records. Where it is simple, the patches that a filter sees are laid out as
rows, and a product for each record does the rest, which is the faster way. Otherwise they are the weight gradient of
one convolution with n times the groups, for which torch has kernels; these read nothing of the weight but its shape, so
that an expanded number stands in for it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.gradients.recorder import Argument, Layer, Recorder, register_rule
from adadpigu_core.gradients.transform import Block, Part
from adadpigu_core.gradients.uses import Dense, Product, Use

_CACHED_FLOATS = 300_000
_CACHED_PATCHES = 600_000  # floats of gradients and patches together


@dataclass(frozen=True)
class Geometry:
    """The numbers of a convolution, one a dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def backward(self, e: Tensor, x: Tensor, weight: Tensor, groups: int, *, of_input: bool) -> Tensor:
        """Gradient of the input or of the weight."""
        gradients = torch.ops.aten.convolution_backward(
            e,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            groups,
            [of_input, not of_input, False],
        )
        return cast(Tensor, gradients[0 if of_input else 1])

    @property
    def plain(self) -> bool:
        """Whether patches are simple: two dimensions, no groups, no holes, not transposed."""
        return len(self.stride) == 2 and self.groups == 1 and set(self.dilation) == {1} and not self.transposed

    def pointwise(self, weight: Tensor) -> bool:
        """Whether this is a matrix at every position."""
        return (
            not self.transposed
            and self.groups == 1
            and math.prod(weight.shape[2:]) == 1
            and set(self.stride) == {1}
            and set(self.padding) == {0}
        )


def _channels_last(weight: Tensor) -> Tensor:
    """Lay out filters of two dimensions so that torch takes its faster kernels.

    With one input channel both layouts are the same in memory but for the strides, by which torch chooses: so that a
    copy is made in any case.
    """
    if weight.dim() != 4:
        return weight
    return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)


class Filters(Use):
    """Filters of a convolution, by a convolution with more groups.

    Args:
        inputs: x, float32 [n K, C, ...].
        errors: Gradients of the outputs e, float32 [n K, O, ...].
        num_records: n.
        weight: For its shape.
        geometry: Of the convolution.
    """

    def __init__(self, inputs: Tensor, errors: Tensor, num_records: int, weight: Tensor, geometry: Geometry) -> None:
        self.inputs = inputs
        self.errors = errors
        self.num_records = num_records
        self.geometry = geometry
        self._views = len(inputs) // num_records
        self._weight = weight
        self._shape = tuple(weight.shape)
        self.held = (inputs[:1].numel() + errors[:1].numel()) * self._views
        self.positions = (inputs if geometry.transposed else errors)[0, 0].numel() * self._views

    def forget(self) -> None:
        """Let go of inputs and output gradients."""
        self.inputs = self.errors = self.inputs.new_empty(0)

    def restricted(self, part: Part) -> "Filters | None":
        """Some filters and some channels, which is simple where every filter sees all channels."""
        if self.geometry.groups > 1 or self.geometry.transposed:
            return None
        errors = self.errors if part.rows is None else self.errors.index_select(1, part.rows)
        inputs = self.inputs if part.columns is None else self.inputs.index_select(1, part.columns)
        return type(self)(inputs, errors, self.num_records, part.take(self._weight), self.geometry)

    def chunk(self, size: int, times: int) -> int:
        """How many gradients to make at a time."""
        return max(1, times * _CACHED_FLOATS // size)

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records."""
        count = stop - start
        weight = self.errors.new_zeros(()).expand(count * self._shape[0], *self._shape[1:])
        x, e = (self._side_by_side(values, start, stop) for values in (self.inputs, self.errors))
        gradient = self.geometry.backward(e, x, weight, count * self.geometry.groups, of_input=False)
        return gradient.reshape(count, -1)

    def _side_by_side(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Put records next to each other as channels: [n K, C, ...] to [K, n C, ...]."""
        part = values[start * self._views : stop * self._views]
        if self._views == 1:
            return part.reshape(1, -1, *part.shape[2:])
        grouped = part.reshape(stop - start, self._views, *part.shape[1:]).transpose(0, 1)
        return grouped.reshape(self._views, -1, *part.shape[2:])


class Patches(Filters):
    """Filters of a plain convolution in two dimensions, by products with patches.

    The own order of the coordinates is [O, height, width, C]: a patch of an image whose channels come last is copied in
    runs of whole rows.
    """

    def chunk(self, size: int, times: int) -> int:
        """How many gradients to make at a time: their patches need room, too."""
        patches = self.positions * math.prod(self._shape[1:])
        return max(1, times * _CACHED_PATCHES // (size + patches))

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records."""
        return torch.bmm(*self._matrices(start, stop)).flatten(1)

    def write_gradients(self, start: int, stop: int, target: Tensor) -> None:
        """Write gradients of some records to where they are kept, without a copy."""
        errors, patches = self._matrices(start, stop)
        torch.bmm(errors, patches, out=target.view(stop - start, errors.shape[1], patches.shape[2]))

    def _matrices(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Output gradients, [n, O, T], and patches, [n, T, height width C], of some records."""
        rows = slice(start * self._views, stop * self._views)
        x, e = self.inputs[rows].permute(0, 2, 3, 1), self.errors[rows].permute(0, 2, 3, 1)
        vertical, horizontal = self.geometry.padding
        if vertical or horizontal:
            x = F.pad(x, (0, 0, horizontal, horizontal, vertical, vertical))
        x = x.contiguous()
        windows = x.unfold(1, self._shape[2], self.geometry.stride[0]).unfold(
            2, self._shape[3], self.geometry.stride[1]
        )  # [n K, height, width, C, kernel height, kernel width]
        patches = windows.permute(0, 1, 2, 4, 5, 3).reshape(stop - start, self.positions, -1)
        return e.reshape(stop - start, self.positions, -1).transpose(1, 2), patches

    def arranged(self, values: Tensor) -> Tensor:
        """Put [O, C, height, width] into the own order."""
        return values.permute(0, 2, 3, 1).flatten()

    def restored(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bring back the order of the parameter."""
        out, channels, height, width = shape
        values = values.unflatten(-1, (out, height, width, channels))  # type: ignore[no-untyped-call]  # of torch
        return values.movedim(-1, -3)


@dataclass
class Convolution(Layer):
    """A convolution with bias; with its channels last its output has them last, too."""

    weight: Argument
    bias: Argument | None
    geometry: Geometry
    channels_last: bool

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        g = self.geometry
        bias = None if self.bias is None else self.bias.value
        return torch.convolution(
            x,
            _channels_last(self.weight.value) if self.channels_last else self.weight.value,
            bias,
            g.stride,
            g.padding,
            g.dilation,
            g.transposed,
            g.output_padding,
            g.groups,
        )

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Convolve backwards."""
        weight = _channels_last(self.weight.value).to(e.dtype)
        return self.geometry.backward(e, x.to(e.dtype), weight, self.geometry.groups, of_input=True).to(x.dtype)

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """Filters from inputs and output gradients, b from the output gradient alone."""
        x, e = x.float(), e.float()
        if self.weight.tracked is not None:
            yield self.weight, self._use(recorder, x, e)
        if self.bias is not None and self.bias.tracked is not None:
            sums = e.flatten(2).sum(2)
            yield self.bias, Dense(sums.view(recorder.num_records, recorder.views, -1).sum(1))

    def _use(self, recorder: Recorder, x: Tensor, e: Tensor) -> Use:
        weight = self.weight.value
        if not self.geometry.pointwise(weight):
            kind = Patches if self.geometry.plain else Filters
            return kind(x, e, recorder.num_records, weight, self.geometry)
        inputs, errors = (recorder.by_record(values.flatten(2).transpose(1, 2)) for values in (x, e))
        return Pointwise(inputs, errors)


class Pointwise(Product):
    """A matrix with the shape of a filter of size 1."""

    def squared_norms(self, block: Block) -> None:
        """Nothing shorter than the gradients."""
        return


def _convolve(
    recorder: Recorder,
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *,
    transposed: bool = False,
    output_padding: Any = 0,
) -> Tensor:
    argument = recorder.argument(weight)
    x = recorder.data(x, argument.tracked)
    dimensions = weight.dim() - 2
    if x.dim() != weight.dim():
        raise recorder.unsupported("is used by a convolution without batch", weight, bias)
    dilation = _each(dilation, dimensions)
    if isinstance(padding, str):
        x, padding = _padded(x, padding, weight, dilation)
    geometry = Geometry(
        _each(stride, dimensions),
        _each(padding, dimensions),
        dilation,
        transposed,
        _each(output_padding, dimensions),
        groups,
    )
    shift = None if bias is None else recorder.argument(bias)
    return recorder.apply(Convolution(argument, shift, geometry, recorder.channels_last), x)


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _padded(x: Tensor, padding: str, weight: Tensor, dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Turn padding by name into numbers; where it is not the same on both sides, pad beforehand."""
    if padding == "valid":
        return x, (0,) * len(dilation)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, tuple(t // 2 for t in total)
    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return F.pad(x, sides), (0,) * len(dilation)


@register_rule(F.conv1d, F.conv2d, F.conv3d)
def convolve(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Record a convolution."""
    return _convolve(recorder, input, weight, bias, stride, padding, dilation, groups)


@register_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def convolve_transposed(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """Record a transposed convolution."""
    return _convolve(
        recorder,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        transposed=True,
        output_padding=output_padding,
    )
