"""How a simulation deals the records of one data set out to clients.

The cutting is done by the partitioners of flwr-datasets, over an in-memory table of labels; what comes back is
indices, so the records themselves are never copied or written. A deployed client has no use for this module: it has
its own file.

The deal looks at all labels at once. That is fine in a simulation, where one machine holds everything, and would be a
release in a real federation. Left out: other ways of being different than in the labels, and clients that share
records, because the unit of protection is one record of one client.
"""

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.client_list import ClientEntry, read_clients
from adadpigu_core.exceptions import ConfigurationError

SCHEMES = ("iid", "dirichlet")
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Deal:
    """How records are dealt out in a simulation.

    Args:
        scheme: ``iid`` or ``dirichlet``.
        alpha: Skew of a dirichlet deal.
        seed: Seed of the deal.
        clients: CSV file that says how many records each client has; empty = even shares, or as dirichlet deals.
    """

    scheme: str
    alpha: float
    seed: int
    clients: str = ""


def deal(labels: NDArray[np.integer[Any]], num_clients: int, how: Deal) -> list[Indices]:
    """Deal records out; for each client the sorted indices of its records.

    Raises:
        ConfigurationError: If the file of clients cannot be used, or there is no such deal.
    """
    if not how.clients:
        return partition(labels, num_partitions=num_clients, scheme=how.scheme, alpha=how.alpha, seed=how.seed)
    entries = listed_clients(how.clients)
    if len(entries) != num_clients:
        raise ConfigurationError(
            f"federation.num-clients: is {num_clients}, but {how.clients} lists {len(entries)}; set it to that"
        )
    return partition_by_size(len(labels), [entry.records for entry in entries], how.seed)


def listed_clients(path: str) -> tuple[ClientEntry, ...]:
    """The clients of a CSV file, read once a process unless it changes."""
    try:
        version = Path(path).stat().st_mtime_ns
    except OSError:
        version = 0  # reading says what is wrong
    return _listed_clients(path, version)


@lru_cache(maxsize=4)
def _listed_clients(path: str, _version: int) -> tuple[ClientEntry, ...]:
    return read_clients(Path(path))


def partition(
    labels: NDArray[np.integer[Any]], *, num_partitions: int, scheme: str, alpha: float, seed: int
) -> list[Indices]:
    """Deal records out, the same way for the same arguments.

    Args:
        labels: Class of each record, integers [n].
        num_partitions: How many clients.
        scheme: "iid" deals a shuffled deck evenly; "dirichlet" draws each class's shares from Dirichlet(alpha).
        alpha: Above 0. Small values give a client few classes, large ones all alike. "iid" ignores it.
        seed: Seed of the deal.

    Returns:
        For each client the sorted indices of its records: disjoint, together all of them, none empty.

    Raises:
        ConfigurationError: The scheme is unknown, a number is out of range, or no deal without an empty client was
            found.
    """
    _check(len(labels), num_partitions, scheme, alpha)
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner = _partitioner(num_partitions, scheme, alpha, seed)
    parts = _deal(partitioner, order, np.asarray(labels)[order])
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels))):
        raise ConfigurationError(f"alpha is {alpha}: the shares cannot be computed in floating point")
    return parts


def partition_by_size(num_records: int, sizes: Sequence[int], seed: int) -> list[Indices]:
    """Deal a shuffled deck out in pieces of given sizes; records that are left over belong to nobody.

    Args:
        num_records: How many records there are.
        sizes: How many each client gets.
        seed: Seed of the deal.

    Returns:
        For each client the sorted indices of its records, disjoint.

    Raises:
        ConfigurationError: If there are too few records.
    """
    if sum(sizes) > num_records:
        raise ConfigurationError(f"the clients have {sum(sizes)} records together, but there are only {num_records}")
    order = np.random.default_rng(seed).permutation(num_records)
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes))[:-1]]


def _check(num_records: int, num_partitions: int, scheme: str, alpha: float) -> None:
    if scheme not in SCHEMES:
        raise ConfigurationError(f"unknown partition scheme {scheme!r}: choose {', '.join(SCHEMES)}")
    if not 1 <= num_partitions <= num_records:
        raise ConfigurationError(f"{num_records} records cannot be dealt to {num_partitions} clients")
    if scheme == "dirichlet" and not (math.isfinite(alpha) and alpha > 0):
        raise ConfigurationError(f"alpha is {alpha}; it must be a positive number")


def _partitioner(num_partitions: int, scheme: str, alpha: float, seed: int) -> Any:
    partitioners = _import_partitioners()
    if scheme == "iid":
        return partitioners.IidPartitioner(num_partitions)
    return partitioners.DirichletPartitioner(
        num_partitions, partition_by="label", alpha=float(alpha), min_partition_size=1, shuffle=False, seed=seed
    )


def _import_partitioners() -> ModuleType:
    """Import flwr-datasets late, and without its plots.

    Only simulations deal records. The plots would bring matplotlib and seaborn: seconds of importing, and a list of
    fonts written into the user's home. Whoever imports the plots later gets the real ones.
    """
    plots = "flwr_datasets.visualization"
    if "flwr_datasets" in sys.modules:
        return import_module("flwr_datasets.partitioner")
    sys.modules[plots] = ModuleType(plots)
    try:
        package = import_module("flwr_datasets")
    finally:
        del sys.modules[plots]
    vars(package).pop("visualization", None)
    return import_module("flwr_datasets.partitioner")


def _deal(partitioner: Any, order: Indices, labels: NDArray[np.integer[Any]]) -> list[Indices]:
    """Run a partitioner over the shuffled records; the shuffling is ours, since IidPartitioner only cuts."""
    partitioner.dataset = import_module("datasets").Dataset.from_dict({"record": order, "label": labels})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It warns at each retry, and gives up by itself.
            parts = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
    except ValueError as error:
        raise ConfigurationError(
            f"no deal without an empty client was found ({error}); use fewer clients or a larger alpha"
        ) from error
    # Read in one piece: item by item, 60,000 records take three seconds.
    return [np.sort(part.with_format("numpy")[:]["record"]) for part in parts]
