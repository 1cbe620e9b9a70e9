"""A ledger as data and as tables: what was spent, by which run, and what is left."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.padding import Padding
from rich.table import Table

from adadpigu_core.accounting import epsilon
from adadpigu_core.ledger import Target
from adadpigu_core.ledger_history import DataSetHistory
from simulations.console import Console

_DELTA = 1e-5


def report(history: DataSetHistory, budgets: Mapping[str, Target] | None, delta: float | None) -> dict[str, Any]:
    """Everything about one data set in plain values, with every epsilon recomputed from the events.

    Args:
        history: The data set.
        budgets: Budgets of a policy, if one is given: what is left is known only then.
        delta: Delta of epsilon; None = that of the budget, else of the latest run, else 1e-5.
    """
    target = (budgets or {}).get(history.name)
    latest = [*history.targets.values()][-1:]
    at = delta if delta is not None else next((known.delta for known in ([target] if target else latest)), _DELTA)
    spent = epsilon(history.events, at)
    left = max(target.epsilon - epsilon(history.events, target.delta), 0.0) if target else None
    return {
        "data_set": history.name,
        "id": history.id,
        "since": _iso(history.since),
        "delta": at,
        "epsilon": spent,
        "budget": asdict(target) if target else None,
        "epsilon_left": left,
        "events": [asdict(event) for event in history.events],
        "runs": [*_runs(history, at)],
        "problems": [*history.problems(), *_beyond(history, budgets, target)],
    }


def _runs(history: DataSetHistory, delta: float) -> Iterator[dict[str, Any]]:
    before: list[Any] = []
    for run in history.runs:
        events = history.events_of(run)
        before += events
        charges = [charge for charge in history.charges if charge.run == run]
        target = history.targets.get(run)
        yield {
            "run": run,
            "first": _iso(charges[0].time),
            "last": _iso(charges[-1].time),
            "code": charges[-1].code,
            "rounds": len(charges),
            "target": asdict(target) if target else None,
            "epsilon_alone": epsilon(events, delta),
            "epsilon_with_all_before": epsilon(before, delta),
            "events": [asdict(event) for event in events],
        }


def _beyond(history: DataSetHistory, budgets: Mapping[str, Target] | None, target: Target | None) -> Iterator[str]:
    if budgets is None:
        return
    if target is None:
        yield "the policy has no budget for this data set"
    elif epsilon(history.events, target.delta) > target.epsilon:
        yield f"epsilon is beyond the budget of the policy, {target.epsilon:g} at delta {target.delta:g}"


def charges(history: DataSetHistory) -> list[dict[str, Any]]:
    """Every row, in the order in which they were made."""
    return [{**asdict(charge), "time": _iso(charge.time)} for charge in history.charges]


def show(console: Console, data: dict[str, Any]) -> None:
    """Print a report as tables."""
    budget = data["budget"]
    of = f" of {budget['epsilon']:g}" if budget else ""
    left = f", {data['epsilon_left']:.4f} left" if budget else ""
    line = f"{data['data_set']}: epsilon {data['epsilon']:.4f}{of} at delta {data['delta']:g}{left}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    for problem in data["problems"]:
        console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True, style="yellow")
    if not data["runs"]:
        console.print("  nothing was charged", markup=False)
    for run in data["runs"]:
        line = (
            f"  run {run['run']}, {run['last']}: epsilon {run['epsilon_alone']:.4f} alone, "
            f"{run['epsilon_with_all_before']:.4f} with all before"
        )
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        table = Table("phase", "steps", "noise multiplier", "sampling")
        for event in run["events"]:
            noise, sampling = f"{event['noise_multiplier']:g}", f"{event['sampling_probability']:g}"
            table.add_row(event["phase"], str(event["count"]), noise, sampling)
        console.print(Padding(table, (0, 0, 0, 2)), markup=False)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
