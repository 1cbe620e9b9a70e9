"""Metrics of a run for TensorBoard, for those who live there; an extra, imported only where it is asked for."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import ConfigurationError

FOLDER = "tensorboard"
_ONE_VALUE = ("accuracy", "loss", "epsilon", "retained", "clients", "seconds", "bytes_up", "bytes_down")
_SEVERAL = ("epsilons", "retained_by_layer", "stages")


class TensorBoardLog:
    """Writes the metrics of every round.

    Args:
        folder: Of the run; the log is in a folder of its own below it.

    Raises:
        ConfigurationError: If TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise ConfigurationError(
                "runtime.tensorboard: TensorBoard is not installed: pip install 'adadpigu[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder / FOLDER))

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Write the line of metrics of a round."""
        named = {key: metrics.get(key) for key in _ONE_VALUE}
        named |= {f"{key}/{name}": value for key in _SEVERAL for name, value in metrics.get(key, {}).items()}
        for name, value in named.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, metrics["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
