"""One simulated run, from its settings to its folder, on either engine."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adadpigu_core import datasets
from adadpigu_core.configuration import PUBLIC_DIGITS, Configuration, Value, flatten, parse, settings, to_toml
from adadpigu_core.data_dir import located
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import build
from adadpigu_core.settings_file import read_toml
from client.partitions import Deal, deal, listed_clients
from server.app import check_oracle, model_spec
from server.app import run as run_server
from server.round_report import RoundReport
from server.run_folder import CHECKPOINT, CONFIGURATION, LOCK, RESULT, Claim, RunFolder
from server.starting_weights import check_start
from simulations import flower_engine
from simulations.in_process import InProcessGrid
from simulations.oracle import oracle_scores
from simulations.report import LiveReport
from simulations.tensorboard_log import TensorBoardLog

ENGINES = ("in-process", "flower")
CLIENTS = "clients.csv"
Show = Callable[[dict[str, Any]], None]


class StoppedError(Exception):
    """A run was ended between two rounds, because time was up; it can go on."""


class StopAfter:
    """Ends a run between two rounds, so that no round is begun that would not be over in time.

    A first round is always carried out, so that every piece of a run brings it forward.

    Args:
        deadline: On the clock.
        clock: Gives seconds.
    """

    def __init__(self, deadline: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline, self._clock, self._longest = deadline, clock, 0.0

    def __call__(self, metrics: Mapping[str, Any], num_rounds: int) -> None:
        """Look at the clock after a round.

        Raises:
            StoppedError: If the run is to end here.
        """
        self._longest = max(self._longest, metrics["seconds"])
        if metrics["round"] < num_rounds and self._clock() + self._longest > self._deadline:
            raise StoppedError(f"Stopped after round {metrics['round']} of {num_rounds}.")

    def before_another_run(self) -> None:
        """Look at the clock between two runs of a table.

        Raises:
            StoppedError: If a round of the next one would not be over in time.
        """
        if self._clock() + self._longest > self._deadline:
            raise StoppedError("Stopped between two runs.")


@dataclass(frozen=True)
class Simulation:
    """A checked run that has not started.

    Args:
        configuration: As resolved, with absolute paths.
        folder: Where it writes.
        records: Number of records of each client.
        done: Rounds that a resumed run has behind it.
        claim: Held until the run has ended.
    """

    configuration: Configuration
    folder: RunFolder
    records: list[int]
    done: int
    claim: Claim


def prepare(flat: Mapping[str, Value]) -> Simulation:
    """Check everything that can be checked before a new run, and make its folder.

    Raises:
        ConfigurationError: For settings that cannot be used, or a folder that holds a run already.
        DataError: If the data set cannot be read.
    """
    configuration = resolved(parse(flat))
    if configuration.runtime.output:
        folder = Path(configuration.runtime.output).expanduser().absolute()
        _require_empty(folder)
    data = _data_set(configuration)
    spec = model_spec(configuration, data)
    build(spec, seed=configuration.seed)  # to see whether it can be, and whether weights fit, before a folder is made
    check_start(spec, configuration)
    records = _shares(configuration, data)
    if configuration.privacy.ledger_dir:
        _claim_ledgers(configuration)
    if not configuration.runtime.output:
        folder = _new_folder(configuration)
    configuration = replace(configuration, runtime=replace(configuration.runtime, output=str(folder)))
    run_folder = RunFolder(folder)
    claim = Claim(folder)
    _require_empty(folder)  # again: two that began at once have both seen an empty folder
    configuration = _keep_clients(configuration, run_folder)
    run_folder.write_text(CONFIGURATION, to_toml(configuration))
    return Simulation(configuration, run_folder, records, 0, claim)


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise ConfigurationError(
            f"runtime.output: {folder} is not empty; choose another folder, or go on with its run by --resume {folder}"
        )


def _new_folder(configuration: Configuration) -> Path:
    """Make a folder that names data and time, and has a number if another run of the same second has that name."""
    folder = named = Path(_default_output(configuration)).absolute()
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = named.with_name(f"{named.name}-{number}")
        except OSError as error:
            raise ConfigurationError(f"runtime.output: {folder} cannot be made ({error.strerror})") from error
        else:
            return folder


def resolved(configuration: Configuration) -> Configuration:
    """The same with absolute paths, so that a run may go on from another directory, and has the same ledgers there."""
    return replace(
        configuration,
        task=replace(
            configuration.task,
            dataset=_absolute(configuration.task.dataset),
            weights=_absolute_weights(configuration.task.weights),
        ),
        federation=replace(configuration.federation, clients=_absolute_path(configuration.federation.clients)),
        privacy=replace(configuration.privacy, ledger_dir=_absolute_path(configuration.privacy.ledger_dir)),
    )


def resume(path: Path) -> Simulation:
    """Find a run that was interrupted.

    Raises:
        ConfigurationError: If there is no run in the folder.
    """
    if not (path / CONFIGURATION).is_file():
        raise ConfigurationError(f"--resume: {path} holds no run ({CONFIGURATION} is missing)")
    configuration = parse(read_toml(path / CONFIGURATION))
    folder = RunFolder(path)
    claim = Claim(path)
    # the folder may have been moved since
    clients = str(folder.path / CLIENTS) if configuration.federation.clients else ""
    configuration = replace(
        configuration,
        runtime=replace(configuration.runtime, output=str(folder.path)),
        federation=replace(configuration.federation, clients=clients),
    )
    checkpoint = folder.load_checkpoint()
    done = int(checkpoint[1]["round"]) if checkpoint else 0
    records = _shares(configuration, _data_set(configuration))
    return Simulation(configuration, folder, records, done, claim)


def simulate(
    simulation: Simulation,
    engine: str,
    show: Show,
    ray_address: str | None = None,
    *,
    secret_noise: bool = False,
    stop_after: StopAfter | None = None,
) -> dict[str, Any]:
    """Run it and give what stands in ``result.json``.

    Args:
        simulation: What to run.
        engine: ``in-process`` or ``flower``.
        show: Given the line of metrics of every round.
        ray_address: For ``flower``: a Ray cluster that runs already; else a new one is started.
        secret_noise: For ``in-process``: sample and noise by secret randomness, which no seed repeats. (Those of
            ``flower`` are always secret.)
        stop_after: For ``in-process``: when to end the run before its last round.

    Raises:
        AdaDPIGUError: If the run failed.
        StoppedError: If ``stop_after`` has ended it.
    """
    check_oracle(simulation.configuration, available=engine == "in-process")
    watchers = _Watchers(simulation, show, stop_after)
    try:
        if engine == "in-process":
            return _in_process(simulation, watchers.see, secret_noise=secret_noise)
        return _through_flower(simulation, watchers.see, ray_address)
    finally:
        watchers.finish()
        simulation.claim.close()


class _Watchers:
    """Everything that is told of every round: display, report, TensorBoard if that is wanted, and who may stop it."""

    def __init__(self, simulation: Simulation, show: Show, stop_after: StopAfter | None) -> None:
        path, runtime = simulation.folder.path, simulation.configuration.runtime
        self._num_rounds = simulation.configuration.federation.num_rounds
        self._stop_after = stop_after
        self._show = show
        self._report = LiveReport(path)
        self._log = TensorBoardLog(path) if runtime.tensorboard else None

    def see(self, metrics: dict[str, Any]) -> None:
        self._show(metrics)
        self._report.update()
        if self._log is not None:
            self._log.add(metrics)
        if self._stop_after is not None:
            self._stop_after(metrics, self._num_rounds)

    def finish(self) -> None:
        self._report.finish()
        if self._log is not None:
            self._log.close()


def _in_process(simulation: Simulation, see: Show, *, secret_noise: bool) -> dict[str, Any]:
    configuration = simulation.configuration
    num_clients = configuration.federation.num_clients
    kind: dict[str, Value] = {"simulation": True, "unseeded": True} if secret_noise else {"simulation": True}
    nodes: list[dict[str, Value]] = [
        {"partition-id": index, "num-partitions": num_clients, **kind} for index in range(num_clients)
    ]
    workers = configuration.runtime.workers or min(os.cpu_count() or 1, num_clients)

    def observe(report: RoundReport) -> None:
        line = asdict(report)
        evaluated = line.pop("metrics")
        see({**line, **evaluated})

    with InProcessGrid("client.app:app", nodes, flatten(configuration), num_workers=workers) as grid:
        return run_server(grid, configuration, simulation.folder, observe, grid.wait, oracle_scores)


def _through_flower(simulation: Simulation, see: Show, ray_address: str | None) -> dict[str, Any]:
    folder, seen = simulation.folder, simulation.done
    (folder.path / RESULT).unlink(missing_ok=True)

    def poll() -> None:
        nonlocal seen
        for line in folder.metrics():
            if line["round"] > seen:
                seen = line["round"]
                see(line)

    defaults = {key: default for key, default, *_ in settings()}
    with TemporaryDirectory(prefix="adadpigu-") as neutral:
        app = flower_engine.write_app(Path(neutral) / "app", defaults)
        flower_engine.run(
            app,
            flatten(simulation.configuration),
            num_clients=simulation.configuration.federation.num_clients,
            ray_address=ray_address,
            on_poll=poll,
        )
    poll()
    result = folder.path / RESULT
    if not result.exists():
        raise flower_engine.FlowerRunError(f"the run ended without writing {result}")
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _absolute(dataset: str) -> str:
    """Name the user's own file by its absolute path."""
    prefix, place = datasets.taken_apart(dataset)
    path, mark, rest = place.partition("#")
    return f"{prefix}{located(path)}{mark}{rest}" if prefix and path else dataset


def read_settings(path: Path) -> dict[str, Value]:
    """Read a settings file; a list of clients and a file of weights that it names are looked for beside it.

    Raises:
        ConfigurationError: If the file is missing or is not TOML.
    """
    flat = read_toml(path)
    for key in ("federation.clients", "task.weights"):
        named = flat.get(key)
        if isinstance(named, str) and named not in ("", PUBLIC_DIGITS):
            flat[key] = str(path.parent / Path(named).expanduser())
    return flat


def _keep_clients(configuration: Configuration, folder: RunFolder) -> Configuration:
    """Copy the list of clients into the run, so that the run can go on whatever becomes of the original."""
    federation = configuration.federation
    if not federation.clients:
        return configuration
    folder.write_text(CLIENTS, Path(federation.clients).read_text(encoding="utf-8-sig"))
    return replace(configuration, federation=replace(federation, clients=str(folder.path / CLIENTS)))


def _absolute_path(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""


def _absolute_weights(weights: str) -> str:
    return weights if weights == PUBLIC_DIGITS else _absolute_path(weights)


def _default_output(configuration: Configuration) -> str:
    prefix, place = datasets.taken_apart(configuration.task.dataset)
    name = Path(place.partition("#")[0]).stem if prefix else re.sub(r"[:.]", "-", place)
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _data_set(configuration: Configuration) -> datasets.DataSet:
    return datasets.evaluated_on(datasets.load(configuration.task.dataset), configuration.task.evaluate_on)


def _shares(configuration: Configuration, data: datasets.DataSet) -> list[int]:
    """Number of records of each client; the clients deal them out again, in the same way."""
    federation = configuration.federation
    how = Deal(federation.partition, federation.dirichlet_alpha, federation.partition_seed, federation.clients)
    shares = deal(data.train.labels.numpy(), federation.num_clients, how)
    return [len(share) for share in shares]


def _claim_ledgers(configuration: Configuration) -> None:
    """Tie a lasting folder of ledgers to one way of dealing records out.

    Dealt out otherwise, the same records would be charged to other ledgers, and none would show what they have spent.
    """
    federation = configuration.federation
    clients = federation.clients
    wanted = {
        "task.dataset": configuration.task.dataset,
        # absent from the files of older releases
        "task.evaluate-on": None if configuration.task.evaluate_on == datasets.TEST else datasets.VALIDATION,
        "federation.num-clients": federation.num_clients,
        "federation.partition": federation.partition,
        "federation.dirichlet-alpha": federation.dirichlet_alpha,
        "federation.partition-seed": federation.partition_seed,
        "records of federation.clients": [entry.records for entry in listed_clients(clients)] if clients else None,
    }
    folder = Path(configuration.privacy.ledger_dir)
    path = folder / "partition.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"privacy.ledger-dir: {path} cannot be used ({error})") from error
    different = [f"{key} = {known.get(key)!r}" for key, value in wanted.items() if known.get(key) != value]
    if different:
        raise ConfigurationError(
            f"privacy.ledger-dir: the ledgers in {folder} belong to clients with {', '.join(different)}; "
            "use the same setting, or another folder for other clients"
        )


__all__ = [
    "CHECKPOINT",
    "ENGINES",
    "Simulation",
    "StopAfter",
    "StoppedError",
    "prepare",
    "read_settings",
    "resolved",
    "resume",
    "simulate",
]
