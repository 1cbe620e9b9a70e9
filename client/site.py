"""Where a client's records, ledger and limits come from.

A deployed client takes all three from its node's own configuration; nothing that a server says can change them. A
simulated client has no owner but the run, so its share of a public data set, its ledger and its budget come from the
run configuration. Which of the two it is must not be for the server to say either: see ``is_simulated``.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from adadpigu_core import datasets
from adadpigu_core.configuration import Configuration, Value, parse, run_folder
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.ledger import Target
from adadpigu_core.sampling import Randomness, SeededRandomness, SystemRandomness
from client.partitions import partition

_NODE_KEYS: dict[str, tuple[type, ...]] = {
    "dataset": (str,),
    "ledger": (str,),
    "target-epsilon": (float, int),
    "target-delta": (float,),
    "data-set-name": (str,),
    "name": (str,),
    "num-records": (int,),
}


@dataclass(frozen=True)
class Site:
    """Everything a client owns.

    Args:
        name: For people.
        records: Its records.
        content: Fingerprint of the records.
        data_set: Key of the ledger.
        ledger: Path of the ledger.
        target: Largest budget over everything ever released.
        num_records: Declared number of records.
        simulation_key: Seed of repeatable randomness; None = secret randomness.
    """

    name: str
    records: Records
    content: str
    data_set: str
    ledger: Path
    target: Target
    num_records: int
    simulation_key: tuple[int, ...] | None

    def randomness(self, round_number: int) -> Randomness:
        """Source of samples and noise for one round."""
        if self.simulation_key is None:
            return SystemRandomness()
        return SeededRandomness(*self.simulation_key, round_number)


def site(node_config: Mapping[str, Value], run_config: Mapping[str, Value], flower_run: int) -> Site:
    """Find the site of this process.

    Raises:
        ConfigurationError: If the node's configuration is incomplete or wrong.
        DataError: If the records cannot be read.
    """
    if is_simulated(node_config):
        return _simulated(parse(run_config), flower_run, node_config)
    return _deployed(tuple(sorted(node_config.items())))


def is_simulated(node_config: Mapping[str, Value]) -> bool:
    """Whether this node exists only inside a simulation.

    Either the in-process engine says so, or Flower's simulation does: its nodes have exactly these two settings and
    live in a Ray worker, which a deployed node does not.
    """
    if node_config.get("simulation") is True:
        return True
    return set(node_config) == {"partition-id", "num-partitions"} and "RAY_JOB_ID" in os.environ


def _simulated(configuration: Configuration, flower_run: int, node_config: Mapping[str, Value]) -> Site:
    index, count = int(node_config["partition-id"]), int(node_config["num-partitions"])
    federation, privacy = configuration.federation, configuration.privacy
    records, content = _share(
        configuration.task.dataset,
        index,
        count,
        (federation.partition, federation.dirichlet_alpha, federation.partition_seed),
    )
    folder = (
        Path(privacy.ledger_dir).expanduser()
        if privacy.ledger_dir
        else run_folder(configuration, flower_run) / "ledgers"
    )
    seeded = node_config.get("simulation") is True
    return Site(
        name=f"client-{index}",
        records=records,
        content=content,
        data_set=f"{configuration.task.dataset}/{index}-of-{count}",
        ledger=folder / f"{re.sub(r'[^a-z0-9-]+', '-', configuration.task.dataset.lower())}-{index}-of-{count}.sqlite",
        target=Target(privacy.target_epsilon, privacy.target_delta),
        num_records=len(records),
        simulation_key=(configuration.seed, index) if seeded else None,
    )


@lru_cache(maxsize=4)
def _data_set(name: str) -> datasets.DataSet:
    return datasets.load(name)


@lru_cache(maxsize=1024)
def _share(dataset: str, index: int, count: int, split: tuple[str, float, int]) -> tuple[Records, str]:
    shares = _split(dataset, count, split)
    records = _data_set(dataset).train.select(torch.from_numpy(shares[index]))
    return records, records.fingerprint()


@lru_cache(maxsize=4)
def _split(dataset: str, count: int, split: tuple[str, float, int]) -> list[NDArray[np.int64]]:
    scheme, alpha, seed = split
    labels = _data_set(dataset).train.labels.numpy()
    return partition(labels, num_partitions=count, scheme=scheme, alpha=alpha, seed=seed)


@lru_cache(maxsize=1)
def _deployed(settings: tuple[tuple[str, Value], ...]) -> Site:
    node_config = dict(settings)
    _check_node(node_config)
    source = str(node_config["dataset"])
    records = datasets.load_records(source)
    return Site(
        name=str(node_config.get("name", "")),
        records=records,
        content=records.fingerprint(),
        data_set=str(node_config.get("data-set-name", source)),
        ledger=Path(str(node_config["ledger"])).expanduser(),
        target=Target(float(node_config["target-epsilon"]), float(node_config["target-delta"])),
        num_records=int(node_config.get("num-records", len(records))),
        simulation_key=None,
    )


def _check_node(node_config: Mapping[str, Value]) -> None:
    problems = [f"{key}: there is no such setting" for key in node_config if key not in _NODE_KEYS]
    for key in ("dataset", "ledger", "target-epsilon", "target-delta"):
        if key not in node_config:
            problems.append(f"{key}: is missing; a node that owns records must set it")
    for key, kinds in _NODE_KEYS.items():
        if key in node_config and type(node_config[key]) not in kinds:
            problems.append(f"{key}: expected {kinds[0].__name__}, got {node_config[key]!r}")
    if not problems:
        if not float(node_config["target-epsilon"]) > 0:
            problems.append("target-epsilon: must be positive")
        if not 0 < float(node_config["target-delta"]) < 1:
            problems.append("target-delta: must be in (0, 1)")
        if int(node_config.get("num-records", 1)) < 1:
            problems.append("num-records: must be at least 1")
    if problems:
        listed = "\n".join(f"  * {problem}" for problem in problems)
        raise ConfigurationError(
            f"the configuration of this node cannot be used:\n{listed}", "the node's own configuration is wrong"
        )
