"""Where a run stands: everything that the server must not forget between two rounds."""

import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core.adaptive_clipping import RunningStatistics
from adadpigu_core.configuration import Configuration, Value, flatten
from adadpigu_core.drift import Drift
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.grouping import shared
from adadpigu_core.importance import DRIFT
from adadpigu_core.parameters import ParameterLayout
from adadpigu_core.shrinkage import Shrinkage
from server.optimiser import ServerOptimiser
from server.schedule import Importance
from server.tally import Tally

_IMPORTANCE, _STATISTICS, _SHRINKAGE, _DRIFT = "importance.", "statistics.", "shrinkage.", "drift."
_FIXED = "fixed"
# A run may go on with others of these: they decide on nothing that a client has planned for or released.
_FREE_TO_CHANGE = ("runtime.", "federation.round-timeout", "federation.start-timeout", "federation.clients")


@dataclass
class ServerState:
    """The state of a run.

    Args:
        run: Random identity of the run; clients key their plans by it.
        layout: Order of the parameters.
        round: Last completed round.
        optimiser: Weights and moments.
        importance: What coordinates are ranked by.
        statistics: Of aggregated releases.
        shrinkage: What is known of signal and noise in them.
        drift: What is known of the signal from both phases, if coordinates are to be ranked anew by it; else empty.
        tally: What every client has spent.
        bytes_up: Payload received.
        bytes_down: Payload sent.
        seconds: Time spent in rounds.
        learning_rate: Of private steps; 0 until the plan has given it, if it is to.
        settings: Those that must stay the same for the whole run.
        fixed: What the model has beside its trainable weights, float32 [f].
    """

    run: str
    layout: ParameterLayout
    round: int
    optimiser: ServerOptimiser
    importance: Importance
    statistics: RunningStatistics
    shrinkage: Shrinkage
    drift: Drift
    tally: Tally
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    settings: dict[str, Value] = field(default_factory=dict)
    fixed: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def fresh(cls, configuration: Configuration, layout: ParameterLayout) -> "ServerState":
        """The state before the first round."""
        d = layout.num_parameters
        return cls(
            run=uuid.uuid4().hex,
            layout=layout,
            round=0,
            optimiser=ServerOptimiser.of(configuration, torch.zeros(d)),
            importance=Importance(
                configuration.pretraining.ranking,
                d,
                configuration.seed,
                shared(layout, configuration.retention.granularity),
                signed=configuration.pretraining.measure == DRIFT,
            ),
            statistics=RunningStatistics.neutral(configuration.adaptive_clipping.clipping, layout),
            shrinkage=Shrinkage.neutral(configuration.shrinkage.rule, configuration.shrinkage.granularity, layout),
            drift=Drift.neutral(d if configuration.retention.rerank_every else 0),
            tally=Tally(),
            learning_rate=configuration.optimiser.local_learning_rate,
            settings={
                key: value for key, value in flatten(configuration).items() if not key.startswith(_FREE_TO_CHANGE)
            },
        )

    def dump(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Take the state apart into arrays and plain values."""
        tensors: dict[str, Tensor] = {
            **self.optimiser.state(),
            **{_IMPORTANCE + key: scores for key, scores in self.importance.scores.items()},
            **{_STATISTICS + name: value for name, value in self.statistics.state().items()},
            **{_SHRINKAGE + name: value for name, value in self.shrinkage.state().items()},
            _FIXED: self.fixed,
            **{_DRIFT + name: value for name, value in self.drift.state().items() if len(value)},
        }
        values = {
            "run": self.run,
            "layout": self.layout.fingerprint,
            "settings": self.settings,
            "round": self.round,
            "tally": self.tally.state(),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "learning_rate": self.learning_rate,
            "importance_settled": self.importance.settled,
        }
        return {name: tensor.numpy() for name, tensor in tensors.items()}, values

    def restore(self, arrays: dict[str, NDArray[np.generic]], values: dict[str, Any]) -> None:
        """Go on from what ``dump`` gave.

        Raises:
            ConfigurationError: If that belongs to another model or to other settings.
        """
        self._check(values)
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        self.optimiser.restore(tensors)
        for name, tensor in tensors.items():
            if name.startswith(_IMPORTANCE):
                self.importance.scores[name.removeprefix(_IMPORTANCE)] = tensor
        self.importance.settled = values["importance_settled"]
        self.statistics = self.statistics.restored(_of(_STATISTICS, tensors))
        self.shrinkage = self.shrinkage.restored(_of(_SHRINKAGE, tensors))
        self.fixed = tensors.get(_FIXED, self.fixed)
        if len(self.drift.rounds):
            self.drift = self.drift.restored(_of(_DRIFT, tensors))
        self.tally = Tally.restore(values["tally"])
        self.run, self.round = values["run"], values["round"]
        self.bytes_up, self.bytes_down = values["bytes_up"], values["bytes_down"]
        self.seconds = values["seconds"]
        self.learning_rate = values.get("learning_rate", self.learning_rate)

    def _check(self, values: dict[str, Any]) -> None:
        known = values.get("settings", {})
        different = [f"{key} = {known.get(key)!r}" for key, value in self.settings.items() if known.get(key) != value]
        if different:
            listed = ", ".join(different)
            raise ConfigurationError(f"its checkpoint belongs to a run with {listed}; use these, or start a new run")
        if values["layout"] != self.layout.fingerprint:
            raise ConfigurationError("its checkpoint belongs to another model; start a new run")


def _of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
