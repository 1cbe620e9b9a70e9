"""Time and peak memory of a training step, method by method and network by network.

The methods of a network take turns, a step each, from another first one in every repetition; of each the median counts.
The ratio is to the plain step in the layout that was fastest in the same run. The ratio of memory is to the plain step
in the default layout with the whole batch at once, which is what a user starts from.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from simulations.benchmarks.plan import (
    ADADPIGU,
    BOUNDS,
    HOW_TO_GET_OPACUS,
    NAIVE,
    OPACUS,
    PLAIN,
    STANDARDISED,
    Layout,
    Plan,
    Task,
    has_opacus,
)
from simulations.benchmarks.worker import LeftOutError, Sample, Worker

Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass
class Measured:
    """What was seen of a task.

    Args:
        task: What was measured.
        samples: Of the steps that count; empty for a method that was left out.
        note: Why it was left out.
    """

    task: Task
    samples: list[Sample] = field(default_factory=list)
    note: str = ""

    def median(self, what: str) -> float | None:
        """Median over the steps of a field of `Sample`: what happens to the machine during one step does not count."""
        return statistics.median(getattr(sample, what) for sample in self.samples) if self.samples else None


def measure(plan: Plan, say: Say) -> Iterator[list[Row]]:
    """Measure everything in a plan.

    Args:
        plan: What to measure.
        say: Told what is happening.

    Yields:
        The rows of one network after the other, see `rows`.
    """
    for model in plan.models:
        yield rows(_measure_model(plan, model, say))


def _measure_model(plan: Plan, model: str, say: Say) -> list[Measured]:
    measured = [Measured(task) for task in plan.tasks(model)]
    workers: list[tuple[Worker, Measured]] = []
    try:
        for each in measured:
            say(f"{model}: starting {each.task.name}")
            _start(each, plan.limit_s, workers)
        begun, repetition = time.monotonic(), 0
        while repetition < plan.repetitions or (workers and time.monotonic() - begun < plan.least_s):
            say(f"{model}: repetition {repetition + 1} of {plan.repetitions} or more")
            first = repetition % len(workers) if workers else 0
            for worker, each in workers[first:] + workers[:first]:
                _time(worker, each)
            repetition += 1
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
        each.samples.append(worker.step())
    except LeftOutError as reason:
        each.note, each.samples = str(reason), []
        worker.close()


def rows(measured: list[Measured]) -> list[Row]:
    """Turn what was seen of one network into rows.

    The row ``plain`` is the fastest layout's; every layout has a row of its own beside it, ``plain-`` and its name.
    """
    plain = [each for each in measured if each.task.method == PLAIN]
    best = min(plain, key=lambda each: each.median("elapsed_ms") or float("inf"))
    default = next(each for each in plain if each.task.layout == Layout())
    seen = {each.task.method: each for each in measured if each.task.method != PLAIN}
    references = seen.get(STANDARDISED), seen.get(NAIVE)
    named = [(PLAIN, best)]
    named += [(f"{PLAIN}-{each.task.layout.name}", each) for each in plain]
    named += list(seen.items())
    return [_row(method, each, best, default, *references) for method, each in named]


def _row(
    method: str, each: Measured, best: Measured, default: Measured, opacus: Measured | None, naive: Measured | None
) -> Row:
    times = [sample.elapsed_ms for sample in each.samples]
    elapsed, cpu, peak = (each.median(what) for what in ("elapsed_ms", "cpu_ms", "peak_mb"))
    return {
        "model": each.task.model,
        "method": method,
        "layout": each.task.layout.name if each.task.method == PLAIN else None,
        "batch": each.task.batch,
        "median_ms": elapsed,
        "min_ms": min(times, default=None),
        "max_ms": max(times, default=None),
        "cpu_ms": cpu,
        "repetitions": len(times),
        "ratio": _ratio(elapsed, best.median("elapsed_ms")),
        "cpu_ratio": _ratio(cpu, best.median("cpu_ms")),  # hardly disturbed by other programs
        "peak_mb": peak,
        "peak_ratio": _ratio(peak, default.median("peak_mb")),
        "speedup_over_opacus": _ratio(opacus.median("elapsed_ms"), elapsed) if opacus else None,
        "speedup_over_naive": _ratio(naive.median("elapsed_ms"), elapsed) if naive else None,
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
