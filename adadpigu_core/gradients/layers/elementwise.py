"""Stand-alone parameters: scales, shifts, tokens and positions that are broadcast over records."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adadpigu_core.gradients.recorder import Argument, Layer, Recorder, Tracked, UnsupportedUseError, register_rule
from adadpigu_core.gradients.uses import Dense, Use


@dataclass
class Broadcast(Layer):
    """y = x p, or y = s x + t p with signs s and t, for a parameter that is the same for all records."""

    parameter: Argument
    product: bool
    data_sign: float = 1.0
    sign: float = 1.0

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The parameter."""
        return (self.parameter,)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y."""
        p = self.parameter.value
        if self.product:
            return x * p
        return torch.add(x if self.data_sign > 0 else -x, p, alpha=self.sign)

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Compute e p, or s e."""
        gradient = e * self.parameter.value if self.product else e * self.data_sign
        return gradient.sum_to_size(x.shape).to(x.dtype)

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """Sum over everything that the parameter is broadcast over."""
        gradient = e.float() * x.float() if self.product else self.sign * e.float()
        yield self.parameter, Dense(_reduced(recorder, gradient, self.parameter.value.shape))


@dataclass
class Expansion(Layer):
    """y = p for each record, of a shape [rows, ...]."""

    parameter: Argument
    shape: tuple[int, ...]

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The parameter."""
        return (self.parameter,)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y."""
        return self.parameter.value.expand(self.shape).clone()

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """There is no input."""
        raise AssertionError

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """Sum over everything that the parameter is expanded to."""
        yield self.parameter, Dense(_reduced(recorder, e.float(), self.parameter.value.shape))


def _reduced(recorder: Recorder, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum [rows, ...] to [n, *shape]."""
    aligned = (1,) * (gradient.dim() - len(shape)) + tuple(shape)
    inner = [d for d in range(1, gradient.dim()) if aligned[d] == 1 and gradient.shape[d] != 1]
    if inner:
        gradient = gradient.sum(inner, keepdim=True)
    return gradient.reshape(recorder.num_records, recorder.views, *shape).sum(1)


def _split(recorder: Recorder, one: Any, other: Any) -> tuple[Tensor, Tracked, bool]:
    """Tell data and parameter apart; True if the data comes first."""
    first, second = recorder.tracked(one), recorder.tracked(other)
    tracked = second or first
    assert tracked is not None  # noqa: S101  # a rule is called for a parameter only
    if first is not None and second is not None:
        raise UnsupportedUseError(tracked.name, "is combined with another parameter")
    data = recorder.data(one if second is not None else other, tracked)
    if data.is_complex():
        raise UnsupportedUseError(tracked.name, "is combined with complex numbers")
    shape = torch.broadcast_shapes(data.shape, tracked.value.shape)  # type: ignore[no-untyped-call]  # of torch
    if len(shape) != data.dim() or shape[0] != data.shape[0]:
        raise UnsupportedUseError(tracked.name, "is broadcast to more than its data")
    if tracked.value.dim() == data.dim() and tracked.value.shape[0] != 1:
        raise UnsupportedUseError(tracked.name, "has one row a record")
    return data, tracked, second is not None


@register_rule(torch.mul, torch.Tensor.mul, torch.multiply, torch.Tensor.multiply)
def multiply(recorder: Recorder, input: Any, other: Any) -> Tensor:  # the names are torch's
    """Record x * p and p * x."""
    data, tracked, _ = _split(recorder, input, other)
    return recorder.apply(Broadcast(Argument(tracked.value, tracked), product=True), data)


@register_rule(torch.add, torch.Tensor.add)
def add(recorder: Recorder, input: Any, other: Any, *, alpha: float = 1.0) -> Tensor:
    """Record x + p and p + x."""
    return _added(recorder, input, other, float(alpha))


@register_rule(torch.sub, torch.Tensor.sub)
def subtract(recorder: Recorder, input: Any, other: Any, *, alpha: float = 1.0) -> Tensor:
    """Record x - p and p - x."""
    return _added(recorder, input, other, -float(alpha))


def _added(recorder: Recorder, one: Any, other: Any, alpha: float) -> Tensor:
    data, tracked, data_first = _split(recorder, one, other)
    signs = (1.0, alpha) if data_first else (alpha, 1.0)
    if signs[0] not in (1.0, -1.0):
        raise UnsupportedUseError(tracked.name, "is used by add or sub with alpha")
    return recorder.apply(Broadcast(Argument(tracked.value, tracked), False, *signs), data)


@register_rule(torch.Tensor.expand)
def expand(recorder: Recorder, parameter: Tensor, *sizes: Any) -> Tensor:
    """Record p.expand(rows, ...)."""
    tracked = recorder.tracked(parameter)
    assert tracked is not None  # noqa: S101  # a rule is called for a parameter only
    flat = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = tuple(tracked.value.expand(*flat).shape)
    if shape[0] != recorder.rows or (len(shape) == tracked.value.dim() and tracked.value.shape[0] != 1):
        raise UnsupportedUseError(tracked.name, f"is expanded to {[*shape]}, which is not one row a record")
    return recorder.apply(Expansion(Argument(tracked.value, tracked), shape), None)
