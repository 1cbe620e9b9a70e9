"""The flat order of a model's parameters.

Masks, statistics, noise and updates are vectors of length d. This module fixes which coordinate is which: the
trainable parameters in the order of ``named_parameters``, each flattened row by row. Both sides of a federation
compare ``ParameterLayout.fingerprint`` before anything is trained, so that a mask can never be applied to another
network than the one it was made for.

What is not trained is part of the function all the same: parameters that a factory has frozen, and buffers. They form a
vector of their own, which goes from the server to the clients, since a client that made up its own would compute the
gradients of another network. Left out: buffers that are not float32 or are not saved with the model; they must follow
from the code alone.
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

    @classmethod
    def of_fixed(cls, model: nn.Module) -> "ParameterLayout":
        """Read the layout of what a model has beside its trainable parameters."""
        fixed = {name: tuple(tensor.shape) for name, tensor in _fixed(model).items()}
        return cls(tuple(fixed), tuple(fixed.values()))

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


def flatten_fixed(model: nn.Module) -> Tensor:
    """Copy what a model has beside its trainable parameters into a flat vector [f]; f is 0 for most models."""
    fixed = _fixed(model)
    return ParameterLayout.of_fixed(model).join(fixed) if fixed else torch.zeros(0)


def assign_fixed(model: nn.Module, vector: Tensor) -> None:
    """Write a flat vector [f] into what a model has beside its trainable parameters."""
    fixed = _fixed(model)
    with torch.no_grad():
        for name, value in ParameterLayout.of_fixed(model).split(vector).items():
            fixed[name].copy_(value)


def _fixed(model: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters, then float32 buffers that are saved with the model."""
    saved = model.state_dict().keys()
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return {**frozen, **{name: buffer for name, buffer in buffers if buffer.dtype == torch.float32}}


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
