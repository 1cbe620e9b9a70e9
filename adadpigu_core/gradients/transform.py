"""The standardisation as the engine needs it: block by block, in float32, on the device of the model.

A block is a run of coordinates that is handled at once: a parameter, or some rows of one. With V = m / b,

    u = (g - a) V      and      ||u||^2 = sum_j V_j^2 (g_j - a_j)^2.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.exceptions import MessageError

# Beyond these, squares of standardised gradients leave the range of float32.
_SMALLEST_SCALE = 1e-12
_LARGEST_SCALE = 1e12


# Copies of rows and columns pay where they save at least so much.
_WORTH_LEAVING_OUT = 1 / 8


@dataclass(frozen=True, eq=False)
class Part:
    """The rows and columns of a matrix, or of filters, outside of which nothing is retained.

    Args:
        rows: Indices in the first dimension, int64; None = all.
        columns: In the second; None = all.
    """

    rows: Tensor | None
    columns: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> "Part | None":
        """Find them for a mask, bool [rows, columns, ...]; None where they are nearly everything."""
        if mask.dim() < 2:
            return None
        flat = mask.flatten(2).numpy().any(2) if mask.dim() > 2 else mask.numpy()  # far faster than torch at this
        rows, columns = (
            torch.from_numpy(np.flatnonzero(retained)) for retained in (np.any(flat, axis=1), np.any(flat, axis=0))
        )
        if len(rows) * len(columns) > (1 - _WORTH_LEAVING_OUT) * flat.size:
            return None
        return cls(
            None if len(rows) == flat.shape[0] else rows.to(device),
            None if len(columns) == flat.shape[1] else columns.to(device),
        )

    def take(self, values: Tensor) -> Tensor:
        """Copy the part of [rows, columns, ...]."""
        values = values if self.rows is None else values.index_select(0, self.rows)
        return values if self.columns is None else values.index_select(1, self.columns)

    def add(self, values: Tensor, whole: Tensor) -> None:
        """Add [rows, columns, ...] of the part to the whole."""
        if self.rows is None or self.columns is None:
            dimension, indices = (1, self.columns) if self.rows is None else (0, self.rows)
            whole.index_add_(dimension, cast(Tensor, indices), values)
        else:
            whole[self.rows.unsqueeze(1), self.columns] += values


@dataclass(frozen=True, eq=False)
class Block:
    """Standardisation of a run of coordinates.

    Args:
        inverse_scale: V = m / b, float32 of the block's shape; zero where the mask is False.
        mean: a, float32 of the same shape; None where it is zero.
        part: Where anything is retained, if that is not nearly everywhere.
    """

    inverse_scale: Tensor
    mean: Tensor | None
    part: Part | None = None

    @cached_property
    def smaller(self) -> "Block":
        """The block of the part alone."""
        assert self.part is not None  # noqa: S101  # callers have looked
        return Block(self.part.take(self.inverse_scale), None if self.mean is None else self.part.take(self.mean))

    @cached_property
    def offset(self) -> Tensor:
        """Sum of V^2 a^2, a float64 number: the squared norm of a record without gradient."""
        if self.mean is None:
            return torch.zeros((), dtype=torch.float64, device=self.inverse_scale.device)
        return (self.inverse_scale * self.mean).double().square().sum()

    @cached_property
    def underflow(self) -> Tensor:
        """What a sum of V^2 y over 0 <= y <= 1 can lose to numbers too small for float32, a float64 number."""
        return self.inverse_scale.amax().double().square() * (self.inverse_scale.numel() * 2.0**-124)

    @cached_property
    def common_weight(self) -> float | None:
        """The one value of V^2, if there is only one and no mean; None otherwise, and on an accelerator."""
        if self.mean is not None or self.inverse_scale.device.type != "cpu":
            return None
        low, high = torch.aminmax(self.inverse_scale)
        return float(low) ** 2 if bool(low == high) else None


@dataclass(frozen=True, eq=False)
class Transform:
    """Standardisation of all coordinates.

    Args:
        inverse_scale: V = m / b, float32 [d].
        mean: a, float32 [d], zero where the mask is False; None if it is zero everywhere.
        mask: m, bool [d], on the CPU.
    """

    inverse_scale: Tensor
    mean: Tensor | None
    mask: Tensor
    _blocks: dict[tuple[int, tuple[int, ...]], Block] = field(default_factory=dict, init=False)
    _retains: dict[tuple[int, int], bool] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, standardisation: Standardisation, device: torch.device) -> "Transform":
        """Prepare a standardisation. Local steps share one, so that it is prepared once.

        Raises:
            MessageError: A retained coordinate has a scale out of range, or a mean that is not finite.
        """
        known = _known.setdefault(standardisation, {})
        if device not in known:
            known[device] = cls._prepared(standardisation, device)
        return known[device]

    @classmethod
    def _prepared(cls, standardisation: Standardisation, device: torch.device) -> "Transform":
        inverse = torch.zeros_like(standardisation.scale)
        centre = torch.zeros_like(standardisation.mean) if standardisation.centred else None
        for part, retained in standardisation.pieces():
            scale = standardisation.scale[part].index_select(0, retained)
            if not bool(((scale >= _SMALLEST_SCALE) & (scale <= _LARGEST_SCALE)).all()):
                text = f"gradient-scale: must lie between {_SMALLEST_SCALE:g} and {_LARGEST_SCALE:g} where retained"
                raise MessageError(text, text)
            inverse[part].index_copy_(0, retained, 1 / scale)
            if centre is not None:
                centre[part].index_copy_(0, retained, standardisation.mean[part].index_select(0, retained))
        if centre is not None and not bool(torch.isfinite((centre * inverse).square().sum())):
            text = "gradient-mean: must be finite where retained, also after division by the scale"
            raise MessageError(text, text)
        if centre is not None and not bool(centre.any()):
            centre = None
        return cls(inverse.to(device), None if centre is None else centre.to(device), standardisation.mask)

    @cached_property
    def standardised_mean(self) -> Tensor | None:
        """A V, float32 [d]; None if it is zero."""
        return None if self.mean is None else self.mean * self.inverse_scale

    def block(self, start: int, shape: tuple[int, ...]) -> Block:
        """View a run of coordinates in the shape of a parameter."""
        if (start, shape) not in self._blocks:
            stop = start + torch.Size(shape).numel()
            mean = None if self.mean is None else self.mean[start:stop].view(shape)
            part = Part.of(self.mask[start:stop].view(shape), self.inverse_scale.device)
            self._blocks[start, shape] = Block(self.inverse_scale[start:stop].view(shape), mean, part)
        return self._blocks[start, shape]

    def retains(self, start: int, size: int) -> bool:
        """Whether any coordinate of a run is retained."""
        if (start, size) not in self._retains:
            self._retains[start, size] = bool(self.mask[start : start + size].any())
        return self._retains[start, size]


_known: "WeakKeyDictionary[Standardisation, dict[torch.device, Transform]]" = WeakKeyDictionary()
