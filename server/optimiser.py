"""The server's step: post-processing of released updates by one of torch's optimisers.

The mean update plays the part of a negative gradient. Coordinates that nobody retained do not move, even if the
optimiser still remembers a direction for them. It fades round by round as if their updates were zero, so that one that
is left out for a while and comes back is not thrown by what was remembered long ago.

Beside the weights goes, if it is wanted, an exponential average of them over the rounds, which is evaluated and never
sent. Until the decay is reached it forgets as a mean over the later half of the rounds does, so that the start is gone
soon.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adadpigu_core.configuration import Configuration, OptimiserSettings


def momentum_of(configuration: Configuration) -> float:
    """Momentum of a run: where none is set, it averages over a tenth of the rounds, over 3 at least and 10 at most."""
    own = configuration.optimiser.momentum
    return own if own >= 0 else min(0.9, max(0.7, 1 - 10 / configuration.federation.num_rounds))


class ServerOptimiser:
    """Moves the weights by mean updates.

    Args:
        settings: Which optimiser, and its rates; momentum at least 0.
        weights: Weights to start from, float32 [d].
    """

    def __init__(self, settings: OptimiserSettings, weights: Tensor) -> None:
        self._settings = settings
        self._weights = torch.nn.Parameter(weights.clone())
        self._average = weights.clone() if settings.average_decay > 0 else None
        self._optimiser: torch.optim.Optimizer
        if settings.name == "adam":
            self._optimiser = torch.optim.Adam([self._weights], betas=(settings.momentum, 0.99), eps=1e-4)
        else:
            self._optimiser = torch.optim.SGD([self._weights], momentum=settings.momentum)

    @classmethod
    def of(cls, configuration: Configuration, weights: Tensor) -> "ServerOptimiser":
        """The optimiser of a run, with its momentum."""
        return cls(replace(configuration.optimiser, momentum=momentum_of(configuration)), weights)

    @property
    def weights(self) -> Tensor:
        """Current weights, float32 [d]."""
        return self._weights.detach().clone()

    @property
    def average(self) -> Tensor | None:
        """Average of the weights, float32 [d]; None if none is kept."""
        return None if self._average is None else self._average.clone()

    def reset(self, weights: Tensor) -> None:
        """Start from other weights, with nothing remembered."""
        with torch.no_grad():
            self._weights.copy_(weights)
        if self._average is not None:
            self._average = weights.clone()
        self._optimiser.state.clear()

    def step(self, update: Tensor, mask: Tensor, round_number: int) -> bool:
        """Move the retained coordinates.

        Args:
            update: Mean update, [d].
            mask: Coordinates that move, bool [d].
            round_number: From 1; decides on the warm-up.

        Returns:
            Whether they moved. A step to numbers that are not finite is not taken and leaves no trace.
        """
        warmup = self._settings.warmup_rounds
        rate = self._settings.server_learning_rate * min(1.0, round_number / (warmup + 1))
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        before = self.state()
        self._weights.grad = -update
        self._optimiser.step()
        with torch.no_grad():
            self._weights.copy_(torch.where(mask, self._weights, before["weights"]))
        if all(bool(value.isfinite().all()) for value in self.state().values()):
            self._remember(round_number)
            return True
        self.restore(before)
        return False

    def _remember(self, round_number: int) -> None:
        if self._average is not None:
            decay = min(self._settings.average_decay, (round_number - 1) / (round_number + 1))
            self._average = torch.lerp(self.weights, self._average, decay)

    def state(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint."""
        moments = {f"optimiser.{name}": value for name, value in self._moments().items()}
        average = {} if self._average is None else {"average": self._average.clone()}
        return {"weights": self.weights, **average, **moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        with torch.no_grad():
            self._weights.copy_(state["weights"])
        if self._average is not None:
            self._average = state["average"].clone()
        moments: dict[str, Any] = {
            name.removeprefix("optimiser."): value for name, value in state.items() if name.startswith("optimiser.")
        }
        self._optimiser.state[self._weights] = moments

    def _moments(self) -> dict[str, Tensor]:
        stored = self._optimiser.state.get(self._weights, {})
        return {name: value.clone() for name, value in stored.items() if isinstance(value, Tensor)}
