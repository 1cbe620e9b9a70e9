"""Where runs are written that name no folder."""

import os
from pathlib import Path

from adadpigu_core.configuration import Configuration


def run_folder(configuration: Configuration, flower_run: int) -> Path:
    """Folder of a run: as configured, or one under ``$ADADPIGU_HOME`` (default ``~/.adadpigu``) by Flower's run id."""
    if configuration.runtime.output:
        return Path(configuration.runtime.output).expanduser()
    home = os.environ.get("ADADPIGU_HOME") or Path.home() / ".adadpigu"
    return Path(home).expanduser() / "runs" / f"flwr-{flower_run}"
