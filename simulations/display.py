"""What a person sees while a run works and when it is over: live on a terminal, plain lines anywhere else."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from adadpigu_core.accounting import PHASES
from adadpigu_core.client_list import read_clients
from adadpigu_core.configuration import Configuration, not_private
from simulations.console import Console

_SECONDS_BETWEEN_LINES = 2.0


class Progressing(Protocol):
    """Shows the rounds of a run."""

    def show(self, metrics: dict[str, Any]) -> None:
        """Show the line of metrics of a round."""
        ...


@contextmanager
def progressing(console: Console, num_rounds: int, done: int = 0) -> Iterator[Progressing]:
    """Show progress in the way that fits the console."""
    if not console.is_terminal:
        yield _Lines(console, num_rounds, done)
        return
    columns = (
        TextColumn("{task.fields[phase]:<11}"),
        BarColumn(),
        TextColumn("round {task.completed}/{task.total}"),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TextColumn("epsilon {task.fields[epsilon]}"),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=num_rounds, completed=done, phase="starting", accuracy="-", epsilon="-")
        yield _Bar(bar, task)


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task, self._accuracy = bar, task, "-"

    def show(self, metrics: dict[str, Any]) -> None:
        self._accuracy = _accuracy(metrics) or self._accuracy
        self._bar.update(
            self._task,
            completed=metrics["round"],
            phase=metrics["phase"],
            accuracy=self._accuracy,
            epsilon=_epsilon(metrics["epsilon"], 2),
        )


class _Lines:
    def __init__(self, console: Console, num_rounds: int, done: int) -> None:
        self._console, self._total, self._done = console, num_rounds, done
        self._begun = self._last = 0.0
        self._accuracy = "-"

    def show(self, metrics: dict[str, Any]) -> None:
        self._accuracy = _accuracy(metrics) or self._accuracy
        now, number = time.monotonic(), metrics["round"]
        done = number - self._done - 1  # the first round of a process waits for workers, and says nothing of the others
        if done == 0:
            self._begun = now
        if now - self._last < _SECONDS_BETWEEN_LINES and done and number != self._total:
            return
        self._last = now
        left = f"  left {(now - self._begun) / done * (self._total - number):.0f} s" if done else ""
        self._console.print(
            f"{metrics['phase']:<11} round {number}/{self._total}  accuracy {self._accuracy}  "
            f"epsilon {_epsilon(metrics['epsilon'], 2)}{left}",
            highlight=False,
        )


def _epsilon(value: float | None, digits: int) -> str:
    """Write an epsilon; JSON has no infinity and says null."""
    return "unbounded" if value is None else f"{value:.{digits}f}"


def _accuracy(metrics: dict[str, Any]) -> str:
    return f"{metrics['accuracy']:.4f}" if not math.isnan(metrics.get("accuracy", math.nan)) else ""


def say(console: Console, text: str) -> None:
    """Print a line as it is: paths may hold brackets, and are copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def introduce(console: Console, configuration: Configuration, records: list[int], done: int) -> None:
    """Say what is about to run.

    Args:
        console: Where to.
        configuration: Of the run.
        records: Number of records of each client.
        done: Rounds that a resumed run has behind it.
    """
    federation, privacy = configuration.federation, configuration.privacy
    sizes = " to ".join(str(size) for size in sorted({min(records), max(records)}))
    say(
        console,
        f"{federation.num_clients} clients with {sizes} records of {configuration.task.dataset}; "
        f"each may spend {_budgets(configuration)} at delta {privacy.target_delta:g} "
        f"over {federation.num_rounds} rounds.",
    )
    say(console, "A simulation: its noise follows from the seed, and protects nobody from those who know the seed.")
    if weights := configuration.task.weights:
        say(console, f"It starts from {weights}, which must be public: what these weights tell is in no epsilon here.")
    if warning := not_private(configuration):
        say(console, warning)
    if done:
        say(console, f"Going on after round {done} of {federation.num_rounds}.")
    elif privacy.ledger_dir:
        say(console, f"Ledgers: {privacy.ledger_dir}; what was spent there before counts.")
    else:
        say(
            console,
            "Ledgers: new ones in the run folder, so that budgets start afresh (privacy.ledger-dir keeps them).",
        )


def _budgets(configuration: Configuration) -> str:
    most, clients = configuration.privacy.target_epsilon, configuration.federation.clients
    if not clients:
        return f"epsilon {most:g}"
    targets = [min(entry.target_epsilon, most) for entry in read_clients(Path(clients))]
    return f"its own budget, from epsilon {min(targets):g} to {max(targets):g},"


def show_result(console: Console, result: dict[str, Any]) -> None:
    """Print the table of clients and the outcome."""
    console.print(_clients(result["clients"]))
    for client in result["clients"]:
        for warning in client["warnings"]:
            console.print(f"[yellow]{escape(client['id'])}: {escape(warning)}[/yellow]", soft_wrap=True)
    for refusal in result["refused"]:
        reason = refusal["message"] or f"code {refusal['code']!r}; its own log says more"
        console.print(f"[yellow]node {refusal['node']} did not take part: {escape(reason)}[/yellow]", soft_wrap=True)
    if result.get("not_private"):
        console.print(f"[red]{escape(result['not_private'])}[/red]", soft_wrap=True)
    if result["diverged"]:
        console.print(f"[yellow]{escape(result['diverged'])}[/yellow]", soft_wrap=True, highlight=False)
    if "average" in result:
        console.print(f"Accuracy of the averaged weights {result['average']['accuracy']:.4f}", highlight=False)
    console.print(
        f"Accuracy on held-out test data [bold]{result['accuracy']:.4f}[/bold] after {result['rounds']} rounds "
        f"in {result['seconds']:.0f} s; {_size(result['bytes_up'])} up, {_size(result['bytes_down'])} down.",
        highlight=False,
        soft_wrap=True,
    )


def _clients(clients: list[dict[str, Any]]) -> Table:
    deltas = sorted({f"{client['delta']:g}" for client in clients})
    table = Table(title=f"Privacy spent by each client (one record, add-or-remove-one, delta {' or '.join(deltas)})")
    table.add_column("client")
    for heading in ("records", "noise multiplier", "epsilon spent of target", "releases"):
        table.add_column(heading, justify="right")
    for client in clients:
        table.add_row(
            client["id"],
            str(client["num_records"]),
            " / ".join(dict.fromkeys(noise for phase in PHASES if (noise := _noise(client["events"], phase)))),
            f"{_epsilon(client['epsilon'], 3)} of {client['target_epsilon']:g}",
            str(sum(event["count"] for event in client["events"])),
        )
    return table


def _noise(events: list[dict[str, Any]], phase: str) -> str:
    """Noise multiplier of a phase; the range of it, if it moves from round to round."""
    noise = sorted(event["noise_multiplier"] for event in events if event["phase"] == phase)
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (noise[0], noise[-1]))) if noise else ""


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
