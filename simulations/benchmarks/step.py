"""Time and peak memory of a training step, method by method and network by network.

The methods of a network take turns, a step each, from another first one in every repetition; of each the median counts.
The ratio is to the plain step in the layout that was fastest in the same run. The ratio of memory is to the plain step
in the default layout with the whole batch at once, which is what a user starts from.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulations.benchmarks.plan import (
    ADADPIGU,
    BOUNDS,
    HOW_TO_GET_OPACUS,
    OPACUS,
    PLAIN,
    STANDARDISED,
    Layout,
    Plan,
    Task,
    has_opacus,
)
from simulations.benchmarks.worker import LeftOutError, Timing, Worker

Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass
class Measured:
    """What was seen of a task.

    Args:
        task: What was measured.
        timings: Of the steps that count.
        peak_mb: Growth of memory.
        note: Why it was left out.
    """

    task: Task
    timings: list[Timing] = field(default_factory=list)
    peak_mb: float | None = None
    note: str = ""

    @property
    def median_ms(self) -> float | None:
        """Median time of a step; None for a method that was left out."""
        return statistics.median(timing.elapsed for timing in self.timings) if self.counts else None

    @property
    def cpu_ms(self) -> float | None:
        """Median processor time of a step, which other programs disturb less."""
        return statistics.median(timing.processor for timing in self.timings) if self.counts else None

    @property
    def counts(self) -> bool:
        """Whether it was measured to the end."""
        return bool(self.timings) and not self.note


def measure(plan: Plan, say: Say) -> list[Row]:
    """Measure everything in a plan.

    Args:
        plan: What to measure.
        say: Told what is happening.

    Returns:
        A row for each network and method, see `rows`.
    """
    found = []
    for model in plan.models:
        found += rows(_measure_model(plan, model, say))
    return found


def _measure_model(plan: Plan, model: str, say: Say) -> list[Measured]:
    measured = [Measured(task) for task in plan.tasks(model)]
    workers: list[tuple[Worker, Measured]] = []
    try:
        for each in measured:
            say(f"{model}: starting {each.task.name}")
            _start(each, plan.limit_s, workers)
        for repetition in range(plan.repetitions):
            say(f"{model}: repetition {repetition + 1} of {plan.repetitions}")
            first = repetition % len(workers) if workers else 0
            for worker, each in workers[first:] + workers[:first]:
                _time(worker, each)
        for worker, each in workers:
            _look_at_memory(worker, each)
    finally:
        for worker, _ in workers:
            worker.close()
    return measured


def _start(each: Measured, limit_s: float, workers: list[tuple[Worker, Measured]]) -> None:
    if each.task.method in OPACUS and not has_opacus():
        each.note = HOW_TO_GET_OPACUS
        return
    try:
        workers.append((Worker(each.task, limit_s), each))
    except LeftOutError as reason:
        each.note = str(reason)


def _time(worker: Worker, each: Measured) -> None:
    if each.note:
        return
    try:
        each.timings.append(worker.step())
    except LeftOutError as reason:
        each.note = str(reason)
        worker.close()


def _look_at_memory(worker: Worker, each: Measured) -> None:
    if each.note:
        return
    try:
        each.peak_mb = worker.peak_mb()
    except LeftOutError as reason:
        each.note = str(reason)


def rows(measured: list[Measured]) -> list[Row]:
    """Turn what was seen of one network into rows.

    The row ``plain`` is the fastest layout's; every layout has a row of its own beside it, ``plain-`` and its name.
    """
    plain = [each for each in measured if each.task.method == PLAIN]
    timed = [each for each in plain if each.median_ms is not None]
    best = min(timed, key=lambda each: each.median_ms or 0.0, default=plain[0])
    default = next(each for each in plain if each.task.layout == Layout())
    seen = {each.task.method: each for each in measured if each.task.method != PLAIN}
    reference = seen.get(STANDARDISED)
    named = [(PLAIN, best)]
    named += [(f"{PLAIN}-{each.task.layout.name}", each) for each in plain]
    named += list(seen.items())
    return [_row(method, each, best, default, reference) for method, each in named]


def _row(method: str, each: Measured, best: Measured, default: Measured, reference: Measured | None) -> Row:
    times = [timing.elapsed for timing in each.timings] if each.counts else []
    return {
        "model": each.task.model,
        "method": method,
        "layout": each.task.layout.name if each.task.method == PLAIN else None,
        "batch": each.task.batch,
        "median_ms": each.median_ms,
        "cpu_ms": each.cpu_ms,
        "min_ms": min(times, default=None),
        "max_ms": max(times, default=None),
        "repetitions": len(times),
        "ratio": _ratio(each.median_ms, best.median_ms),
        "peak_mb": each.peak_mb,
        "peak_ratio": _ratio(each.peak_mb, default.peak_mb),
        "speedup_over_opacus": _ratio(reference.median_ms if reference else None, each.median_ms),
        "note": each.note,
        **_verdict(method, each),
    }


def _verdict(method: str, each: Measured) -> Row:
    if method != ADADPIGU:
        return {}
    bounds = BOUNDS[each.task.model]
    return {
        "ratio_pass": bounds.time,
        "ratio_aim": bounds.time_aim,
        "peak_ratio_pass": bounds.memory,
        "speedup_pass": bounds.speedup,
    }


def _ratio(value: float | None, reference: float | None) -> float | None:
    """Divide; memory that did not grow gives no ratio."""
    return value / reference if value is not None and reference is not None and reference > 0 else None
