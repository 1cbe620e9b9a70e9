"""Where a client's records, ledger and limits come from.

A deployed client takes records and ledger from its node's own configuration and limits from its node's policy; nothing
that a server says can change them. A simulated client has no owner but the run, so its share of a public data set, its
ledger and its budget come from the run configuration. Which of the two it is must not be for the server to say either:
see ``is_simulated``.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adadpigu_core import datasets, front_ends, kept_features
from adadpigu_core.configuration import DEVICES, ORACLE, Configuration, RuntimeSettings, Value, parse
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError, LedgerError
from adadpigu_core.front_ends import applied
from adadpigu_core.gradients import DEFAULTS, PRECISIONS, GradientOptions
from adadpigu_core.home import run_folder
from adadpigu_core.ledger import Target
from adadpigu_core.sampling import Randomness, SeededRandomness, SystemRandomness
from client.file_modes import open_to_others
from client.partitions import Deal, deal, listed_clients
from client.policy import Limits, load


@dataclass(frozen=True)
class _NodeSetting:
    kinds: tuple[type, ...]
    fits: Callable[[Any], bool]
    rule: str
    required: bool = False


_NODE_SETTINGS = {
    "dataset": _NodeSetting((str,), bool, "must not be empty", required=True),
    # taken from another working directory, a relative path would be another ledger, with nothing spent
    "ledger": _NodeSetting(
        (str,), lambda path: os.path.isabs(os.path.expanduser(path)), "must be an absolute path", required=True
    ),
    "policy": _NodeSetting(
        (str,), lambda path: os.path.isabs(os.path.expanduser(path)), "must be an absolute path", required=True
    ),
    "data-set-name": _NodeSetting((str,), bool, "must not be empty"),
    "name": _NodeSetting(
        (str,), lambda name: len(name) <= 100 and name.isprintable(), "must be at most 100 printable letters"
    ),
    "num-records": _NodeSetting((int,), lambda number: number >= 1, "must be at least 1"),
    "num-classes": _NodeSetting((int,), lambda number: number >= 2, "must be at least 2"),
    "device": _NodeSetting((str,), DEVICES.__contains__, f"must be one of {', '.join(DEVICES)}"),
    "memory-limit": _NodeSetting((int,), lambda number: number >= 0, "must be at least 0 (MiB; 0: automatic)"),
    "precision": _NodeSetting((str,), PRECISIONS.__contains__, f"must be one of {', '.join(PRECISIONS)}"),
}
_MOVED = {
    "target-epsilon": "the budget of a data set stands in the node's policy, and nowhere else",
    "target-delta": "the budget of a data set stands in the node's policy, and nowhere else",
}
_SIMULATED = {"partition-id", "num-partitions"}
_UNSEEDED = "unseeded"  # of a simulated node: its noise does not follow from the seed


@dataclass(frozen=True)
class Site:
    """Everything a client owns.

    Args:
        name: For people.
        records: Its records.
        content: Fingerprint of the records.
        data_set: Key of the ledger.
        ledger: Path of the ledger.
        limits: What its owner allows, the budget over everything ever released among it.
        under: Its records with a front end's features in place of their own, by the front end's name.
        num_records: Declared number of records.
        num_classes: Declared number of classes; None = the labels themselves decide whether they fit a task, and a
            server that asks for tasks with more and more classes finds out the largest label.
        simulation_key: Seed of repeatable randomness; None = secret randomness.
        options: How gradients are computed on this machine.
        device: Where: ``cpu`` or ``cuda``. The records lie there already.
    """

    name: str
    records: Records
    content: str
    data_set: str
    ledger: Path
    limits: Limits
    under: Callable[[str], Records]
    num_records: int
    num_classes: int | None
    simulation_key: tuple[int, ...] | None
    options: GradientOptions = DEFAULTS
    device: str = "cpu"

    @property
    def target(self) -> Target:
        """Largest budget over everything ever released."""
        return self.limits.target

    def randomness(self, charge_id: int) -> Randomness:
        """Source of samples and noise for the round that a charge pays for.

        A simulation repeats itself by the number of the charge, not of the round: a second run on the same ledger must
        not draw the noise of the first again, because accounting is for independent noise.
        """
        if self.simulation_key is None:
            return SystemRandomness()
        return SeededRandomness(*self.simulation_key, charge_id)


def site(node_config: Mapping[str, Value], run_config: Mapping[str, Value], flower_run: int) -> Site:
    """Find the site of this process.

    Raises:
        ConfigurationError: If the node's configuration or its policy is incomplete or wrong.
        LedgerError: If others may write the ledger.
        DataError: If the records cannot be read.
    """
    if is_simulated(node_config):
        return _simulated(parse(run_config), flower_run, node_config)
    check_node(node_config)
    if run_config.get("pretraining.ranking") == ORACLE:
        text = "pretraining.ranking: an oracle is for simulations; this client holds records of its own"
        raise ConfigurationError(text, text)
    limits = owners_limits(node_config)
    check_ledger_place(ledger_path(node_config))
    return _deployed(tuple(sorted(node_config.items())), limits)


def is_simulated(node_config: Mapping[str, Value]) -> bool:
    """Whether this node exists only inside a simulation.

    Either the in-process engine says so, or Flower's simulation does: its nodes have exactly these two settings and
    live in a Ray worker. A deployed node may have the two settings, as in Flower's tutorials, and may be started from a
    Ray job, but its process is not connected to Ray. Settings of both kinds make a deployed node that is refused.
    """
    if node_config.get("simulation") is True:
        return set(node_config) - {_UNSEEDED} == {*_SIMULATED, "simulation"}
    return set(node_config) == _SIMULATED and _in_ray_worker()


def _in_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    return "RAY_JOB_ID" in os.environ and ray is not None and bool(ray.is_initialized())


def _simulated(configuration: Configuration, flower_run: int, node_config: Mapping[str, Value]) -> Site:
    index, count = node_config["partition-id"], node_config["num-partitions"]
    if type(index) is not int or type(count) is not int or not 0 <= index < count:
        raise ConfigurationError(f"there is no partition {index!r} of {count!r}")
    federation, privacy = configuration.federation, configuration.privacy
    dataset, evaluated_on = configuration.task.dataset, configuration.task.evaluate_on
    how = Deal(federation.partition, federation.dirichlet_alpha, federation.partition_seed, federation.clients)
    device = available_device(configuration.runtime.device)
    share = _Share((dataset, evaluated_on), index, count, how, device)
    records, content = _records_of(share)
    entry = listed_clients(how.clients)[index] if how.clients else None
    folder = (
        Path(privacy.ledger_dir).expanduser()
        if privacy.ledger_dir
        else run_folder(configuration, flower_run) / "ledgers"
    )
    # rows are keyed by the whole name, so that it does no harm if two names are cut to the same file
    stem = re.sub(r"[^a-z0-9-]+", "-", dataset.lower())[-100:]
    seeded = node_config.get("simulation") is True and not node_config.get(_UNSEEDED)
    return Site(
        name=entry.id if entry else f"client-{index}",
        records=records,
        content=content,
        data_set=f"{dataset}/{index}-of-{count}",
        ledger=folder / f"{stem}-{index}-of-{count}.sqlite",
        limits=Limits.of_simulation(
            Target(entry.target_epsilon if entry else privacy.target_epsilon, privacy.target_delta)
        ),
        under=partial(_features_of, share),
        num_records=len(records),
        num_classes=_data_set((dataset, evaluated_on)).num_classes,
        simulation_key=(configuration.seed, index) if seeded else None,
        options=configuration.runtime.gradient_options,
        device=device,
    )


_Task = tuple[str, str]  # a data set, and the part of it that is for evaluation


@lru_cache(maxsize=4)
def _data_set(task: _Task) -> datasets.DataSet:
    name, evaluated_on = task
    return datasets.evaluated_on(datasets.load(name), evaluated_on)


@dataclass(frozen=True)
class _Share:
    """A simulated client's part of a data set."""

    task: _Task
    index: int
    count: int
    split: Deal
    device: str

    @property
    def indices(self) -> NDArray[np.int64]:
        return _split(self.task, self.count, self.split)[self.index]


@lru_cache(maxsize=1024)
def _records_of(share: _Share) -> tuple[Records, str]:
    records = _data_set(share.task).train.select(share.indices)
    return records.to(share.device), records.fingerprint()


@lru_cache(maxsize=1024)
def _features_of(share: _Share, front_end: str) -> Records:
    if front_end == front_ends.RAW or not kept_features.folder():
        return applied(front_end, _records_of(share)[0])
    return _all_features(share.task, front_end).select(share.indices).to(share.device)


@lru_cache(maxsize=1)
def _all_features(task: _Task, front_end: str) -> Records:
    return kept_features.public_features(front_end, _data_set(task).train)


@lru_cache(maxsize=4)
def _split(task: _Task, count: int, split: Deal) -> list[NDArray[np.int64]]:
    return deal(_data_set(task).train.labels.numpy(), count, split)


def data_set_name(node_config: Mapping[str, Value]) -> str:
    """Key of the ledger and of the policy: a name that the owner gave, or where the records are."""
    return str(node_config.get("data-set-name", node_config["dataset"]))


def owners_limits(node_config: Mapping[str, Value]) -> Limits:
    """What the owner of a node that has records allows: its policy, read anew.

    Raises:
        ConfigurationError: If the policy cannot be used, or does not name the data set.
    """
    return load(Path(str(node_config["policy"])).expanduser()).of(data_set_name(node_config))


def ledger_path(node_config: Mapping[str, Value]) -> Path:
    """Where a node that owns records keeps its ledger."""
    return Path(str(node_config["ledger"])).expanduser()


def check_ledger_place(path: Path) -> None:
    """Refuse a ledger that others than its owner may write, or take away and so start afresh.

    Raises:
        LedgerError: Naming the file or the folder.
    """
    place = open_to_others(path)
    if place is not None:
        raise LedgerError(f"{place}: others may write here, and so exchange the ledger {path}; run chmod go-w on it")


@lru_cache(maxsize=1)
def _deployed(settings: tuple[tuple[str, Value], ...], limits: Limits) -> Site:
    node_config = dict(settings)
    records = datasets.load_records(str(node_config["dataset"]))
    classes = node_config.get("num-classes")
    runtime = RuntimeSettings(
        device=str(node_config.get("device", "auto")),
        memory_limit=int(node_config.get("memory-limit", 0)),
        precision=str(node_config.get("precision", "float32")),
    )
    device = available_device(runtime.device)
    here = records.to(device)
    return Site(
        name=str(node_config.get("name", "")),
        records=here,
        content=records.fingerprint(),
        data_set=data_set_name(node_config),
        ledger=ledger_path(node_config),
        limits=limits,
        under=cache(partial(applied, records=here)),
        num_records=int(node_config.get("num-records", len(records))),
        num_classes=None if classes is None else int(classes),
        simulation_key=None,
        options=runtime.gradient_options,
        device=device,
    )


def available_device(wanted: str) -> str:
    """Turn ``auto`` into what is there.

    Raises:
        ConfigurationError: ``cuda`` is asked for and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device: this machine has no CUDA device that torch can use; set device to cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def check_node(node_config: Mapping[str, Value]) -> None:
    """Check the configuration of a node that owns records, and report all problems at once.

    Raises:
        ConfigurationError: If a setting is unknown, missing or cannot be used.
    """
    unknown = (key for key in node_config if key not in _NODE_SETTINGS)
    problems = [f"{key}: {_MOVED.get(key, 'there is no such setting')}" for key in unknown]
    for key, setting in _NODE_SETTINGS.items():
        value = node_config.get(key)
        if value is None:
            if setting.required:
                problems.append(f"{key}: is missing; a node that owns records must set it")
        elif type(value) not in setting.kinds:
            problems.append(f"{key}: expected {setting.kinds[0].__name__}, got {value!r}")
        elif not setting.fits(value):
            problems.append(f"{key}: {setting.rule}, got {value!r}")
    if problems:
        listed = "\n".join(f"  * {problem}" for problem in problems)
        raise ConfigurationError(
            f"the configuration of this node cannot be used:\n{listed}", "the node's own configuration is wrong"
        )
