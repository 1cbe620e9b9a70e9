"""Adaptive clipping: running statistics of released gradients, and the standardisation they give.

A gradient g is standardised as u = m (g - a) / b before it is clipped (AdaCliP, Pichapati et al. 2019; arXiv
2507.06525, section IV). The mean a and the scale b are running statistics of gradients that were released before, so
they cost no privacy. Three rules:

* ``none``: a = 0, b = 1, plain clipping;
* ``energy``: b^2 follows E[ghat^2] minus the known noise variance, pooled over a layer, a row or a coordinate. The
  noise is not taken off (ghat - a)^2, because the noise in a would be counted as signal. An estimate is pulled towards
  what it is part of (a row towards its layer, a layer towards the whole) as far as noise explains that it differs, so
  that where noise dominates, all scales are 1. The scale has a floor, and its mean square over the retained coordinates
  is 1, so that the clipping norm means what it means without statistics;
* ``paper``: the published rule: variance of ghat around its running mean, per coordinate, from 1, noise included.

The clipped sum has sensitivity C whatever a and b are, so a bad statistic can cost accuracy but never privacy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core.exceptions import ConfigurationError, MessageError
from adadpigu_core.grouping import groups, pool
from adadpigu_core.learnt import taken
from adadpigu_core.parameters import ParameterLayout

_PIECE = 2**16  # coordinates
RULES = ("none", "energy", "paper")
GRANULARITIES = ("layer", "row", "coordinate")

_PAPER_VARIANCE_DECAY = 0.999
_PAPER_VARIANCE_RANGE = (1e-6, 1e6)


@dataclass(frozen=True)
class AdaptiveClipping:
    """How statistics are kept.

    Args:
        rule: ``none``, ``energy`` or ``paper``.
        granularity: What shares one scale: ``layer`` (a parameter tensor), ``row`` (its first dimension) or
            ``coordinate``. Finer statistics are noisier. The paper's rule is always per coordinate.
        decay: Weight of the past in running means, in [0, 1).
        floor: Smallest scale as a share of the mean scale, in (0, 1].
        shrinkage: Weight of the layer's estimate in a row's or coordinate's, in [0, 1].
        centre: Whether the running mean is subtracted. The paper's rule always does.
    """

    rule: str = "none"
    granularity: str = "layer"
    decay: float = 0.9
    floor: float = 0.05
    shrinkage: float = 0.0
    centre: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigurationError(f"adaptive-clipping.rule: unknown value {self.rule!r}; use one of {RULES}")
        if self.granularity not in GRANULARITIES:
            raise ConfigurationError(
                f"adaptive-clipping.granularity: unknown value {self.granularity!r}; use one of {GRANULARITIES}"
            )
        if not 0 <= self.decay < 1:
            raise ConfigurationError(f"adaptive-clipping.decay: must be in [0, 1), got {self.decay}")
        if not 0 < self.floor <= 1:
            raise ConfigurationError(f"adaptive-clipping.floor: must be in (0, 1], got {self.floor}")
        if not 0 <= self.shrinkage <= 1:
            raise ConfigurationError(f"adaptive-clipping.shrinkage: must be in [0, 1], got {self.shrinkage}")


@dataclass(frozen=True, eq=False)
class Standardisation:
    """The transform of one step; any finite values are safe, as long as the scale is positive. Tensors are not changed.

    Args:
        mask: Retained coordinates m, bool [d].
        mean: Gradient mean a, float32 [d].
        scale: Gradient scale b > 0, float32 [d].
    """

    mask: Tensor
    mean: Tensor
    scale: Tensor

    @cached_property
    def centred(self) -> bool:
        """Whether there is a mean."""
        return bool(self.mean.any())

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Go through all coordinates, as many at a time as stay inside the cache.

        Yields:
            A run of coordinates, and the indices of the retained ones within it, int64.
        """
        for number, retained in enumerate(self._retained):
            start = number * _PIECE
            yield slice(start, start + _PIECE), torch.from_numpy(retained.astype(np.int64))

    def scale_of(self, part: slice) -> Tensor | float:
        """Scale of a piece, for products with what is zero where the mask is False; a number if there is only one."""
        common = self._common_scales[part.start // _PIECE]
        return torch.where(self.mask[part], self.scale[part], 1.0) if common is None else common

    @cached_property
    def _common_scales(self) -> list[float | None]:
        """The one scale of each piece, where there is only one: layers are mostly larger than a piece."""
        common: list[float | None] = []
        for part, retained in self.pieces():
            scales = self.scale[part].index_select(0, retained)
            low, high = torch.aminmax(scales) if len(scales) else (torch.ones(()), torch.ones(()))
            common.append(float(low) if bool(low == high) else None)
        return common

    @cached_property
    def _retained(self) -> list[NDArray[np.uint16]]:
        """Indices within each piece, in two bytes each: local steps share them."""
        mask = self.mask.numpy()
        starts = range(0, len(mask), _PIECE)
        return [np.flatnonzero(mask[start : start + _PIECE]).astype(np.uint16) for start in starts]

    @classmethod
    def identity(cls, num_parameters: int) -> "Standardisation":
        """Everything retained, zero mean, unit scale: plain DP-SGD."""
        return cls(
            torch.ones(num_parameters, dtype=torch.bool),
            torch.zeros(num_parameters),
            torch.ones(num_parameters),
        )


class Statistics(Protocol):
    """What private steps read before a step and, if they ``learn``, learn after it."""

    @property
    def learn(self) -> bool:
        """Whether a released gradient changes anything."""
        ...

    def standardisation(self, mask: Tensor) -> Standardisation:
        """Give the transform for a mask, bool [d]."""
        ...

    def updated(self, released_gradient: Tensor, noise_stddev: Tensor, mask: Tensor) -> "Statistics":
        """Learn from a released gradient [d] with noise of known standard deviation [d]."""
        ...


@dataclass(frozen=True)
class FixedStatistics:
    """Statistics that somebody else keeps: a mean and a scale, both [d]."""

    mean: Tensor
    scale: Tensor
    learn: ClassVar[bool] = False

    @classmethod
    def neutral(cls, num_parameters: int) -> "FixedStatistics":
        """Zero mean and unit scale."""
        return cls(torch.zeros(num_parameters), torch.ones(num_parameters))

    def standardisation(self, mask: Tensor) -> Standardisation:
        """Give the transform for a mask, bool [d]; the very same one while the mask is, for what is derived from it."""
        return _fixed(mask, self.mean, self.scale)

    def updated(self, released_gradient: Tensor, noise_stddev: Tensor, mask: Tensor) -> "FixedStatistics":
        """Learn nothing."""
        return self


@lru_cache(maxsize=2)
def _fixed(mask: Tensor, mean: Tensor, scale: Tensor) -> Standardisation:
    return Standardisation(mask, mean, scale)


@dataclass(frozen=True)
class RunningStatistics:
    """Running statistics of released gradients.

    Args:
        settings: How they are kept.
        layout: The parameters that they describe.
        mean: Running mean of the released gradient, float32 [d]; 0 for coordinates never retained.
        moment: Decayed sum of the squared signal of each group, float64 [G]; for the paper's rule, the variance [d].
        weight: Decayed number of observations of each group, float64 [G]; 0 = never observed.
        variance: Variance of ``moment`` that noise explains, float64 [G].
    """

    settings: AdaptiveClipping
    layout: ParameterLayout
    mean: Tensor
    moment: Tensor
    weight: Tensor
    variance: Tensor
    learn: ClassVar[bool] = True

    @classmethod
    def neutral(cls, settings: AdaptiveClipping, layout: ParameterLayout) -> "RunningStatistics":
        """Statistics before anything was released."""
        num_groups = int(groups(layout, _granularity(settings))[-1]) + 1
        start = torch.ones if settings.rule == "paper" else torch.zeros
        return cls(
            settings,
            layout,
            torch.zeros(layout.num_parameters),
            start(num_groups, dtype=torch.float64),
            torch.zeros(num_groups, dtype=torch.float64),
            torch.zeros(num_groups, dtype=torch.float64),
        )

    def standardisation(self, mask: Tensor) -> Standardisation:
        """Give the transform for a mask, bool [d]. A coordinate never observed takes its layer's scale."""
        settings = self.settings
        mean = self.mean if settings.centre or settings.rule == "paper" else torch.zeros_like(self.mean)
        if settings.rule == "none":
            return Standardisation(mask, torch.zeros_like(self.mean), torch.ones_like(self.mean))
        if settings.rule == "paper":
            return Standardisation(mask, mean, self.moment.clamp(*_PAPER_VARIANCE_RANGE).sqrt().float())
        return Standardisation(mask, mean, _normalised(self._energy(mask), mask, settings.floor).float())

    def updated(self, released_gradient: Tensor, noise_stddev: Tensor, mask: Tensor) -> "RunningStatistics":
        """Learn from a released gradient.

        Args:
            released_gradient: Noisy mean gradient, [d].
            noise_stddev: Standard deviation of its noise, [d] or one number, same unit.
            mask: Coordinates that were released, bool [d]; the others are left as they are.
        """
        decay = self.settings.decay
        mean = torch.where(mask, decay * self.mean + (1 - decay) * released_gradient, self.mean)
        if self.settings.rule == "paper":
            deviation = (released_gradient - mean).double().square()
            kept = _PAPER_VARIANCE_DECAY * self.moment + (1 - _PAPER_VARIANCE_DECAY) * deviation
            return replace(self, mean=mean, moment=torch.where(mask, kept, self.moment))
        noise_variance = noise_stddev.double().square().expand(len(mask))
        signal = released_gradient.double().square() - noise_variance
        group = groups(self.layout, self.settings.granularity)
        count, total = pool(signal, mask, group, len(self.moment))
        # a squared normal variate has twice the squared variance for variance
        _, doubt = pool(2 * noise_variance.square(), mask, group, len(self.moment))
        seen, count = count > 0, count.clamp(min=1)
        return replace(
            self,
            mean=mean,
            moment=torch.where(seen, decay * self.moment + (1 - decay) * total / count, self.moment),
            weight=torch.where(seen, decay * self.weight + (1 - decay), self.weight),
            variance=torch.where(
                seen, decay**2 * self.variance + (1 - decay) ** 2 * doubt / count.square(), self.variance
            ),
        )

    def state(self) -> dict[str, Tensor]:
        """What has been learnt, by name."""
        return {"mean": self.mean, "moment": self.moment, "weight": self.weight, "variance": self.variance}

    def restored(self, state: Mapping[str, Tensor]) -> "RunningStatistics":
        """Go on from what ``state`` gave.

        Raises:
            MessageError: If it belongs to another model or granularity.
        """
        kept = taken(state, self.state(), "clipping", "the model or the granularity")
        return replace(self, **kept)  # type: ignore[arg-type]  # tensors all

    def _energy(self, mask: Tensor) -> Tensor:
        """Estimated squared signal of each coordinate, float64 [d]; zero everywhere if none is seen."""
        granularity, shrinkage = self.settings.granularity, self.settings.shrinkage
        group, layer = groups(self.layout, granularity), groups(self.layout, "layer")
        known = self.weight > 0
        weight = self.weight.clamp(min=1e-300)
        estimate, variance = (self.moment / weight)[group], (self.variance / weight.square())[group]
        usable = known[group] & mask
        overall = estimate[usable].mean() if usable.any() else torch.tensor(0.0)
        if not overall > 0:
            return torch.zeros(len(mask), dtype=torch.float64)
        of_layer = self._of_layers(estimate, usable, layer)
        groups_in_layer = torch.bincount(shrink(layer, self.layout, granularity))[layer]
        doubt = self._of_layers(variance, usable, layer) / groups_in_layer
        energy = reliable(of_layer, doubt, usable, overall.expand(len(mask)))
        if granularity != "layer":
            estimate = torch.where(usable, estimate, of_layer)
            energy = energy + (1 - shrinkage) * (reliable(estimate, variance, usable, of_layer) - of_layer)
        return energy

    def _of_layers(self, values: Tensor, usable: Tensor, layer: Tensor) -> Tensor:
        """Mean of the usable values of a coordinate's layer, [d]; that of all where a layer has none."""
        count, total = pool(values, usable, layer, len(self.layout.names))
        return torch.where(count > 0, total / count.clamp(min=1), values[usable].mean())[layer]


def reliable(estimate: Tensor, variance: Tensor, usable: Tensor, centre: Tensor) -> Tensor:
    """Pull estimates towards a centre as far as their noise explains that they differ from it (empirical Bayes).

    Args:
        estimate: float64 [d], one value a group.
        variance: What noise adds to it, float64 [d].
        usable: Coordinates that are observed and retained, bool [d]: those that tell how much estimates differ.
        centre: float64 [d].
    """
    spread = (estimate - centre)[usable].square().mean() - variance[usable].mean()
    signal = spread.clamp(min=0)
    share = torch.where(variance > 0, signal / (signal + variance).clamp(min=1e-300), 1.0)
    return centre + share * (estimate - centre)


def _normalised(energy: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Scale with a floor and mean square 1 over the retained coordinates; 1 everywhere if no signal is seen."""
    scale = energy.clamp(min=0).sqrt()
    typical = scale[mask].mean()
    if not typical > 0:
        return torch.ones_like(scale)
    scale = scale.clamp(min=float(floor * typical))
    return scale / scale[mask].square().mean().sqrt()


def _granularity(settings: AdaptiveClipping) -> str:
    return "coordinate" if settings.rule == "paper" else settings.granularity


def expand(group_values: Tensor, layout: ParameterLayout, granularity: str) -> Tensor:
    """Give every coordinate its group's value: [G] to [d].

    Raises:
        MessageError: If there is not exactly one value a group.
    """
    index = groups(layout, granularity)
    if group_values.shape != (int(index[-1]) + 1,):
        text = f"gradient-scale: expected {int(index[-1]) + 1} values, one a {granularity}, got {len(group_values)}"
        raise MessageError(text, text)
    return group_values[index]


def shrink(values: Tensor, layout: ParameterLayout, granularity: str) -> Tensor:
    """Take one value of each group: [d] to [G], the inverse of ``expand``."""
    index = groups(layout, granularity)
    first = torch.cat([torch.tensor([True]), index[1:] != index[:-1]])
    return values[first]
