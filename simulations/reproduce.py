"""Tables of results, each made again by one command.

A table's runs lie in one folder. A run that is there already is not run again and one that was interrupted goes on, so
that a table goes on where it stopped; a run that was made with other settings is an error and never taken for its own.
Runs may work side by side, each in a process of its own with its own workers.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adadpigu_core.configuration import Value, flatten, parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.kept_features import keeping_in
from adadpigu_core.provenance import code_fingerprint
from adadpigu_core.settings_file import read_toml
from client.partitions import listed_clients
from server.run_folder import CONFIGURATION, RESULT, RunFolder
from simulations import table_report
from simulations.display import Progressing
from simulations.simulate import CLIENTS, StopAfter, prepare, read_settings, resolved, resume, simulate
from simulations.tables import Method, Row, Table

Watch = Callable[[int, int], AbstractContextManager[Progressing]]
# the average of the weights stands beside the last iterate in every table; it moves nothing
_ALWAYS: Mapping[str, Value] = {"optimiser.average-decay": 0.95}
MARKDOWN, JSON, FEATURES = "table.md", "table.json", "features"
# where and how a run was carried out is no part of what was run
_ANYWHERE = ("runtime.", "federation.clients", "federation.round-timeout", "federation.start-timeout")


@dataclass(frozen=True)
class Run:
    """One run of a table.

    Args:
        row: Name of the row.
        method: Name of the method.
        title: For people.
        flat: Its settings.
        folder: Where it writes.
    """

    row: str
    method: str
    title: str
    flat: Mapping[str, Value]
    folder: Path


def reproduce(
    table: Table,
    seeds: int,
    jobs: int,
    output: Path,
    watch: Watch,
    say: Callable[[str], None],
    stop_after: StopAfter | None = None,
) -> str:
    """Run what is missing of a table, and write it as Markdown, which is returned, and as JSON.

    Args:
        table: What to run.
        seeds: Runs of each entry, with seeds from 0.
        jobs: Runs side by side; 0 = one a core, where each is not to end in time and none has a GPU.
        output: Folder of the runs.
        watch: Shows the progress of a run, given its rounds and how many are done, where there is one at a time.
        say: Told which run begins or is done.
        stop_after: When to end, between two rounds; for one run at a time.

    Raises:
        StoppedError: If ``stop_after`` has ended it. What is done is kept.
        ConfigurationError: If settings cannot be used, or the folder holds runs with others.
        AdaDPIGUError: If a run failed.
    """
    planned = runs(table, seeds, output)
    missing = [run for run in planned if not _is_done(run)]
    jobs = jobs or _as_many_as_fit(missing, stop_after)
    with keeping_in(output / FEATURES):
        if jobs > 1:
            _side_by_side(missing, jobs, say)
        else:
            for number, run in enumerate(missing):
                if stop_after is not None and number > 0:
                    stop_after.before_another_run()
                say(run.title)
                _carry_out(run, watch, stop_after)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in planned:
        result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
        results.setdefault((run.row, run.method), []).append(result)
    machine = _machine(planned[0])
    if any(result["code"] != code_fingerprint() for each in results.values() for result in each):
        machine["commit"] = None  # of what is checked out now, which is not what all of them ran
    found = table_report.summary(table, results, seeds, machine)
    text = table_report.markdown(found)
    folder = RunFolder(output)
    folder.write_json(JSON, found)
    folder.write_text(MARKDOWN, text)
    return text


def runs(table: Table, seeds: int, output: Path) -> list[Run]:
    """All runs of a table: by row, method and seed."""
    return [
        _run(row, method, seed, output, table.changes)
        for row in table.rows
        for method in table.methods
        for seed in range(seeds)
    ]


def _run(row: Row, method: Method, seed: int, output: Path, changes: Mapping[str, Value]) -> Run:
    flat = {
        **_ALWAYS,
        **read_settings(row.settings),
        **row.changes(method),
        **changes,
        "seed": seed,
        "federation.partition-seed": seed,
    }
    title = f"{row.label}, {method.title}{'' if method.private else ' (not private)'}, seed {seed}"
    return Run(row.name, method.name, title, flat, output / f"{row.name}-{method.name}-seed-{seed}")


def _is_done(run: Run) -> bool:
    """Whether a run is over. Raises if its folder holds something else."""
    wanted = flatten(resolved(parse(run.flat)))
    if not (run.folder / CONFIGURATION).exists():
        return False
    found = flatten(parse(read_toml(run.folder / CONFIGURATION)))
    other = [key for key in wanted if not key.startswith(_ANYWHERE) and found[key] != wanted[key]]
    kept = found["federation.clients"] and run.folder / CLIENTS
    one, two = (listed_clients(str(place)) if place else () for place in (wanted["federation.clients"], kept))
    if one != two:
        other.append("federation.clients")
    if other:
        raise ConfigurationError(
            f"{run.folder} holds a run with {other[0]} = {found[other[0]]!r}, not {wanted[other[0]]!r}; "
            "choose another --output, or remove it"
        )
    return (run.folder / RESULT).exists()


def _as_many_as_fit(missing: list[Run], stop_after: StopAfter | None) -> int:
    alone = stop_after is not None or any(run.flat.get("runtime.device", "cpu") != "cpu" for run in missing)
    return 1 if alone else max(1, min(os.cpu_count() or 1, len(missing)))


def _carry_out(run: Run, watch: Watch, stop_after: StopAfter | None) -> None:
    begun = (run.folder / CONFIGURATION).exists()
    simulation = resume(run.folder) if begun else prepare({**run.flat, "runtime.output": str(run.folder)})
    with watch(simulation.configuration.federation.num_rounds, simulation.done) as progress:
        simulate(simulation, "in-process", progress.show, stop_after=stop_after)


def _side_by_side(missing: list[Run], jobs: int, say: Callable[[str], None]) -> None:
    """Carry out runs in processes of their own; the first that fails ends the table, once the others are over."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        waiting = {pool.submit(_carry_out_unseen, run): run for run in missing}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                future.result()
                say(f"{number}/{len(missing)} {waiting[future].title}: done")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """See to it that this process ends when the one that started it is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  # for the type checker: only the pool calls this

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _carry_out_unseen(run: Run) -> None:
    begun = (run.folder / CONFIGURATION).exists()
    flat = {"runtime.workers": 1, **run.flat, "runtime.output": str(run.folder)}
    simulate(resume(run.folder) if begun else prepare(flat), "in-process", lambda _: None)


def _machine(run: Run) -> dict[str, Any]:
    from simulations.benchmarks.machine import facts  # noqa: PLC0415 - imports torch

    device = str(run.flat.get("runtime.device", "cpu"))
    known = facts("cpu" if device == "auto" else device)
    return {key: known[key] for key in ("commit", "cpu", "cores", "gpu", "torch")}
