"""Soft masks: each coordinate or group moves as far as its release is signal rather than noise.

From the releases of training so far, the energy of the signal in a group, E_g, is estimated; with n_g^2 for the
variance of the noise in a release, the best linear estimate of the signal is the release times E_g / (E_g + n_g^2),
Wiener's factor. Factors are divided by their root mean square, so that a step has as much noise as without them and the
learning rate keeps its meaning; what is left is where the noise goes. A hard mask is the case of factors that are 0 or
one number.

Two estimates of E_g:

* ``energy``: the mean of ghat^2 - n^2 over coordinates and rounds;
* ``drift``: the mean over coordinates of (sum of ghat)^2 minus its noise, over the squared number of rounds: only what
  pulls the same way round after round, with far less noise.

Estimates are pulled towards the mean of all groups as far as their own noise explains that they differ (empirical
Bayes), so that factors are 1 until something is known. All of it is a function of releases and costs no privacy. Left
out: shrinking in pretraining, and directions that are not along coordinates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adadpigu_core.adaptive_clipping import reliable
from adadpigu_core.drift import Drift
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.grouping import groups, pool
from adadpigu_core.learnt import taken
from adadpigu_core.parameters import ParameterLayout

SHRINKAGE_RULES = ("none", "energy", "drift")
SHRINKAGE_GRANULARITIES = ("layer", "row", "column", "coordinate")


@dataclass(frozen=True)
class Shrinkage:
    """How updates are shrunk, and what is known of the signal.

    Args:
        rule: ``none``, ``energy`` or ``drift``.
        granularity: What shares a factor.
        layout: The parameters.
        drift: Sums of the releases and of their noise.
        energy: Sum of ghat^2 - n^2, float64 [d].
        doubt: Variance of ``energy`` that noise explains, float64 [d].
    """

    rule: str
    granularity: str
    layout: ParameterLayout
    drift: Drift
    energy: Tensor
    doubt: Tensor

    def __post_init__(self) -> None:
        for name, value, known in (
            ("rule", self.rule, SHRINKAGE_RULES),
            ("granularity", self.granularity, SHRINKAGE_GRANULARITIES),
        ):
            if value not in known:
                raise ConfigurationError(f"shrinkage.{name}: unknown value {value!r}; use one of {', '.join(known)}")

    @classmethod
    def neutral(cls, rule: str, granularity: str, layout: ParameterLayout) -> "Shrinkage":
        """Nothing known yet."""
        size = 0 if rule == "none" else layout.num_parameters
        nothing = torch.zeros(size, dtype=torch.float64)
        return cls(rule, granularity, layout, Drift.neutral(size), nothing, nothing)

    def updated(self, released_gradient: Tensor, noise_stddev: Tensor, mask: Tensor) -> "Shrinkage":
        """Learn from a released gradient.

        Args:
            released_gradient: Noisy mean gradient, [d].
            noise_stddev: Standard deviation of its noise, [d], same unit.
            mask: Coordinates that were released, bool [d].
        """
        if self.rule == "none":
            return self
        gradient = torch.where(mask, released_gradient, 0.0).double()
        variance = torch.where(mask, noise_stddev, 0.0).double().square()
        return replace(
            self,
            drift=self.drift.updated(released_gradient, noise_stddev, mask),
            energy=self.energy + gradient.square() - variance,
            # a squared normal variate has twice the squared variance for variance
            doubt=self.doubt + 2 * variance.square(),
        )

    def factors(self, mask: Tensor) -> Tensor:
        """Factor of each coordinate, float32 [d], not negative, of mean square 1 over a mask, bool [d].

        They are 1 while there is no signal to be seen, and for the rule ``none``.
        """
        usable = mask & self.drift.known if self.rule != "none" else torch.zeros_like(mask)
        if not usable.any():
            return torch.ones(len(mask))
        energy, doubt, noise = self._estimates(usable)
        overall = energy[usable].mean()
        if not overall > 0:
            return torch.ones(len(mask))
        centre = overall.expand(len(mask))
        signal = torch.where(usable, reliable(energy, doubt, usable, centre), centre).clamp(min=0)
        typical = noise[usable].mean()
        factor = signal / (signal + torch.where(usable, noise, typical)).clamp(min=1e-300)
        size = factor[mask].square().mean().sqrt()
        return (factor / size).float() if size > 0 else torch.ones(len(mask))

    def _estimates(self, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each coordinate's group: energy of the signal, variance of that estimate, noise variance of a release."""
        drift = self.drift
        if self.rule == "drift":
            energy, doubt = drift.energy, drift.doubt
        else:
            rounds = drift.rounds.clamp(min=1)
            energy, doubt = self.energy / rounds, self.doubt / rounds.square()
        group = groups(self.layout, self.granularity)
        num_groups = int(group.max()) + 1
        count = pool(energy, usable, group, num_groups)[0].clamp(min=1)
        shared = [
            (pool(values, usable, group, num_groups)[1] / count)[group]
            for values in (energy, doubt, drift.release_noise)
        ]
        return shared[0], shared[1] / count[group], shared[2]

    def state(self) -> dict[str, Tensor]:
        """What has been learnt, by name."""
        if self.rule == "none":
            return {}
        return {**self.drift.state(), "energy": self.energy, "doubt": self.doubt}

    def restored(self, state: Mapping[str, Tensor]) -> "Shrinkage":
        """Go on from what ``state`` gave.

        Raises:
            MessageError: If it belongs to another model.
        """
        kept = taken(state, self.state(), "shrinkage")
        if not kept:
            return self
        return replace(self, drift=self.drift.restored(kept), energy=kept["energy"], doubt=kept["doubt"])
