"""A table of results as a picture: accuracy against bytes sent, or against epsilon.

Every method of a row is a point, the mean over the seeds, with the standard deviation as its bar. Up and to the left is
better: the same accuracy for less, or more for the same. Against epsilon, rows whose labels differ in nothing else
share a panel, and the points of a method are joined.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import ConfigurationError
from simulations.tables import QUALITIES

_EPSILON = re.compile(r"(, )?epsilon [\d.]+")
_SYMBOLS = ("o", "s", "^", "D", "v", "P", "X", "*")


def read(path: Path) -> dict[str, Any]:
    """Read what a table has written.

    Raises:
        ConfigurationError: If it is not there, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _ = [(row["methods"], row["label"]) for row in found["rows"]], found["title"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: holds no table ({error}); 'adadpigu reproduce TABLE' writes table.json"
        ) from error
    return dict(found)


def draw(found: Mapping[str, Any], path: Path, against: str = "bytes") -> None:
    """Draw a table.

    Args:
        found: What stands in its ``table.json``.
        path: Picture to write, in a format that its ending names.
        against: ``bytes`` or ``epsilon``.

    Raises:
        ConfigurationError: If it cannot be written, or a table does not say its epsilons.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415  # the same

    panels = _panels(found["rows"], against)
    figure = Figure(figsize=(2.5 + 4.0 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(found["title"], fontsize=10)
    for number, (title, rows) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        _draw_panel(axes, rows, against)
        axes.set_ylabel(f"{QUALITIES.get(found.get('quality', ''), 'accuracy')} on test data, %")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be written ({error})") from error


def _panels(rows: Sequence[Mapping[str, Any]], against: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Titles of panels, and the rows in each."""
    if against == "bytes":
        return [(row["label"], [row]) for row in rows]
    if not all("target_epsilon" in row for row in rows):
        raise ConfigurationError("the table does not say its epsilons; 'adadpigu reproduce TABLE' writes it anew")
    panels = defaultdict(list)
    for row in sorted(rows, key=lambda row: float(row["target_epsilon"])):
        panels[_EPSILON.sub("", row["label"])].append(row)
    return list(panels.items())


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], against: str) -> None:
    # with ten colours, the pairs of a symbol and a colour repeat after 40 methods
    for symbol, (name, cell) in zip(itertools.cycle(_SYMBOLS), rows[0]["methods"].items(), strict=False):
        cells = [row["methods"][name] for row in rows]
        across = [c["bytes_up"] / 1e6 for c in cells] if against == "bytes" else [r["target_epsilon"] for r in rows]
        axes.errorbar(
            across,
            [c["mean"] for c in cells],
            [c["stddev"] for c in cells],
            fmt=symbol if len(rows) == 1 else f"{symbol}-",
            label=cell["title"] + ("" if cell["private"] else " (not private)"),
            capsize=3,
            markerfacecolor=None if cell["private"] else "none",
        )
    if against == "bytes":
        axes.set_xlabel("sent by all clients, MB")
        axes.set_xlim(left=0)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["target_epsilon"] for row in rows], [f"{row['target_epsilon']:g}" for row in rows])
        axes.set_xlabel("epsilon of each client")
