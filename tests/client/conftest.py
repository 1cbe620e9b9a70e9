"""A deployed node on files of its own, asked through Flower's messages as a server would."""

import json
import sqlite3
import time
from contextlib import closing

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

import client.site
from adadpigu_core.adaptive_clipping import AdaptiveClipping
from adadpigu_core.messages import (
    DescribeRequest,
    Description,
    Refusal,
    TrainReply,
    TrainRequest,
    Wire,
    decode,
    encode,
    kind_of,
)
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import ParameterLayout, flatten
from adadpigu_core.provenance import code_fingerprint
from client.app import app
from client.wire import from_content, to_content
from simulations import worker

SPEC = ModelSpec("linear", "relu", "none", (4,), 3)
LAYOUT = ParameterLayout.of(build(SPEC, seed=0))
KINDS = {kind.__name__: kind for kind in (Description, TrainReply, Refusal)}
NUM_RECORDS = 60


def describe_request(**changes):
    values = {
        "run": "run-1",
        "code": code_fingerprint(),
        "model": SPEC,
        "layout": LAYOUT.fingerprint,
        "sampling_probability": 0.5,
        "pretraining_steps": 0,
        "training_steps": 4,
        "pretraining_share": 0.2,
        "target_epsilon": 8.0,
        "target_delta": 1e-5,
    }
    return DescribeRequest(**{**values, **changes})


def train_request(**changes):
    values = {
        "run": "run-1",
        "code": code_fingerprint(),
        "round": 1,
        "phase": "training",
        "model": SPEC,
        "weights": flatten(build(SPEC, seed=0)).numpy(),
        "mask": None,
        "mask_id": "",
        "gradient_mean": None,
        "gradient_scale": None,
        "clipping": AdaptiveClipping(),
        "client_statistics": False,
        "clipping_norm": 1.0,
        "steps": 1,
        "learning_rate": 0.5,
        "importance_measure": "",
    }
    return TrainRequest(**{**values, **changes})


def altered(wire, changes):
    """Change entries of a message behind the back of its class, as a malicious server would; None leaves one out."""
    arrays, values = dict(wire.arrays), dict(wire.values)
    for key, value in changes.items():
        arrays.pop(key, None)
        values.pop(key, None)
        if value is not None:
            (arrays if isinstance(value, np.ndarray) else values)[key] = value
    return Wire(arrays, values)


class Node:
    """A SuperNode's ClientApp. Every message meets a new process, as far as memory goes.

    Its policy is written before each message, from ``budget``, ``limits`` and ``allowed``.
    """

    def __init__(self, folder, budget=(8.0, 1e-5), **config):
        self.folder = folder
        self.data, self.ledger = folder / "site.npz", folder / "private" / "ledger.sqlite"
        self.policy = folder / "policy.toml"
        self.budget = {"epsilon": budget[0], "delta": budget[1]}
        self.limits = {
            "smallest-noise-multiplier": 0.3,
            "largest-sampling-probability": 1.0,
            "largest-steps-per-round": 1000,
        }
        self.allowed = {"models": "any", "code": "any"}
        self.run_config = {}
        self.config = {
            "dataset": f"npz:{self.data}",
            "ledger": str(self.ledger),
            "policy": str(self.policy),
            **config,
        }
        generator = np.random.default_rng(0)
        features = generator.normal(size=(NUM_RECORDS, 4)).astype(np.float32)
        self.save(x=features, y=np.arange(NUM_RECORDS) % 3)
        self.write_policy()

    def save(self, **arrays):
        np.savez(self.data, **arrays)

    def write_policy(self):
        """Write the policy down."""
        name = self.config.get("data-set-name", self.config.get("dataset", ""))
        tables = {f"data-sets.{json.dumps(name)}": self.budget}
        tables |= {"limits": self.limits, "allowed": self.allowed}
        lines = ["version = 1"]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        self.policy.write_text("\n".join(lines))

    def send(self, content, message_type):
        """Give the app a message and take its answer, both serialised as on the network."""
        client.site._deployed.cache_clear()
        self.write_policy()
        now = time.time()
        message = make_message(Metadata(1, "request", 1, 7, "", "1", now, 3600.0, message_type), content)
        context = Context(1, 7, dict(self.config), RecordDict(), dict(self.run_config))
        outer = worker.set_task_identity((7, 1, 7))
        try:
            reply = app(worker.decode(worker.encode(message)), context)
            worker.assign_message_id(reply)
            reply = worker.decode(worker.encode(reply))
        finally:
            worker.set_task_identity(outer)
        assert reply.has_content(), reply.error
        wire = from_content(reply.content)
        return decode(wire, KINDS[kind_of(wire)])

    def ask(self, request, changes=None):
        message_type = "query.describe" if isinstance(request, DescribeRequest) else "train"
        return self.send(to_content(altered(encode(request), changes or {})), message_type)

    def describe(self, **changes):
        return self.ask(describe_request(**changes))

    def train(self, **changes):
        return self.ask(train_request(**changes))

    def rows(self, table):
        """Everything in a table of the ledger, read without the ledger's code; nothing if there is no ledger."""
        if not self.ledger.is_file():
            return []
        with closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as connection:
            return connection.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()

    def charged(self):
        """Charges and releases, byte for byte."""
        return self.rows("charges"), self.rows("releases")


@pytest.fixture
def make_node(tmp_path):
    def make(folder=tmp_path, **config):
        return Node(folder, **config)

    return make


@pytest.fixture
def node(make_node):
    """A deployed node without a plan."""
    return make_node()


@pytest.fixture
def described(node):
    """A deployed node with a plan of one pretraining and three training steps for run-1."""
    assert isinstance(node.describe(), Description)
    return node


@pytest.fixture
def requests():
    """Make valid requests: ``requests.describe(...)`` and ``requests.train(...)``."""

    class Requests:
        describe, train = staticmethod(describe_request), staticmethod(train_request)
        spec, layout = SPEC, LAYOUT

    return Requests
