"""The command ``adadpigu tune``: search for good settings, and say what the search costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.console import Console

if TYPE_CHECKING:
    from simulations.tune import Point, Search

HELP = """Search for good settings by simulation, at one budget or along several.

On public or synthetic data a search is free. On private data it costs privacy: the number of trials is then random,
only the best is kept, and the cost of the whole search is shown before it starts.

Needs Optuna: pip install 'adadpigu\\[tune]'. An interrupted search goes on where it stopped, with the same command.

[bold]Examples[/bold]

  adadpigu tune --trials 30 --output runs/search

  adadpigu tune --epsilons 1,2,4,8 --search optimiser.local-learning-rate --output runs/front

  adadpigu tune -c task.dataset=npz:mine.npz --data private --trials 10 --output runs/private
"""


def tune(
    output: Annotated[Path, typer.Option(help="Folder of the search.")],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings of all trials.")] = None,
    override: Annotated[list[str] | None, typer.Option("-c", metavar="KEY=VALUE", help="One setting.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials at each budget; on private data their mean.")] = 20,
    epsilons: Annotated[str, typer.Option(help="Budgets, with commas; default: that of the settings.")] = "",
    search: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Setting to search; default: all.")] = None,
    data: Annotated[str, typer.Option(help="public or private; needed for arrays of your own.")] = "",
    distribution: Annotated[
        str, typer.Option(help="Of the number of trials on private data: geometric, logarithmic or poisson.")
    ] = "geometric",
    yes: Annotated[bool, typer.Option("--yes", help="Accept the cost of a private search.")] = False,
) -> None:
    """Run a search and show its outcome."""
    console = Console()
    try:
        wanted = _search(config, override or [], (trials, epsilons, tuple(search or ()), data, distribution), output)
        _run(console, wanted, data, yes)
    except AdaDPIGUError as error:
        message = Console(stderr=True)
        message.print("[red]Error:[/red]", end=" ")
        message.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigurationError) else 1) from error
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on with the search.")
        raise typer.Exit(130) from None


def _search(
    config: Path | None, overrides: list[str], asked: tuple[int, str, tuple[str, ...], str, str], output: Path
) -> "Search":
    from simulations.command_line import parse_overrides
    from simulations.selection_cost import RandomTrials
    from simulations.simulate import read_settings

    try:
        from simulations.tune import Search
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is not installed: pip install 'adadpigu[tune]'") from error
    trials, epsilons, keys, data, distribution = asked
    if data not in ("", "public", "private"):
        raise ConfigurationError(f"--data: {data!r} is neither public nor private")
    flat = {**(read_settings(config) if config else {}), **parse_overrides(overrides)}
    default = flat.get("privacy.target-epsilon", 8.0)
    try:
        budgets = tuple(sorted({float(text) for text in (epsilons or str(default)).split(",")}))
    except ValueError as error:
        raise ConfigurationError(f"--epsilons: {epsilons!r} must be numbers with commas between them") from error
    private = data == "private"
    if not private:
        flat.setdefault("task.evaluate-on", "validation")  # test data are for the settings that are found
    count = RandomTrials(distribution, float(trials)) if private else None
    return Search(flat, budgets, None if private else trials, keys, count, output)


def _delta(search: "Search") -> float:
    from adadpigu_core.configuration import parse

    return parse(search.flat).privacy.target_delta


@contextmanager
def _unseen(_rounds: int, _done: int) -> Iterator["_Unseen"]:
    """Show nothing of a trial."""
    yield _Unseen()


class _Unseen:
    def show(self, metrics: dict[str, Any]) -> None:
        """Say nothing, not even that there is a trial."""


def _run(console: Console, search: "Search", data: str, accepted: bool) -> None:
    from simulations import tune_report
    from simulations.display import progressing
    from simulations.status import working
    from simulations.tune import check, cost, run, total_cost

    check(search, data)
    if search.private:
        found, delta = [cost(search, target) for target in search.epsilons], _delta(search)
        console.print(tune_report.costs(found, total_cost(search), delta, search.random_trials))
        if not (accepted or typer.confirm("Shall the search start and cost this?")):
            raise typer.Exit(1)
    say = partial(console.print, highlight=False)
    if search.private:
        say("Searching. How many trials there are, and how they do, stays secret; so should how long this takes.")
        with working("Searching"):
            points: list[Point] = run(search, _unseen, say)
    else:
        points = run(search, partial(progressing, console), say)
    if not points:
        say("There is no best trial: the random number of trials was 0, or every trial failed.")
        return
    tune_report.show(console, points, search)
