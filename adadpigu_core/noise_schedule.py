"""Budget over time: noise that changes from round to round in a way that is fixed before the first one.

A schedule says by which factor the noise multiplier of a training round differs from that of the first. It depends on
nothing but the number of the round, so that a whole plan is calibrated to its target at once and both sides of a
federation know every round's noise. Less noise towards the end spends more of the budget there.

Smooth schedules go in a few stairs: every kind of event costs time in the accounting, and the stairs are what is
accounted for, so that nothing about them is approximate.
"""

import math
from dataclasses import dataclass

from adadpigu_core.exceptions import ConfigurationError

NOISE_SCHEDULES = ("constant", "linear", "cosine", "step")
LEAST_RATIO, LARGEST_RATIO = 0.1, 10.0
_STAIRS = 6  # jumps of linear and cosine
_STEPS = 3  # jumps of step


@dataclass(frozen=True)
class NoiseSchedule:
    """How the noise multiplier moves over the training rounds.

    Args:
        kind: ``constant``, ``linear``, ``cosine`` (slow at both ends) or ``step`` (three equal jumps).
        final_ratio: Noise multiplier of the last round over that of the first, in [0.1, 10]; ``constant`` ignores it.
    """

    kind: str = "constant"
    final_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in NOISE_SCHEDULES:
            raise ConfigurationError(
                f"noise_schedule.kind: unknown value {self.kind!r}; use one of {', '.join(NOISE_SCHEDULES)}"
            )
        if not LEAST_RATIO <= self.final_ratio <= LARGEST_RATIO:
            raise ConfigurationError(
                f"noise_schedule.final_ratio: must be in [{LEAST_RATIO}, {LARGEST_RATIO:g}], got {self.final_ratio}"
            )

    def factor(self, index: int, num_rounds: int) -> float:
        """Noise multiplier of a training round over that of the first.

        Args:
            index: Number of the training round from 0; numbers beyond the last count as the last.
            num_rounds: How many training rounds there are.
        """
        stairs = self._stairs(num_rounds)
        stair = min(max(index, 0) * (stairs + 1) // num_rounds, stairs) if num_rounds else 0
        return self._height(stair, stairs)

    def stages(self, num_rounds: int) -> list[tuple[float, int]]:
        """Runs of equal factors, in the order of time: factor, number of rounds."""
        stairs = self._stairs(num_rounds)
        starts = [-(-stair * num_rounds // (stairs + 1)) for stair in range(stairs + 2)]
        return [(self._height(stair, stairs), starts[stair + 1] - starts[stair]) for stair in range(stairs + 1)]

    def _stairs(self, num_rounds: int) -> int:
        most = {"constant": 0, "step": _STEPS}.get(self.kind, _STAIRS)
        return max(min(most, num_rounds - 1), 0)

    def _height(self, stair: int, stairs: int) -> float:
        progress = stair / stairs if stairs else 0.0
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1.0 + (self.final_ratio - 1.0) * progress


CONSTANT = NoiseSchedule()
