"""Seconds a round over real processes: a SuperLink with TLS and node keys, SuperNodes, the app between them.

    scripts/rounds warm 2         clients that copy a process which has imported everything
    scripts/rounds cold 2         each message starts its process anew
    scripts/rounds opacus 2       what Flower's example for Opacus does, on plain SuperNodes

Each client has 2,000 made-up images and takes four private steps of 125 in a round, on the CIFAR network of 550,570
parameters. All of them share this machine, so that only ratios of one run to another on it mean something.
"""

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from conftest import Federation, make_certificates

from adadpigu_core.ledger import Target
from adadpigu_core.provenance import code_fingerprint
from client.policy import template
from simulations import process_tree

EXAMPLE = Path(__file__).parent / "opacus_example"
KINDS = ("warm", "cold", "opacus")
RECORDS, STEPS, BATCH = 2000, 4, 125
PATIENCE = 900


def main(
    kind: Annotated[str, typer.Argument(help="warm, cold or opacus")],
    clients: Annotated[int, typer.Argument(min=1)] = 2,
    rounds: Annotated[int, typer.Argument(min=2)] = 4,
) -> None:
    """Measure the seconds of each round."""
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(KINDS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing goes on behind
    with tempfile.TemporaryDirectory(prefix="rounds-") as folder:
        seconds = measure(Path(folder), kind, clients, rounds)
    median = statistics.median(seconds)
    print(f"{kind}, {clients} clients: {median:.1f} s a round ({', '.join(f'{each:.1f}' for each in seconds)})")


def measure(folder: Path, kind: str, clients: int, rounds: int) -> list[float]:
    """Seconds of each round, from first to last."""
    certificates, home = folder / "certificates", folder / "federation"
    certificates.mkdir()
    home.mkdir()
    names = [f"node{index}" for index in range(clients)]
    make_certificates(certificates, *names)
    federation = Federation(home, certificates)
    try:
        federation.start_link()
        for index, name in enumerate(names):
            start_node(federation, name, index, plain=kind == "opacus")
        federation.until(lambda: all("SuperNode ID: " in federation.sites[name].output for name in names), PATIENCE)
        if kind == "opacus":
            return example(federation, clients, rounds)
        federation.until(lambda: len(warm(federation)) == clients, PATIENCE)
        time.sleep(10 + 2 * clients)  # until they have imported everything
        for process in warm(federation) if kind == "cold" else []:
            os.kill(process, signal.SIGKILL)
        return ours(federation, clients, rounds)
    finally:
        federation.end()


def start_node(federation: Federation, name: str, seed: int, *, plain: bool) -> None:
    """Give a node records and a policy, and start it."""
    site = federation.site(name)
    images = np.random.default_rng(seed).random((RECORDS, 3, 32, 32), dtype=np.float32)
    np.savez(site.data, x=images, y=np.arange(RECORDS) % 10)
    site.policy.write_text(template("records", Target(50.0, 1e-5), code_fingerprint()))
    federation.register(name)
    federation.start_node(name, plain=plain)


def warm(federation: Federation) -> list[int]:
    """The processes that are copied."""
    found = []
    for site in federation.sites.values():
        for process in process_tree.descendants(site.program.process.pid):
            with suppress(OSError):  # it may be gone
                if b"client.warm" in Path(f"/proc/{process}/cmdline").read_bytes():
                    found.append(process)
    return found


def ours(federation: Federation, clients: int, rounds: int) -> list[float]:
    """Run AdaDPIGU."""
    output, task = federation.folder / "run", federation.folder / "images.npz"
    images, labels = np.random.default_rng(9).random((20, 3, 32, 32), dtype=np.float32), np.arange(20) % 10
    np.savez(task, x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = {
        "task.dataset": f"npz:{task}",
        "task.model": "cifar-cnn",
        "federation.num-clients": clients,
        "federation.num-rounds": rounds,
        "federation.local-steps": STEPS,
        "federation.start-timeout": 300.0,
        "privacy.target-epsilon": 50.0,
        "privacy.sampling-probability": BATCH / RECORDS,
    }
    federation.submit(output, **settings)
    federation.await_result(output, PATIENCE)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["clients"] == clients for line in lines), lines
    return [line["seconds"] for line in lines]


def example(federation: Federation, clients: int, rounds: int) -> list[float]:
    """Run the example."""
    app, times, settings = (federation.folder / name for name in ("app", "times", "settings.toml"))
    shutil.copytree(EXAMPLE, app)
    settings.write_text(
        f"num-rounds = {rounds}\nnum-clients = {clients}\nsteps = {STEPS}\ntimes = {json.dumps(str(times))}\n"
    )
    federation.flwr("run", app, "dep", "--run-config", settings)
    federation.until(lambda: times.exists() and len(times.read_text().splitlines()) > rounds, PATIENCE, pause=1)
    ends = [float(line.split()[1]) for line in times.read_text().splitlines()]
    return [after - before for before, after in pairwise(ends)]


if __name__ == "__main__":
    typer.run(main)
