"""What it costs to choose settings by results on private data.

A search that runs a mechanism again and again and keeps the best output releases more than one run. If the number of
runs is random and nobody sees the others, the whole search is little more expensive than a few runs (Papernot and
Steinke, arXiv 2110.03620). The theorem wants runs that are alike and independent: settings drawn at random from a fixed
distribution, all with the same events, none stopped in view of others, and a score that is computed from the released
model and public data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting import dp_event, rdp

from adadpigu_core.accounting import Event
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.sampling import Randomness

# whole ones: the series of others do not always converge, and are slow; leaving them out errs on the safe side
_ORDERS = (*range(2, 129), 160, 192, 256, 512)
DISTRIBUTIONS = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}


@dataclass(frozen=True)
class RandomTrials:
    """A random number of trials.

    Args:
        distribution: ``geometric`` or ``logarithmic`` (at least one trial) or ``poisson`` (perhaps none).
        mean: Expected number, above 1.
    """

    distribution: str
    mean: float

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ConfigurationError(f"--distribution: {self.distribution!r} is none of {', '.join(DISTRIBUTIONS)}")
        if not 1 < self.mean <= 10_000:
            raise ConfigurationError(f"--trials: the mean must be above 1 and at most 10000, got {self.mean}")

    def epsilon(self, searches: Sequence[Sequence[Event]], delta: float) -> float:
        """Epsilon of one or more searches together, by Renyi accounting.

        Args:
            searches: For each of them the events of every trial.
            delta: Of all of them together. (Each at this delta, and epsilons added up, would be another guarantee.)
        """
        accountant = rdp.RdpAccountant(_ORDERS)
        for events in searches:
            once = dp_accounting.ComposedDpEvent([event.dp_event() for event in events])
            accountant.compose(dp_event.RepeatAndSelectDpEvent(once, self.mean, DISTRIBUTIONS[self.distribution]))
        return float(accountant.get_epsilon(delta))

    def draw(self, randomness: Randomness) -> int:
        """Draw the number of trials; it must stay secret, as must all trials but the best."""
        target, number, below = float(randomness.uniform(1)[0]), 0, 0.0
        while number < 10**6:
            below += self._probability(number)
            if target < below:
                return number
            number += 1
        return number

    def _probability(self, number: int) -> float:
        if self.distribution == "poisson":
            return math.exp(number * math.log(self.mean) - self.mean - math.lgamma(number + 1))
        if number < 1:
            return 0.0
        if self.distribution == "geometric":
            return (1 - 1 / self.mean) ** (number - 1) / self.mean
        ratio = _logarithmic_ratio(self.mean)
        return float(ratio**number / (-math.log1p(-ratio) * number))


def _logarithmic_ratio(mean: float) -> float:
    """The parameter p of the logarithmic distribution, whose mean is -p / ((1 - p) log(1 - p))."""
    low, high = 0.0, 1.0 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        found = -middle / ((1 - middle) * np.log1p(-middle)) if middle else 1.0
        low, high = (middle, high) if found < mean else (low, middle)
    return high
