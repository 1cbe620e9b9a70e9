"""The folder that a run writes.

    config.toml      the configuration as resolved
    metrics.jsonl    one line a round
    privacy.json     the tally, after every round
    checkpoint.npz   everything that is needed to go on, or of a large model the list of its pieces
    checkpoint-*     those pieces, each small enough to be carried where files have a largest size
    model.npz        the parameters by name, when the run is over: a later run may start from them
    result.json      the outcome, after that

A simulation adds report.html, for people, clients.csv if its clients come from a list, and .lock, which it holds while
it goes on: a run is one process's.

Files are replaced in one step, so that a run that is killed leaves whole files. Pieces are named by what is in them:
those of a new checkpoint lie beside those of the old until ``checkpoint.npz`` names them. Numbers that are not finite,
which JSON does not know, are written as null: an epsilon of null is infinite.
"""

import fcntl
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adadpigu_core import archive
from adadpigu_core.exceptions import ConfigurationError, DataError

CONFIGURATION, METRICS, PRIVACY = "config.toml", "metrics.jsonl", "privacy.json"
CHECKPOINT, MODEL, RESULT = "checkpoint.npz", "model.npz", "result.json"
LOCK = ".lock"
LARGEST_PIECE = 12 * 2**20  # bytes: one vector of three million parameters
Checkpoint = tuple[dict[str, NDArray[np.generic]], dict[str, Any]]
_PIECES, _PIECE = "pieces", re.compile(r"\.?checkpoint-[0-9a-f]{64}(\.new)?")


class Claim:
    """Makes a run this process's alone, until it is closed or forgotten.

    Raises:
        ConfigurationError: If the run is another process's, or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._lock = -1
        try:
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigurationError(f"runtime.output: {path} is not writable ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigurationError(f"runtime.output: another process is working on the run in {path}") from error

    def close(self) -> None:
        """Let others have it."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    __del__ = close


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: The folder; made if it does not exist.

    Raises:
        ConfigurationError: If it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"runtime.output: {path} cannot be made ({error.strerror})") from error
        if not os.access(self.path, os.W_OK):
            raise ConfigurationError(f"runtime.output: {path} is not writable")

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a binary file."""
        self._replace(name, data)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        self._replace(name, text.encode())

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Add the line of one round."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_line(metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """Read all lines; a line cut short by a crash does not count."""
        lines = []
        if (self.path / METRICS).exists():
            for line in (self.path / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue
        return [line for line in lines if isinstance(line, dict) and "round" in line]

    def keep_metrics(self, last_round: int) -> None:
        """Forget lines of rounds after a checkpoint."""
        kept = [line for line in self.metrics() if line["round"] <= last_round]
        self.write_text(METRICS, "".join(map(_line, kept)))

    def save_checkpoint(self, arrays: dict[str, NDArray[Any]], values: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        data = archive.pack(arrays, values)
        names = []
        if len(data) > LARGEST_PIECE:
            for start in range(0, len(data), LARGEST_PIECE):
                piece = data[start : start + LARGEST_PIECE]
                names.append(f"checkpoint-{hashlib.sha256(piece).hexdigest()}")
                self._replace(names[-1], piece)
            data = archive.pack({}, {_PIECES: names})
        self._replace(CHECKPOINT, data)
        for path in self.path.iterdir():  # pieces of the checkpoint before, or of one that was never finished
            if _PIECE.fullmatch(path.name) and path.name not in names:
                path.unlink()

    def load_checkpoint(self) -> Checkpoint | None:
        """Read the checkpoint; None if there is none.

        Raises:
            DataError: If it is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            arrays, values = archive.unpack(path.read_bytes())
            if _PIECES in values:
                arrays, values = archive.unpack(self._joined(values[_PIECES]))
        except (DataError, FileNotFoundError) as error:
            raise DataError(f"{path}: the checkpoint is damaged; start a new run") from error
        return arrays, values

    def _joined(self, names: object) -> bytes:
        if not isinstance(names, list) or not all(isinstance(name, str) and _PIECE.fullmatch(name) for name in names):
            raise DataError(f"{names!r} are no pieces of a checkpoint")
        return b"".join((self.path / name).read_bytes() for name in names)

    def _replace(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.new"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, is to outlast a power cut
        finally:
            os.close(folder)


def _line(metrics: dict[str, Any]) -> str:
    return json.dumps(_finite(metrics), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
