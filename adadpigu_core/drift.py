"""What pulls one way round after round: the energy of the signal in each coordinate, from the sum of its releases.

The squared sum minus the variance of the noise in it, over the squared number of rounds. It has far less noise than a
mean of squared releases, 1 / t of one release's and not 1 / sqrt(t), and is blind to what changes direction. Soft masks
shrink by it. Hard masks are ranked by it plus one standard deviation of its noise, an upper confidence bound: a
coordinate that is left out keeps its estimate, and one that chance put below zero would never be tried again. A
function of releases alone: it costs no privacy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adadpigu_core.grouping import means
from adadpigu_core.learnt import taken


@dataclass(frozen=True)
class Drift:
    """Sums over the rounds in which a coordinate was released; the others leave it as it is.

    Args:
        total: Sum of the releases, float64 [d].
        noise: Sum of the variances of their noise, float64 [d].
        rounds: In how many rounds a coordinate was released, float64 [d].
    """

    total: Tensor
    noise: Tensor
    rounds: Tensor

    @classmethod
    def neutral(cls, num_parameters: int) -> "Drift":
        """Nothing known yet."""
        return cls(*(torch.zeros(num_parameters, dtype=torch.float64) for _ in range(3)))

    def updated(self, released_gradient: Tensor, noise_stddev: Tensor, mask: Tensor) -> "Drift":
        """Learn from a released gradient.

        Args:
            released_gradient: Noisy mean gradient, [d].
            noise_stddev: Standard deviation of its noise, [d], same unit.
            mask: Coordinates that were released, bool [d].
        """
        return Drift(
            self.total + torch.where(mask, released_gradient, 0.0).double(),
            self.noise + torch.where(mask, noise_stddev, 0.0).double().square(),
            self.rounds + mask,
        )

    @property
    def known(self) -> Tensor:
        """Coordinates that were ever released, bool [d]."""
        return self.rounds > 0

    @property
    def energy(self) -> Tensor:
        """Energy of the signal, float64 [d]; negative where noise dominates, and 0 where nothing is known."""
        return (self.total.square() - self.noise) / self._rounds.square()

    @property
    def doubt(self) -> Tensor:
        """Variance of ``energy`` that noise explains, float64 [d]."""
        # a squared normal variate has twice the squared variance for variance
        return 2 * self.noise.square() / self._rounds.pow(4)

    @property
    def release_noise(self) -> Tensor:
        """Mean variance of the noise in a release, float64 [d]."""
        return self.noise / self._rounds

    def upper_bound(self, group: Tensor | None = None) -> Tensor:
        """Energy plus one standard deviation of its noise, float64 [d]: what to rank by if some are known better.

        Args:
            group: Index of the group of each coordinate, int64 [d], who share a mean; None = each by itself.
        """
        energy, doubt = self.energy, self.doubt
        if group is not None:
            energy, doubt = means(energy, group)[group], (means(doubt, group) / torch.bincount(group))[group]
        return energy + doubt.sqrt()

    @property
    def _rounds(self) -> Tensor:
        return self.rounds.clamp(min=1)

    def state(self) -> dict[str, Tensor]:
        """What has been learnt, by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def restored(self, state: Mapping[str, Tensor]) -> "Drift":
        """Go on from what ``state`` gave.

        Raises:
            MessageError: If it belongs to another model.
        """
        return Drift(**taken(state, self.state(), "drift"))
