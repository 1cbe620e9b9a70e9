"""Checks of a machine that holds records: configuration, policy, records, ledger, keys, and the way to the server."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from adadpigu_core import datasets
from adadpigu_core.accounting import epsilon
from adadpigu_core.configuration import Value
from adadpigu_core.ledger_history import read
from adadpigu_core.provenance import code_fingerprint
from client.site import check_ledger_place, check_node, data_set_name, ledger_path, owners_limits
from simulations import doctor_common as common
from simulations.findings import FAULT, GOOD, NOTE, WARNING, Check, Finding, if_given

_LARGEST_DELTA_TIMES_RECORDS = 0.1


@dataclass(frozen=True)
class ClientFiles:
    """What a SuperNode is started with.

    Args:
        node_config: Its configuration, as Flower parses it.
        superlink: Address of the server; None = not to be tried.
        authority: Certificate of the authority that signed the server's.
        key: Private key of the node.
    """

    node_config: Mapping[str, Value]
    superlink: str | None = None
    authority: Path | None = None
    key: Path | None = None


def checks(files: ClientFiles) -> Iterator[tuple[str, Check]]:
    """Everything that can be checked with what is given."""
    config = files.node_config
    yield "versions", common.software
    yield "node config", partial(_configuration, config)
    yield "policy", partial(_policy, config)
    yield "records", partial(_records, config)
    yield "ledger", partial(_ledger, config)
    yield "GPU", common.accelerator
    yield from if_given("node key", files.key, partial(common.private_file, subject="node key"))
    yield from if_given("authority", files.authority, partial(common.certificate, subject="authority"))
    yield from if_given("superlink", files.superlink, partial(common.reach, authority=files.authority))


def _configuration(node_config: Mapping[str, Value]) -> Iterator[Finding]:
    check_node(node_config)
    yield Finding(GOOD, "node config", f"complete; the data set is {data_set_name(node_config)!r}")
    if "num-classes" not in node_config:
        text = "num-classes is not declared: a server that asks for fewer and fewer classes learns the largest label"
        yield Finding(WARNING, "node config", text, "declare num-classes")


def _policy(node_config: Mapping[str, Value]) -> Iterator[Finding]:
    limits = owners_limits(node_config)
    budget = f"epsilon {limits.target.epsilon:g} at delta {limits.target.delta:g}"
    yield Finding(GOOD, "policy", f"{node_config['policy']}: allows {budget}, over all time")
    own = code_fingerprint()
    if limits.code is not None and own not in limits.code:
        yield Finding(FAULT, "policy", f"does not list the code installed here, {own}", "add it to allowed.code")
    if limits.code is None:
        yield Finding(WARNING, "policy", "allows any code", "list the releases that you have looked at")


def _records(node_config: Mapping[str, Value]) -> Iterator[Finding]:
    records = datasets.load_records(str(node_config["dataset"]))
    shape = [*records.features.shape[1:]]
    classes = int(node_config.get("num-classes", int(records.labels.max()) + 1 if len(records) else 2))
    datasets.check_records(records, input_shape=shape, num_classes=classes)
    present = len(torch.unique(records.labels))
    yield Finding(GOOD, "records", f"{len(records)} records of shape {shape}, {present} of {classes} classes")
    delta = owners_limits(node_config).target.delta
    if delta * len(records) > _LARGEST_DELTA_TIMES_RECORDS:
        text = f"delta {delta:g} is large for {len(records)} records"
        yield Finding(WARNING, "records", text, "choose a delta well below one over the number of records")


def _ledger(node_config: Mapping[str, Value]) -> Iterator[Finding]:
    path = ledger_path(node_config)
    check_ledger_place(path)
    yield from common.writable_folder(path.parent, "ledger")
    marker = path.with_name(path.name + ".known")
    if not path.exists() and not marker.exists():
        yield Finding(NOTE, "ledger", f"{path}: does not exist yet; the first request makes it")
        return
    histories = read(path)
    yield from common.private_file(path, "ledger")
    limits = owners_limits(node_config)
    for history in histories:
        for problem in history.problems():
            yield Finding(WARNING, "ledger", f"{history.name}: {problem}", "see 'adadpigu ledger verify'")
        if history.name == data_set_name(node_config):
            spent, target = epsilon(history.events, limits.target.delta), limits.target.epsilon
            level = GOOD if spent < target else WARNING
            remedy = "" if level == GOOD else "nothing is left: the client refuses until its owner allows more"
            yield Finding(level, "ledger", f"epsilon {spent:.4f} of {target:g} is spent", remedy)
