"""A table of results as Markdown, for people, and as JSON.

For every row and method: mean and standard deviation over the seeds, of the last iterate and, where it is on, of the
average of the weights. For every method but the first: the difference between the first and it, paired by seed, with
the p value of Student's paired test. And what the table was made with: seeds, commit, code, machine.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from simulations.tables import QUALITIES, Row, Table

Results = Mapping[tuple[str, str], list[dict[str, Any]]]
"""What stands in ``result.json`` of each seed's run, by name of row and of method."""

_MOST_ACROSS = 3


def summary(table: Table, results: Results, seeds: int, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the table says, for JSON.

    Args:
        table: What was run.
        results: One for each seed, in the order of seeds.
        seeds: How many.
        machine: Commit and hardware.
    """
    runs = [run for each in results.values() for run in each]
    changes = "".join(f" -c {key}={value}" for key, value in table.changes.items())
    return {
        "table": table.name,
        "title": table.title,
        "quality": table.quality,
        "command": f"adadpigu reproduce {table.called or table.name} --seeds {seeds}{changes}",
        "seeds": list(range(seeds)),
        "code": sorted({run["code"] for run in runs}),
        "rounds": sorted({run["rounds"] for run in runs}),
        **machine,
        "rows": [_row(row, table, results) for row in table.rows],
    }


def _row(row: Row, table: Table, results: Results) -> dict[str, Any]:
    methods = table.methods
    first = _qualities(table, results[row.name, methods[0].name])
    cells = {}
    for method in methods:
        runs = results[row.name, method.name]
        values = _qualities(table, runs)
        cells[method.name] = {
            "title": method.title,
            "private": method.private,
            "values": values,
            **spread(values),
            "average": spread(_qualities(table, runs, "average")) if all("average" in run for run in runs) else None,
            "difference": None if method is methods[0] else paired(first, values),
            "largest_epsilon": _largest_epsilon(runs),
            "largest_share": _largest_share(runs),
            "bytes_up": statistics.mean(run["bytes_up"] for run in runs),
            "diverged": sum(bool(run.get("diverged")) for run in runs),
        }
    budgets = {client["target_epsilon"] for run in results[row.name, methods[0].name] for client in run["clients"]}
    return {"label": row.label, "settings": row.settings.name, "target_epsilon": max(budgets), "methods": cells}


def _qualities(table: Table, runs: list[dict[str, Any]], of: str = "") -> list[float]:
    return [100 * (run[of] if of else run)[table.quality] for run in runs]


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation; the deviation of one value is taken as 0.

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'stddev': 1.4142135623730951}
    """
    return {"mean": statistics.mean(values), "stddev": statistics.stdev(values) if len(values) > 1 else 0.0}


def paired(first: list[float], second: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation of first minus second, and the two-sided p value of the paired t-test.

    The p value is None where there is no test: of one pair, or of differences that are all the same.
    """
    from scipy import stats  # noqa: PLC0415 - takes a second

    differences = [one - other for one, other in zip(first, second, strict=True)]
    found = spread(differences)
    testable = len(differences) > 1 and found["stddev"] > 1e-12 * max(map(abs, differences))
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue) if testable else None
    return {**found, "p_value": p_value}


def _largest_epsilon(runs: list[dict[str, Any]]) -> float | None:
    epsilons = [client["epsilon"] for run in runs for client in run["clients"]]
    return None if None in epsilons else max(epsilons)


def _largest_share(runs: list[dict[str, Any]]) -> float | None:
    shares = [
        client["epsilon"] and client["epsilon"] / client["target_epsilon"] for run in runs for client in run["clients"]
    ]
    return None if None in shares else max(shares)


def markdown(found: Mapping[str, Any]) -> str:
    """Write a summary as a table for people: methods side by side, or one below the other if they are many."""
    across = len(found["rows"][0]["methods"]) <= _MOST_ACROSS
    quality = QUALITIES[found["quality"]]
    columns, lines = _across(found["rows"]) if across else _down(found["rows"], quality)
    count = len(found["seeds"])
    return "\n".join(
        [
            f"**{found['title']}** ({quality} on test data in %, last iterate, mean ± standard deviation over {count} "
            f"seed{'s' if count > 1 else ''}{_about_averages(found)})",
            "",
            *(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines)),
            "",
            _origin(found),
            "",
        ]
    )


def _across(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: one a row."""
    headings = [_heading(cell) for cell in rows[0]["methods"].values()]
    differences = [f"{headings[0]} minus {heading}" for heading in headings[1:]]
    lines = []
    for row in rows:
        cells = list(row["methods"].values())
        compared = [difference(cell["difference"]) for cell in cells[1:]]
        lines.append([row["label"], *map(_cell, cells), *compared, _spent(cells)])
    return ["", *headings, *differences, "largest epsilon spent"], lines


def _down(rows: Sequence[Mapping[str, Any]], quality: str) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: one a row and method."""
    first = _heading(next(iter(rows[0]["methods"].values())))
    columns = ["", "", quality, f"{first} minus it", "sent by all clients, MB", "largest epsilon spent"]
    lines = []
    for row in rows:
        for number, cell in enumerate(row["methods"].values()):
            label = row["label"] if number == 0 else ""
            compared = "" if cell["difference"] is None else difference(cell["difference"])
            sent = f"{cell['bytes_up'] / 1e6:.3g}"
            lines.append([label, _heading(cell), _cell(cell), compared, sent, _spent([cell])])
    return columns, lines


def _heading(cell: Mapping[str, Any]) -> str:
    return str(cell["title"]) + ("" if cell["private"] else " (not private)")


def _spent(cells: Sequence[Mapping[str, Any]]) -> str:
    epsilons = [cell["largest_epsilon"] for cell in cells]
    return "unbounded" if None in epsilons else f"{max(epsilons):.3f}"


def _about_averages(found: Mapping[str, Any]) -> str:
    averaged = any(cell["average"] for row in found["rows"] for cell in row["methods"].values())
    return "; in brackets: averaged weights" if averaged else ""


def _cell(cell: Mapping[str, Any]) -> str:
    text = f"{cell['mean']:.2f} ± {cell['stddev']:.2f}"
    if cell["average"]:
        text += f" ({cell['average']['mean']:.2f})"
    return text + (f", {cell['diverged']} diverged" if cell["diverged"] else "")


def difference(found: Mapping[str, Any]) -> str:
    """Write down what ``paired`` has found."""
    text = f"{found['mean']:+.2f} ± {found['stddev']:.2f}"
    return text if found["p_value"] is None else f"{text}, p {_rounded(found['p_value'])}"


def _rounded(p_value: float) -> str:
    return f"{p_value:.2f}" if p_value >= 0.1 else f"{p_value:.1g}"


def _origin(found: Mapping[str, Any]) -> str:
    rounds = "/".join(map(str, found["rounds"]))
    commit = f"commit {found['commit']}, " if found["commit"] else ""
    return (
        f"`{found['command']}`; seeds 0 to {found['seeds'][-1]}, {rounds} rounds; {commit}code "
        f"{'/'.join(found['code'])}; {found['cores']} cores {found['cpu']}, {found['gpu'] or 'no GPU'}."
    )
