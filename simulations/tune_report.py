"""How a search is shown: its cost before it starts, its front when it is over."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from simulations.console import Console
from simulations.rounding import up
from simulations.selection_cost import RandomTrials
from simulations.svg_charts import Chart, Line
from simulations.tune import Point, Search, front

if TYPE_CHECKING:
    from pathlib import Path

FIGURE = "front.svg"
_BY_HAND = (
    "No ledger is charged for it. Before it starts, take it off the budget of every data set in it: of a budget\n"
    "(epsilon, delta), the search leaves (epsilon minus its epsilon, delta minus its delta) for everything else."
)
_STYLE = (
    "<style>svg{background:#fff;font:12px sans-serif}.grid{stroke:#ddd}.line,circle{fill:none;stroke-width:2}"
    ".c0{stroke:#1f5fae}.c1{stroke:#767676}.middle{text-anchor:middle}.end{text-anchor:end}</style>"
)


def costs(found: Sequence[tuple[float, float]], total: float, delta: float, trials: RandomTrials | None) -> Table:
    """What a search on private data costs.

    Args:
        found: Epsilon of one trial and of the search, at each budget.
        total: Epsilon of the search at all budgets together.
        delta: Of all these epsilons.
        trials: How many there are.
    """
    how = f"{trials.distribution}, mean {trials.mean:g}" if trials else ""
    title = f"Epsilon of the search at delta {delta:g} ({how} trials; only the best is released)"
    table = Table(title=title, caption=_BY_HAND, caption_justify="left")
    table.add_column("one trial", justify="right")
    table.add_column("the whole search", justify="right")
    for once, whole in found:
        table.add_row(f"{once:g}", up(whole, 3))
    if len(found) > 1:
        table.add_row("all budgets together", up(total, 3))
    return table


def show(console: Console, points: Sequence[Point], search: Search) -> None:
    """Print the front, draw it, and say where the best settings are."""
    best = front(points)
    table = Table(title="Accuracy against epsilon: trials that no other beats")
    for heading in ("epsilon", "accuracy", "settings"):
        table.add_column(heading, justify="left" if heading == "settings" else "right", overflow="fold")
    for point in best:
        chosen = {key: value for key, value in point.settings.items() if search.flat.get(key) != value}
        chosen.pop("privacy.target-epsilon", None)
        text = ", ".join(f"{key} = {value}" for key, value in chosen.items())
        table.add_row(up(point.epsilon, 3), f"{point.accuracy:.4f}", text)
    console.print(table)
    path = search.output / FIGURE
    _draw(points, path)
    for target in sorted({point.target for point in points}):
        name = search.output / f"best-epsilon-{target:g}.toml"
        console.print(f"adadpigu simulate --config {name}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"The figure is {path}", markup=False, highlight=False, soft_wrap=True)


def _draw(points: Sequence[Point], path: "Path") -> None:
    """Draw all trials, and a line through those that no other beats."""
    best = front(points)
    lines = [
        Line("trials that no other beats", tuple((point.epsilon, point.accuracy) for point in best), marked=True),
        Line(
            "other trials",
            tuple((point.epsilon, point.accuracy) for point in points if point not in best),
            marked=True,
            joined=False,
        ),
    ]
    x_label = "epsilon (on the line: trials that no other beats)"
    svg = Chart("front", "Accuracy against epsilon", x_label, "accuracy", tuple(lines)).svg()
    path.write_text(svg.replace("<title", f"{_STYLE}<title", 1), encoding="utf-8")
