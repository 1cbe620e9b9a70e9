"""A report of runs: one HTML file that opens from disk and needs nothing else.

It is made from what a run folder holds, so that it can be written while the run works, after it, and elsewhere. A page
that shows an unfinished run loads itself again.
"""

import json
import logging
import math
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from adadpigu_core.accounting import Event, epsilon
from adadpigu_core.configuration import ORACLE
from adadpigu_core.exceptions import ConfigurationError
from server.run_folder import CONFIGURATION, METRICS, PRIVACY, RESULT
from simulations.rounding import up
from simulations.svg_charts import Chart, Line, merged

log = logging.getLogger("adadpigu.simulations")

FILE = "report.html"
# a report is written again after so many times as long as the last one took
_PAUSE = 10
_REFRESH_SECONDS = 3
_MOST_ROWS = 200
_NOT_COVERED = (
    "Not covered: that a client takes part and when it answers; its declared number of records, noise and budget; "
    "people with several records; settings that were chosen by looking at results on private data."
)
_ORACLE = "NOT PRIVATE: coordinates were ranked by an oracle, which reads gradients without noise. A control only."
_SIMULATED = "A simulation draws its noise from a seed: whoever knows the seed can take the noise off."


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    caption: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class RunFiles:
    """What is in a run folder.

    Args:
        path: The folder.
        name: For people.
        configuration: ``config.toml`` as text.
        metrics: One entry a round.
        clients: The tally.
        refused: Nodes that do not take part.
        result: ``result.json``; None while the run goes on.
    """

    path: Path
    name: str
    configuration: str
    metrics: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as nested tables."""
        return tomllib.loads(self.configuration)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return int(self.settings["federation"]["num-rounds"])

    def latest(self, key: str) -> float | None:
        """The last value of a metric that not every round has."""
        return next((line[key] for line in reversed(self.metrics) if line.get(key) is not None), None)


def read_run(path: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ConfigurationError: If it is none, or its files are damaged.
    """
    if not (path / CONFIGURATION).is_file():
        raise ConfigurationError(f"{path} holds no run ({CONFIGURATION} is missing)")
    try:
        configuration = (path / CONFIGURATION).read_text(encoding="utf-8")
        tomllib.loads(configuration)["federation"]["num-rounds"]
        privacy = _json(path / PRIVACY) or {"clients": [], "refused": []}
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines() if (path / METRICS).exists() else []
        metrics = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
        return RunFiles(
            path,
            path.absolute().name,
            configuration,
            metrics,
            privacy["clients"],
            privacy["refused"],
            _json(path / RESULT),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{path}: its files cannot be read ({error!r})") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def render(runs: Sequence[RunFiles]) -> str:
    """Make the page."""
    environment = Environment(
        loader=PackageLoader("simulations"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    named = _distinct(runs)
    title = f"AdaDPIGU: {named[0].name}" if len(named) == 1 else f"AdaDPIGU: {len(named)} runs"
    return environment.get_template("report.html").render(
        title=title,
        live=any(run.result is None for run in named),
        refresh_seconds=_REFRESH_SECONDS,
        comparison=_comparison(named) if len(named) > 1 else None,
        runs=[_section(run, f"run{number}") for number, run in enumerate(named)],
    )


def write_report(runs: Sequence[Path], target: Path) -> bool:
    """Read runs and replace a report in one step; says whether all of them are over."""
    read = [read_run(path) for path in runs]
    temporary = target.with_name(f".{target.name}.new")
    try:
        temporary.write_text(render(read), encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise ConfigurationError(f"{target}: cannot be written ({error.strerror})") from error
    return all(run.result is not None for run in read)


class LiveReport:
    """Keeps the report of a run up to date while it works: after every round, unless that would slow the run down.

    Args:
        folder: The run folder; the report is written into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 0.0

    def update(self) -> None:
        """Write the report, if the last one did not take long just now. A report that fails must not end a run."""
        begun = time.monotonic()
        if begun < self._next:
            return
        self.finish()
        ended = time.monotonic()
        self._next = ended + _PAUSE * (ended - begun)

    def finish(self) -> None:
        """Write the report; also that of a run that was stopped, if it has begun."""
        try:
            write_report([self._folder], self._folder / FILE)
        except Exception:
            log.warning("the report %s could not be written", self._folder / FILE, exc_info=True)


def _distinct(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Runs under names that tell them apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    return [RunFiles(**{**vars(run), "name": str(run.path)}) for run in runs]


def _section(run: RunFiles, key: str) -> dict[str, Any]:
    return {
        "name": run.name,
        "status": _status(run),
        "warnings": [f"{client['id']}: {text}" for client in run.clients for text in client["warnings"]]
        + [f"node {one['node']} did not take part: {one['message'] or one['code']}" for one in run.refused],
        "statement": _statement(run),
        "charts": _charts(run, key),
        "clients": _clients(run),
        "costs": _costs(run),
        "layers": _layers(run),
        "configuration": run.configuration,
    }


def _status(run: RunFiles) -> str:
    done = run.metrics[-1]["round"] if run.metrics else 0
    accuracy = run.result["accuracy"] if run.result else run.latest("accuracy")
    shown = f" Accuracy on public test data {accuracy:.4f}." if accuracy is not None else ""
    state = f"Finished after {done} rounds." if run.result else f"Round {done} of {run.num_rounds}."
    return state + shown


def _statement(run: RunFiles) -> list[str]:
    if run.settings.get("pretraining", {}).get("ranking") == ORACLE:
        return [_ORACLE]
    if not run.clients:
        return ["No client has described itself yet."]
    deltas = sorted({f"{client['delta']:g}" for client in run.clients})
    worst = max(run.clients, key=lambda client: _infinite(client["epsilon"]))
    events = [Event(**event) for event in worst["events"]]
    unsampled = epsilon([Event(one.phase, one.noise_multiplier, 1.0, one.count) for one in events], worst["delta"])
    simulated = [_SIMULATED] if (run.path / "ledgers").exists() or run.settings["privacy"].get("ledger-dir") else []
    return [
        "Each client's records are protected by differential privacy: the unit is one record of one client, neighbours "
        "differ by one record added or removed, over everything that was ever released from the client's data set; "
        f"delta is {' or '.join(deltas)}.",
        f"The largest epsilon that any client has spent is {_number(worst['epsilon'], 3)} ({worst['id']}). That counts "
        "on the secret of which records entered a step; to someone who knows that, the same releases amount to epsilon "
        f"{_number(unsampled, 1)}.",
        _NOT_COVERED,
        *simulated,
    ]


def _charts(run: RunFiles, key: str) -> list[Chart]:
    return [
        Chart(f"{key}-accuracy", "Accuracy on public test data", "round", "accuracy", (_line(run, "accuracy"),)),
        Chart(f"{key}-epsilon", "Epsilon spent by each client", "round", "epsilon", _each(run, "epsilons")),
        Chart(f"{key}-retained", "Share of coordinates trained", "round", "share", (_line(run, "retained"),)),
        Chart(f"{key}-layers", "The same by layer", "round", "share", _each(run, "retained_by_layer")),
        Chart(f"{key}-stages", "Time of each round by stage", "round", "seconds", _each(run, "stages")),
        Chart(f"{key}-bytes", "Data sent and received so far", "round", "MB", _bytes(run)),
    ]


def _line(run: RunFiles, key: str, name: str = "") -> Line:
    points = tuple((line["round"], line[key]) for line in run.metrics if line.get(key) is not None)
    return Line(name or key, points)


def _each(run: RunFiles, key: str) -> tuple[Line, ...]:
    """A line for each entry of a metric that has several; entries that are alike share one."""
    names = dict.fromkeys(name for line in run.metrics for name in line.get(key, {}))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for line in run.metrics:
        for name, value in line.get(key, {}).items():
            if value is not None:
                found[name].append((line["round"], value))
    return merged(Line(name, tuple(points)) for name, points in found.items())


def _bytes(run: RunFiles) -> tuple[Line, ...]:
    return tuple(
        Line(name, tuple((line["round"], line[key] / 1e6) for line in run.metrics))
        for key, name in (("bytes_up", "from clients"), ("bytes_down", "to clients"))
    )


def _clients(run: RunFiles) -> Table:
    rows = [
        (
            client["id"],
            str(client["num_records"]),
            _noise(client["events"]),
            _number(client["epsilon"], 3),
            f"{client['target_epsilon']:g}",
            str(client["releases"]),
            "over budget" if _infinite(client["epsilon"]) > client["target_epsilon"] else "within budget",
        )
        for client in run.clients[:_MOST_ROWS]
    ]
    more = f"; the first {_MOST_ROWS} of {len(run.clients)}" if len(run.clients) > _MOST_ROWS else ""
    headings = ("client", "records", "noise multiplier", "epsilon", "target", "rounds answered", "state")
    return Table(f"Privacy spent by each client{more}", headings, rows)


def _noise(events: list[dict[str, Any]]) -> str:
    noise = [event["noise_multiplier"] for event in events]
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (min(noise), max(noise)))) if noise else "none"


def _costs(run: RunFiles) -> Table:
    stages: dict[str, float] = {}
    for line in run.metrics:
        for name, seconds in line.get("stages", {}).items():
            stages[name] = stages.get(name, 0.0) + seconds
    last = run.metrics[-1] if run.metrics else {"bytes_up": 0, "bytes_down": 0}
    rows = [(f"time: {name}", f"{seconds:.1f} s") for name, seconds in stages.items()]
    rows += [(f"data: {name}", f"{last[key] / 1e6:.2f} MB") for key, name in _TRAFFIC.items()]
    return Table("Time by stage, and data", ("what", "amount"), list(rows))


_TRAFFIC = {"bytes_up": "from clients", "bytes_down": "to clients"}


def _layers(run: RunFiles) -> Table:
    shown = [line for line in run.metrics if "retained_by_layer" in line]
    first, last = (shown[0], shown[-1]) if shown else ({}, {})
    training = next((line for line in shown if line["phase"] == "training"), first)
    rows = [
        (name, f"{training['retained_by_layer'][name]:.1%}", f"{share:.1%}")
        for name, share in last.get("retained_by_layer", {}).items()
    ]
    return Table("Share of coordinates trained", ("parameter", "first training round", "latest round"), rows)


def _comparison(runs: list[RunFiles]) -> dict[str, Any]:
    rows = []
    for run in runs:
        accuracy = run.latest("accuracy")
        last = run.metrics[-1] if run.metrics else {"epsilon": 0.0, "round": 0, "bytes_up": 0, "bytes_down": 0}
        rows.append(
            (
                run.name,
                f"{last['round']} of {run.num_rounds}",
                "none yet" if accuracy is None else f"{accuracy:.4f}",
                _number(last["epsilon"], 3),
                str(len(run.clients)),
                f"{(last['bytes_up'] + last['bytes_down']) / 1e6:.2f} MB",
                f"{sum(line['seconds'] for line in run.metrics):.0f} s",
            )
        )
    headings = ("run", "rounds", "accuracy", "largest epsilon", "clients", "data", "time")
    charts = [
        Chart(f"all-{key}", title, "round", label, tuple(_line(run, key, run.name) for run in runs))
        for key, title, label in (
            ("accuracy", "Accuracy on public test data", "accuracy"),
            ("epsilon", "Largest epsilon spent by a client", "epsilon"),
            ("retained", "Share of coordinates trained", "share"),
        )
    ]
    return {"table": Table("Runs", headings, rows), "charts": charts}


def _infinite(value: float | None) -> float:
    """An epsilon that was written to JSON, which has no infinity."""
    return math.inf if value is None else value


def _number(value: float | None, digits: int) -> str:
    """Write an epsilon."""
    return "unbounded" if value is None or math.isinf(value) else up(value, digits)
