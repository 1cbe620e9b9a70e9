"""The table of the step benchmark."""

from rich.markup import escape
from rich.table import Table

from simulations.benchmarks.plan import ADADPIGU, BOUNDS, PLAIN, Plan
from simulations.benchmarks.step import Row


def tables(rows: list[Row], plan: Plan) -> list[Table]:
    """Give one table with every method, and one that holds AdaDPIGU against its bounds where they apply."""
    found = [_methods(rows, plan)]
    if ADADPIGU in plan.methods and plan.bounds_apply:
        found.append(_verdicts([row for row in rows if row["method"] == ADADPIGU]))
    return found


def _methods(rows: list[Row], plan: Plan) -> Table:
    views = f" of {plan.views} views" if plan.views > 1 else ""
    title = f"One training step: {plan.batch} records{views}, {plan.device}, {plan.precision}, threads: {plan.threads}"
    table = Table(title=title, caption=_remarks(rows), caption_justify="left")
    for heading in ("model", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "ratio", "peak MB", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in {None, row["model"]}:
            table.add_section()
        table.add_row("" if row["model"] == previous else row["model"], row["method"], *_figures(row))
        previous = row["model"]
    return table


def _remarks(rows: list[Row]) -> str:
    fastest = [f"{row['model']} {row['layout']}" for row in rows if row["method"] == PLAIN]
    lines = [f"plain, in its fastest layout ({', '.join(fastest)}), is 1; its memory in the default layout is 1"]
    lines += [f"{row['model']}, {row['method']}: {row['note']}" for row in rows if row["note"]]
    return escape("\n".join(lines))


def _figures(row: Row) -> list[str]:
    patterns = {"median_ms": "{:.1f}", "ratio": "{:.2f}", "peak_mb": "{:.0f}", "peak_ratio": "{:.2f}"}
    return [_number(row[key], pattern) for key, pattern in patterns.items()]


def _verdicts(rows: list[Row]) -> Table:
    table = Table(
        title="AdaDPIGU against its bounds",
        caption=(
            "time, memory: ratios to plain; faster: than Opacus' hooks and the same standardising, a parameter at a "
            "time; than naive: all at once"
        ),
        caption_justify="left",
    )
    table.add_column("model")
    for heading in ("time", "pass", "aim", "memory", "pass", "faster", "than naive", "pass"):
        table.add_column(heading, justify="right")
    for row in rows:
        bounds = BOUNDS[row["model"]]
        table.add_row(
            row["model"],
            _judged(row["ratio"], at_most=bounds.time),
            f"{bounds.time:g}",
            f"{bounds.time_aim:g}",
            _judged(row["peak_ratio"], at_most=bounds.memory),
            f"{bounds.memory:g}",
            _judged(row["speedup_over_opacus"], at_least=bounds.speedup),
            _judged(row["speedup_over_naive"], at_least=bounds.speedup),
            f"{bounds.speedup:g}",
        )
    return table


def _judged(value: float | None, at_most: float = float("inf"), at_least: float = 0.0) -> str:
    text = _number(value, "{:.2f}")
    if value is None:
        return text
    return f"[green]{text}[/green]" if at_least <= value <= at_most else f"[red]{text}[/red]"


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)
