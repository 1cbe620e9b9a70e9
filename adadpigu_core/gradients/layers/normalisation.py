"""Normalisation inside a record: layer, group, instance and root-mean-square.

Their scale and shift have one number a feature, so gradients are simply made. Batch normalisation mixes records and has
no rule.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.gradients.layers.elementwise import multiply
from adadpigu_core.gradients.recorder import Argument, Layer, Recorder, register_rule
from adadpigu_core.gradients.uses import Dense, Use

_NO_MOMENTS = torch.empty(0)


@dataclass
class _Normalisation(Layer):
    """y = (x - mean) / stddev * w + b."""

    weight: Argument | None
    bias: Argument | None
    eps: float
    mean: Tensor = field(default=_NO_MOMENTS, init=False)
    inverse_stddev: Tensor = field(default=_NO_MOMENTS, init=False)

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Weight and bias, as far as there are any."""
        return tuple(argument for argument in (self.weight, self.bias) if argument is not None)

    @property
    def values(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias."""
        return (None if self.weight is None else self.weight.value), (None if self.bias is None else self.bias.value)


@dataclass
class LayerNormalisation(_Normalisation):
    """Normalisation over the last dimensions."""

    shape: tuple[int, ...]

    def __init__(self, weight: Argument | None, bias: Argument | None, eps: float, shape: tuple[int, ...]) -> None:
        super().__init__(weight, bias, eps)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and remember the moments."""
        y, self.mean, self.inverse_stddev = torch.native_layer_norm(x.float(), self.shape, *self.values, self.eps)
        return y

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Gradient of the input."""
        gradients = torch.ops.aten.native_layer_norm_backward(
            e.float(), x.float(), self.shape, self.mean, self.inverse_stddev, *self.values, [True, False, False]
        )
        return gradients[0].to(x.dtype)  # type: ignore[no-any-return]  # operators are not typed

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """Sum over positions."""
        e = e.float()
        shape = (recorder.num_records, -1, *self.shape)
        if self.weight is not None and self.weight.tracked is not None:
            normalised = (x.float() - self.mean).mul_(self.inverse_stddev)
            yield self.weight, Dense(normalised.mul_(e).reshape(shape).sum(1))
        if self.bias is not None and self.bias.tracked is not None:
            yield self.bias, Dense(e.reshape(shape).sum(1))


@dataclass
class GroupNormalisation(_Normalisation):
    """Normalisation over groups of channels and all positions; one group a channel is instance normalisation."""

    groups: int

    def __init__(self, weight: Argument | None, bias: Argument | None, eps: float, groups: int) -> None:
        super().__init__(weight, bias, eps)
        self.groups = groups

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], x[0, 0].numel()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and remember the moments."""
        y, self.mean, self.inverse_stddev = torch.native_group_norm(
            _dense(x.float()), *self.values, *self._sizes(x), self.groups, self.eps
        )
        return y

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Gradient of the input."""
        dense = _dense(x.float())
        e = e.float().contiguous(memory_format=_format(dense))
        gradients = torch.ops.aten.native_group_norm_backward(
            e, dense, self.mean, self.inverse_stddev, self.values[0], *self._sizes(x), self.groups, [True, False, False]
        )
        return gradients[0].to(x.dtype)  # type: ignore[no-any-return]  # operators are not typed

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """Sum over positions and views."""
        e = e.float()
        count = (recorder.num_records, recorder.views, -1)
        if self.weight is not None and self.weight.tracked is not None:
            channels = (len(x), -1, *[1] * (x.dim() - 2))
            repeat = x.shape[1] // self.groups
            mean, inverse = (
                moment.float().view(len(x), -1).repeat_interleave(repeat, 1).view(channels)
                for moment in (self.mean, self.inverse_stddev)
            )
            sums = (x.float() - mean).mul_(e).flatten(1).view(len(x), x.shape[1], -1).sum(2) * inverse.flatten(1)
            yield self.weight, Dense(sums.view(count).sum(1))
        if self.bias is not None and self.bias.tracked is not None:
            yield self.bias, Dense(e.reshape(len(x), x.shape[1], -1).sum(2).view(count).sum(1))


def _format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_format(x))


def _optional(recorder: Recorder, value: Tensor | None) -> Argument | None:
    return None if value is None else recorder.argument(value)


def _data(recorder: Recorder, x: Tensor, *arguments: Argument | None) -> Tensor:
    tracked = [argument.tracked for argument in arguments if argument is not None and argument.tracked is not None]
    return recorder.data(x, tracked[0])


@register_rule(F.layer_norm)
def layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Record ``F.layer_norm``."""
    arguments = _optional(recorder, weight), _optional(recorder, bias)
    x = _data(recorder, input, *arguments)
    if x.dim() == len(normalized_shape):
        raise recorder.unsupported("is used by layer_norm over records", weight, bias)
    return recorder.apply(LayerNormalisation(*arguments, eps, tuple(normalized_shape)), x)


@register_rule(F.group_norm)
def group_norm(
    recorder: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Record ``F.group_norm``."""
    arguments = _optional(recorder, weight), _optional(recorder, bias)
    return recorder.apply(GroupNormalisation(*arguments, eps, num_groups), _data(recorder, input, *arguments))


@register_rule(F.instance_norm)
def instance_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Record ``F.instance_norm``."""
    arguments = _optional(recorder, weight), _optional(recorder, bias)
    x = _data(recorder, input, *arguments)
    if running_mean is not None or running_var is not None or not use_input_stats:
        raise recorder.unsupported("is used by instance_norm with running statistics, which mix records", weight, bias)
    return recorder.apply(GroupNormalisation(*arguments, eps, x.shape[1]), x)


@register_rule(F.rms_norm)
def rms_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    eps: float | None = None,
) -> Tensor:
    """Record ``F.rms_norm``: normalise without, and then multiply by, the scale."""
    return multiply(recorder, F.rms_norm(input, tuple(normalized_shape), None, eps), weight)
