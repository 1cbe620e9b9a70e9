"""Where a run stands: everything that the server must not forget between two rounds."""

import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core.adaptive_clipping import RunningStatistics
from adadpigu_core.configuration import Configuration
from adadpigu_core.parameters import ParameterLayout
from server.optimiser import ServerOptimiser
from server.schedule import Importance
from server.tally import Tally

_IMPORTANCE, _STATISTICS = "importance.", "statistics."


@dataclass
class ServerState:
    """The state of a run.

    Args:
        run: Random identity of the run; clients key their plans by it.
        layout: Order of the parameters.
        round: Last completed round.
        optimiser: Weights and moments.
        importance: What pretraining has found.
        statistics: Of aggregated releases.
        tally: What every client has spent.
        bytes_up: Payload received.
        bytes_down: Payload sent.
        seconds: Time spent in rounds.
    """

    run: str
    layout: ParameterLayout
    round: int
    optimiser: ServerOptimiser
    importance: Importance
    statistics: RunningStatistics
    tally: Tally
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    @classmethod
    def fresh(cls, configuration: Configuration, layout: ParameterLayout) -> "ServerState":
        """The state before the first round."""
        d = layout.num_parameters
        return cls(
            run=uuid.uuid4().hex,
            layout=layout,
            round=0,
            optimiser=ServerOptimiser(configuration.optimiser, torch.zeros(d)),
            importance=Importance(configuration.pretraining.ranking, d, configuration.seed),
            statistics=RunningStatistics.neutral(configuration.adaptive_clipping.clipping, layout),
            tally=Tally(),
        )

    def dump(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Take the state apart into arrays and plain values."""
        tensors: dict[str, Tensor] = {
            **self.optimiser.state(),
            **{_IMPORTANCE + key: scores for key, scores in self.importance.scores.items()},
            **{_STATISTICS + name: getattr(self.statistics, name) for name in ("mean", "moment", "weight")},
        }
        values = {
            "run": self.run,
            "layout": self.layout.fingerprint,
            "round": self.round,
            "tally": self.tally.state(),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
        }
        return {name: tensor.numpy() for name, tensor in tensors.items()}, values

    def restore(self, arrays: dict[str, NDArray[np.generic]], values: dict[str, Any]) -> None:
        """Go on from what ``dump`` gave."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        self.optimiser.restore(tensors)
        for name, tensor in tensors.items():
            if name.startswith(_IMPORTANCE):
                self.importance.scores[name.removeprefix(_IMPORTANCE)] = tensor
        mean, moment, weight = (tensors[_STATISTICS + name] for name in ("mean", "moment", "weight"))
        self.statistics = replace(self.statistics, mean=mean, moment=moment, weight=weight)
        self.tally = Tally.restore(values["tally"])
        self.run, self.round = values["run"], values["round"]
        self.bytes_up, self.bytes_down = values["bytes_up"], values["bytes_down"]
        self.seconds = values["seconds"]
