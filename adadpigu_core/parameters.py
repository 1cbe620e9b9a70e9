"""The flat order of a model's parameters.

Masks, statistics, noise and updates are vectors of length d. This module fixes which coordinate is which: the
trainable parameters in the order of ``named_parameters``, each flattened row by row. Both sides of a federation
compare ``ParameterLayout.fingerprint`` before anything is trained, so that a mask can never be applied to another
network than the one it was made for.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the trainable parameters, in flat order.

    Args:
        names: Dotted parameter names.
        shapes: One shape per name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterLayout":
        """Read the layout of the trainable parameters of a model."""
        named = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        return cls(tuple(name for name, _ in named), tuple(shape for _, shape in named))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes)

    @cached_property
    def num_parameters(self) -> int:
        """Number of coordinates d."""
        return sum(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """Stable hash of names and shapes."""
        text = ";".join(f"{name}:{shape}" for name, shape in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """View a flat vector [d] as named tensors."""
        pieces = torch.split(vector, list(self.sizes))
        return {name: piece.view(shape) for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate named tensors into a flat vector [d]."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])


def flatten(model: nn.Module) -> Tensor:
    """Copy the trainable parameters of a model into a flat vector [d]."""
    return ParameterLayout.of(model).join(dict(model.named_parameters()))


def descend(model: nn.Module, gradient: Tensor, learning_rate: float) -> None:
    """Move the trainable parameters of a model against a flat gradient [d], in place."""
    parameters = dict(model.named_parameters())
    # infinite beyond the range of float32, where torch would raise
    rate = torch.tensor(learning_rate, dtype=gradient.dtype).item()
    with torch.no_grad():
        for name, piece in ParameterLayout.of(model).split(gradient).items():
            parameters[name].sub_(piece.to(parameters[name].device), alpha=rate)


def assign(model: nn.Module, vector: Tensor) -> None:
    """Write a flat vector [d] into the trainable parameters of a model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in ParameterLayout.of(model).split(vector).items():
            parameters[name].copy_(value)
