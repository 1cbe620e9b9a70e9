"""The command ``adadpigu plan``: what a budget buys, before anything is trained.

It needs no data and no torch, so that it answers within seconds; the arithmetic is in ``adadpigu_core.planning``, which
is imported when the command runs.
"""

import ctypes
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.console import Console

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt

if TYPE_CHECKING:
    from adadpigu_core.client_list import ClientEntry
    from adadpigu_core.planning import FederationPlan, Terms

HELP = """Plan a federation's privacy budget: no data, no training.

Rounds, noise, epsilon and batches hang together; the plan solves for one of them:

  --solve noise     the least noise with which every client meets its target (the default)
  --solve epsilon   what every client spends with --noise-multiplier
  --solve rounds    how many rounds every client can afford with --noise-multiplier
  --solve batch     the smallest expected batches at which the aggregate has no more noise than --noise-ratio

[bold]Examples[/bold]

  adadpigu plan --clients clients.csv --parameters 26010 --rounds 60 --sampling-probability 0.05
      a file with the columns id,records,target_epsilon

  adadpigu plan --client north,1200,8 --client south,300,0.5
      what does the site with 300 records give, or cost with --aggregation uniform?

  adadpigu plan --solve rounds --noise-multiplier 4 --num-clients 10 --records 1000 --target-epsilon 2

  adadpigu plan --clients clients.csv --json plan.json --figure plan.svg
"""
_SOLVE = ("noise", "epsilon", "rounds", "batch")


@dataclass(frozen=True)
class _Question:
    clients: "tuple[ClientEntry, ...]"
    terms: "Terms"
    aggregation: str
    noise_multiplier: float | None
    noise_ratio: float | None


def plan(
    clients: Annotated[Path | None, typer.Option(help="CSV file with the columns id,records,target_epsilon.")] = None,
    client: Annotated[
        list[str] | None, typer.Option(metavar="ID,RECORDS,EPSILON", help="One client; may be repeated.")
    ] = None,
    num_clients: Annotated[int, typer.Option(min=1, max=100_000, help="Number of equal clients.")] = 10,
    records: Annotated[int, typer.Option(min=1, help="Records of each equal client.")] = 1000,
    target_epsilon: Annotated[float, typer.Option(help="Budget of each equal client.")] = 8.0,
    target_delta: Annotated[float, typer.Option(help="Delta of all budgets.")] = 1e-5,
    parameters: Annotated[int, typer.Option(min=1, help="Number of parameters of the model.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in all, pretraining included.")] = 100,
    local_steps: Annotated[int, typer.Option(min=1, help="Private steps of a client in a round.")] = 1,
    sampling_probability: Annotated[float, typer.Option(help="Chance of a record to enter a step.")] = 0.5,
    pretraining_round_share: Annotated[float, typer.Option(help="Share of rounds; 0 leaves pretraining out.")] = 0.1,
    pretraining_share: Annotated[float, typer.Option(help="Pretraining's share of the budget, in 1/noise^2.")] = 0.1,
    noise_schedule: Annotated[str, typer.Option(help="constant, linear, cosine or step.")] = "constant",
    final_noise_ratio: Annotated[float, typer.Option(help="Noise of the last round over that of the first.")] = 1.0,
    aggregation: Annotated[str, typer.Option(help="Weights: precision, records or uniform.")] = "precision",
    solve: Annotated[str, typer.Option(help="What to find: noise, epsilon, rounds or batch.")] = "noise",
    noise_multiplier: Annotated[float | None, typer.Option(help="Given noise of training, the same for all.")] = None,
    noise_ratio: Annotated[
        float | None, typer.Option(help="Given noise of the aggregate's coordinates over the clipping norm.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw epsilon over rounds (.png, .svg or .pdf).")] = None,
) -> None:
    """Answer one question about a federation's budget."""
    from adadpigu_core.accounting import NoiseSchedule
    from adadpigu_core.planning import Terms
    from simulations.plan_report import draw, show, to_json
    from simulations.status import working

    console = Console()
    try:
        schedule = NoiseSchedule(noise_schedule, final_noise_ratio)
        terms = Terms(
            rounds,
            local_steps,
            sampling_probability,
            pretraining_round_share,
            pretraining_share,
            schedule,
            target_delta,
        )
        entries = _entries(clients, client or [], (num_clients, records, target_epsilon))
        with working(f"Accounting for {len(entries)} clients"):
            answer = _answer(solve, _Question(entries, terms, aggregation, noise_multiplier, noise_ratio))
        show(console, answer, solve, aggregation, parameters)
        if json_file is not None:
            text = json.dumps(to_json(answer, solve, aggregation, parameters), allow_nan=False)
            _write(json_file, lambda: json_file.write_text(text + "\n", encoding="utf-8"))
        if figure is not None:
            _write(figure, lambda: draw(answer, figure))
    except AdaDPIGUError as error:
        message = Console(stderr=True)
        message.print("[red]Error:[/red]", end=" ")
        message.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _entries(path: Path | None, texts: list[str], equal: tuple[int, int, float]) -> "tuple[ClientEntry, ...]":
    from adadpigu_core.client_list import ClientEntry, parse_client, read_clients

    if path is not None and texts:
        raise ConfigurationError("--client: use it or --clients, not both")
    if path is not None:
        return read_clients(path)
    if texts:
        found = tuple(parse_client(text) for text in texts)
        if len({entry.id for entry in found}) < len(found):
            raise ConfigurationError("--client: every client needs an id of its own")
        return found
    count, records, target = equal
    one = parse_client(f"client,{records},{target}")
    return tuple(ClientEntry(f"client-{index}", one.records, one.target_epsilon) for index in range(count))


def _answer(solve: str, asked: _Question) -> "FederationPlan":
    from adadpigu_core import planning
    from adadpigu_core.weights import AGGREGATIONS

    _keep_freed_memory()

    if solve not in _SOLVE:
        raise ConfigurationError(f"--solve: {solve!r} is none of {', '.join(_SOLVE)}")
    if asked.aggregation not in AGGREGATIONS:
        raise ConfigurationError(f"--aggregation: {asked.aggregation!r} is none of {', '.join(AGGREGATIONS)}")
    for name, value, users in (
        ("noise-multiplier", asked.noise_multiplier, ("epsilon", "rounds")),
        ("noise-ratio", asked.noise_ratio, ("batch",)),
    ):
        if (value is not None) != (solve in users):
            verb = "is needed" if value is None else "has no part"
            raise ConfigurationError(f"--{name}: {verb} with --solve {solve}; see adadpigu plan --help")
    if solve == "noise":
        return planning.plan_noise(asked.clients, asked.terms)
    if solve == "batch":
        return planning.smallest_sampling(asked.clients, asked.terms, asked.aggregation, float(asked.noise_ratio or 0))
    given = float(asked.noise_multiplier or 0)
    function = planning.plan_epsilon if solve == "epsilon" else planning.most_rounds
    return function(asked.clients, asked.terms, given)


def _keep_freed_memory() -> None:
    """Have glibc keep what large arrays leave: to give it back and fetch it again takes as long as the arithmetic."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 2**25)
        library.mallopt(_TRIM_THRESHOLD, 2**30)


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except (OSError, ValueError) as error:  # matplotlib raises the latter for a format that it does not know
        raise ConfigurationError(f"{path}: cannot be written ({error})") from error
