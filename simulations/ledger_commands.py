"""``adadpigu ledger``: look at a ledger, check it, hand it on, make up for a backup that was put back.

None of them ever lowers what was spent. Whatever needs torch or dp_accounting is imported by the commands.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError, LedgerError
from simulations.console import Console
from simulations.failure import failed

if TYPE_CHECKING:
    from adadpigu_core.accounting import Event

app = typer.Typer(no_args_is_help=True, help="The ledger of a node: what its data sets have spent.")

_Ledger = Annotated[Path, typer.Argument(metavar="LEDGER", help="The file that the node's configuration names.")]
_PolicyFile = Annotated[Path | None, typer.Option("--policy", help="The node's policy, to know what is left.")]
_Delta = Annotated[float | None, typer.Option(min=0, max=1, help="Delta of epsilon; that of the budget if left out.")]


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except AdaDPIGUError as error:
        raise failed(error) from error


def _reports(ledger: Path, policy: Path | None, delta: float | None) -> list[dict[str, Any]]:
    from adadpigu_core.ledger_history import read
    from client.policy import load
    from simulations.ledger_report import report

    budgets = load(policy).budgets if policy is not None else None
    return [report(history, budgets, delta) for history in read(ledger)]


@app.command()
def show(
    ledger: _Ledger,
    policy: _PolicyFile = None,
    delta: _Delta = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what every data set has spent, by run and phase, and what is left."""
    from simulations import ledger_report

    with _failing():
        reports = _reports(ledger, policy, delta)
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
        return
    for data in reports:
        ledger_report.show(Console(), data)


@app.command()
def verify(ledger: _Ledger, policy: _PolicyFile = None, delta: _Delta = None) -> None:
    """Check the file, and recompute every epsilon from the events. Exit status 1 if anything does not add up."""
    with _failing():
        reports = _reports(ledger, policy, delta)
    console = Console()
    for data in reports:
        rounds = sum(run["rounds"] for run in data["runs"])
        text = f"{data['data_set']}: {rounds} rounds, epsilon {data['epsilon']:.6f} at delta {data['delta']:g}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    problems = [f"{data['data_set']}: {problem}" for data in reports for problem in data["problems"]]
    if problems:
        raise failed(
            LedgerError("\n".join([f"{ledger}: this does not add up:", *(f"  * {text}" for text in problems)]))
        )
    console.print("Everything adds up.", markup=False)


@app.command()
def export(
    ledger: _Ledger,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; printed if left out.")] = None,
    policy: _PolicyFile = None,
    delta: _Delta = None,
) -> None:
    """Write everything but the releases as JSON, row by row: for auditors, and for the next machine's records."""
    from adadpigu_core.ledger_history import read
    from simulations.ledger_report import charges

    with _failing():
        reports = _reports(ledger, policy, delta)
        rows = {history.name: charges(history) for history in read(ledger)}
        text = json.dumps([{**data, "charges": rows[data["data_set"]]} for data in reports], indent=2)
        if output is None:
            typer.echo(text)
            return
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{output}: cannot be written ({error.strerror})") from error


@app.command()
def reconcile(
    ledger: _Ledger,
    tally: Annotated[Path, typer.Option(help="privacy.json of the server's run folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Charge without asking.")] = False,
) -> None:
    """Charge what the server's tally knows and this ledger lacks, after a backup was put back. Epsilon only grows."""
    from adadpigu_core.ledger import Ledger
    from adadpigu_core.ledger_history import read
    from adadpigu_core.reconciliation import lacking, make_up

    console = Console()
    with _failing():
        known = _tally(tally)
        for history in read(ledger):
            missing = lacking(history.events, known.get(history.id, ()))
            if not missing:
                console.print(f"{history.name}: nothing is missing", markup=False, soft_wrap=True)
                continue
            for event in missing:
                console.print(f"{history.name}: missing {event}", markup=False, soft_wrap=True)
            if not yes:
                typer.confirm("Charge this?", abort=True)
            with Ledger(ledger, history.name, history.content) as opened:
                console.print(f"{history.name}: charged as run {make_up(opened, missing)}", markup=False)


def _tally(path: Path) -> "dict[str, list[Event]]":
    from adadpigu_core.accounting import Event

    try:
        accounts = json.loads(path.read_text(encoding="utf-8"))["clients"]
        return {account["data_set"]: [Event(**event) for event in account["events"]] for account in accounts}
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path}: is not a server's privacy.json ({error!r})") from error
