"""Groups of coordinates that share one number: a scale, an importance, a shrinkage factor.

A number that is estimated from noisy releases is the better the more coordinates it is averaged over, so layers, rows
and columns of a layer serve as groups beside single coordinates. Which coordinates belong together is a function of the
public layout alone.
"""

from functools import lru_cache

import torch
from torch import Tensor

from adadpigu_core.parameters import ParameterLayout


@lru_cache(maxsize=16)
def groups(layout: ParameterLayout, granularity: str) -> Tensor:
    """Index of the group of each coordinate, int64 [d], numbered from 0 in the order of their first coordinates.

    Args:
        layout: The parameters.
        granularity: ``layer`` (a parameter tensor), ``row`` (an index of its first dimension: a unit, a filter, a row
            of an embedding), ``column`` (of its second: an input) or ``coordinate``. A vector, such as a bias, is one
            group unless its coordinates are.
    """
    if granularity == "coordinate":
        return torch.arange(layout.num_parameters)
    pieces, known = [], 0
    for shape in layout.shapes:
        piece = _within(shape, granularity)
        pieces.append((piece + known).reshape(-1))
        known += int(piece.max()) + 1
    return torch.cat(pieces)


def shared(layout: ParameterLayout, granularity: str) -> Tensor | None:
    """The same, or None if no two coordinates share a group."""
    return None if granularity == "coordinate" else groups(layout, granularity)


def _within(shape: tuple[int, ...], granularity: str) -> Tensor:
    """Group of each entry of one parameter, in its shape."""
    axis = {"layer": None, "row": 0, "column": 1}[granularity]
    if axis is None or len(shape) < 2:
        return torch.zeros(shape, dtype=torch.int64)
    along = [1] * len(shape)
    along[axis] = shape[axis]
    return torch.arange(shape[axis]).view(along).expand(shape)


def pool(values: Tensor, mask: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Count and sum the masked values of each group, float64 [G] both."""
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    observed = zeros.index_add(0, group[mask], torch.ones(int(mask.sum()), dtype=torch.float64))
    return observed, zeros.index_add(0, group[mask], values[mask].double())


def means(values: Tensor, group: Tensor) -> Tensor:
    """Mean of each group, float64 [G]."""
    everything = torch.ones(len(group), dtype=torch.bool)
    count, total = pool(values, everything, group, int(group.max()) + 1)
    return total / count
