"""Matrices and their biases."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.gradients.recorder import Argument, Layer, Recorder, register_rule
from adadpigu_core.gradients.uses import Dense, Product, Use


@dataclass
class Linear(Layer):
    """y = x W^T + b at any number of positions."""

    weight: Argument
    bias: Argument | None

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y."""
        return F.linear(x, self.weight.value, None if self.bias is None else self.bias.value)

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Compute e W."""
        return (e @ self.weight.value.to(e.dtype)).to(x.dtype)

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """W from products, b from the output gradient alone."""
        e = recorder.by_record(e.float())
        if self.weight.tracked is not None:
            yield self.weight, Product(recorder.by_record(x.float()), e)
        if self.bias is not None and self.bias.tracked is not None:
            yield self.bias, Dense(e.sum(1))


def matrix(recorder: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a matrix, recorded if it or its bias is watched."""
    if recorder.tracked(weight) is None and recorder.tracked(bias) is None:
        return F.linear(x, weight, bias)
    return linear(recorder, x, weight, bias)


@register_rule(F.linear)
def linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Record ``F.linear``."""
    layer = Linear(recorder.argument(weight), None if bias is None else recorder.argument(bias))
    return recorder.apply(layer, recorder.data(input, layer.weight.tracked))
