"""A table of results as a picture: accuracy against bytes sent.

Every method of a row is a point, the mean over the seeds, with the standard deviation as its bar. Up and to the left is
better: the same accuracy for less, or more for the same.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import ConfigurationError

_SYMBOLS = ("o", "s", "^", "D", "v", "P", "X", "*")


def read(path: Path) -> dict[str, Any]:
    """Read what a table has written.

    Raises:
        ConfigurationError: If it is not there, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _ = [row["methods"] for row in found["rows"]], found["title"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: holds no table ({error}); 'adadpigu reproduce TABLE' writes table.json"
        ) from error
    return dict(found)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw a table.

    Args:
        found: What stands in its ``table.json``.
        path: Picture to write, in a format that its ending names.

    Raises:
        ConfigurationError: If it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415  # the same

    rows = found["rows"]
    figure = Figure(figsize=(2.5 + 4.0 * len(rows), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(found["title"], fontsize=10)
    for number, row in enumerate(rows, start=1):
        axes = figure.add_subplot(1, len(rows), number)
        # with ten colours, the pairs of a symbol and a colour repeat after 40 methods
        for symbol, cell in zip(itertools.cycle(_SYMBOLS), row["methods"].values(), strict=False):
            label = cell["title"] + ("" if cell["private"] else " (not private)")
            face = None if cell["private"] else "none"
            megabytes = cell["bytes_up"] / 1e6
            axes.errorbar(
                megabytes, cell["mean"], cell["stddev"], fmt=symbol, label=label, capsize=3, markerfacecolor=face
            )
        axes.set_xlabel("sent by all clients, MB")
        axes.set_ylabel("accuracy on test data, %")
        axes.set_title(row["label"], fontsize=10)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be written ({error})") from error
