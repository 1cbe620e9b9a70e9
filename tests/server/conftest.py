"""A grid without processes, and clients that follow a script: honest unless a test says otherwise."""

import time
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

import client.app
import server.app
from adadpigu_core import masking
from adadpigu_core.accounting import Event
from adadpigu_core.configuration import flatten as flat_settings
from adadpigu_core.configuration import parse
from adadpigu_core.grouping import shared
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
from adadpigu_core.parameters import ParameterLayout
from server.round_report import ignore
from server.run_folder import RunFolder
from server.state import ServerState
from server.strategy import AdaDPIGU
from server.wire import from_content, to_content
from simulations import worker

SPEC = ModelSpec("linear", "relu", "none", (3,), 2)
LAYOUT = ParameterLayout.of(build(SPEC, seed=0))
D = LAYOUT.num_parameters  # 8: a weight of 6 and a bias of 2
SETTINGS = {
    "federation.num-clients": 2,
    "federation.num-rounds": 4,
    "federation.round-timeout": 5.0,
    "federation.start-timeout": 0.0,
    "pretraining.round-share": 0.25,
    "pretraining.measure": "energy",
    "retention.initial-ratio": 0.5,
    "retention.period": 0.5,
    "adaptive-clipping.rule": "energy",
    "optimiser.momentum": 0.0,
    "optimiser.local-learning-rate": 1.0,
    "privacy.sampling-probability": 0.5,
}
LOST = None


def _configuration(**changes):
    return parse({**SETTINGS, **{key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}})


class Later:
    """A reply that arrives when the request of a later round has been sent."""

    def __init__(self, reply, rounds=1):
        self.reply, self.rounds = reply, rounds


class ScriptedClient:
    """Answers as the protocol wants it. ``script`` maps a round (0 is the description) to a function of (client,
    request) that gives what goes out instead: a message, a content, an Error, a Later, or LOST.
    """

    def __init__(self, name="client-1", script=None, *, records=100, noise=(2.0, 1.0), value=0.1):
        self.name, self.script = name, script or {}
        self.data_set = str(uuid.uuid4())
        self.records, self.noise, self.value = records, noise, value
        self.counts = {"pretraining": 0, "training": 0}
        self.requests, self.mask_sent, self.masks = [], [], {"": np.ones(D, bool)}

    @property
    def spent(self):
        kinds = zip(self.counts.items(), self.noise, strict=True)
        return tuple(Event(phase, noise, 0.5, count) for (phase, count), noise in kinds if count)

    def description(self, **changes):
        facts = Description(
            name=self.name,
            device="cpu",
            data_set=self.data_set,
            num_records=self.records,
            target_epsilon=8.0,
            target_delta=1e-5,
            pretraining_noise_multiplier=self.noise[0],
            training_noise_multiplier=self.noise[1],
            spent=self.spent,
        )
        return replace(facts, **changes)

    def release(self, request, **changes):
        """A reply as it should be; the update is the same number everywhere, and so is importance."""
        self.counts[request.phase] += request.steps
        retained = int(self.masks[request.mask_id].sum())
        scores = np.arange(D, dtype=np.float32) if request.importance_measure else None
        update = np.full(retained, self.value, np.float32)
        reply = TrainReply(request.run, request.round, request.phase, update, scores, self.data_set, self.spent)
        return replace(reply, **changes)

    def refusal(self, code="internal", message="", **changes):
        return replace(Refusal(code, message, self.data_set, self.spent), **changes)

    def answer(self, content):
        wire = from_content(content)
        request = decode(wire, {"DescribeRequest": DescribeRequest, "TrainRequest": TrainRequest}[kind_of(wire)])
        number = getattr(request, "round", 0)
        if number:
            self.requests.append(request)
            if request.mask is not None:
                group = shared(LAYOUT, request.mask_granularity)
                count = D if group is None else int(group.max()) + 1
                self.masks[request.mask_id] = masking.unpack(request.mask, count, group).numpy()
        if number in self.script:
            return self.script[number](self, request)
        return self.release(request) if number else self.description()


class ScriptedGrid(Grid):
    """Hands every message to its client at once, through Flower's own serialisation in both directions."""

    def __init__(self, clients):
        self.clients = {10 + index: each for index, each in enumerate(clients)}
        self.present = set(self.clients)
        self.pushed, self._round, self._replies = [], 0, {}

    def set_run(self, run):
        raise AssertionError("nothing here may ask Flower for this")

    @property
    def run(self):
        return Run.create_empty(1)

    def create_message(self, *args, **settings):
        raise AssertionError("nothing here may ask Flower for this")

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("nothing here may ask Flower for this")

    def get_node_ids(self):
        return sorted(self.present)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message):
        worker.assign_message_id(message)
        self.pushed.append(message)
        self._round = max(self._round, int(message.metadata.group_id))
        delivered = worker.decode(worker.encode(message))
        reply = self.clients[message.metadata.dst_node_id].answer(delivered.content)
        ready = self._round
        if isinstance(reply, Later):
            reply, ready = reply.reply, self._round + reply.rounds
        if reply is not LOST:
            self._replies[message.metadata.message_id] = (ready, self._packed(reply, message))
        return message.metadata.message_id

    @staticmethod
    def _packed(reply, message):
        if not isinstance(reply, Error | RecordDict):
            reply = to_content(encode(reply))
        answer = Message(reply, reply_to=message)
        worker.assign_message_id(answer)
        return worker.encode(answer)

    def pull_messages(self, message_ids):
        ready = [key for key in message_ids if key in self._replies and self._replies[key][0] <= self._round]
        return [worker.decode(self._replies.pop(key)[1]) for key in ready]


class RealClient:
    """The project's ClientApp as node ``index`` of a simulation, in this process."""

    def __init__(self, configuration, index, count):
        node_config = {"partition-id": index, "num-partitions": count, "simulation": True}
        self.context = Context(10 + index, 10 + index, node_config, RecordDict(), flat_settings(configuration))


class RealGrid(ScriptedGrid):
    """Runs the project's ClientApp, each message in turn."""

    def __init__(self, configuration):
        count = configuration.federation.num_clients
        super().__init__([RealClient(configuration, index, count) for index in range(count)])

    def _push(self, message):
        worker.assign_message_id(message)
        self.pushed.append(message)
        node = message.metadata.dst_node_id
        outer = worker.set_task_identity((node, 1, node))
        try:
            delivered = worker.decode(worker.encode(message))
            reply = worker.encode(client.app.app(delivered, self.clients[node].context))
        finally:
            worker.set_task_identity(outer)
        self._replies[message.metadata.message_id] = (0, reply)
        return message.metadata.message_id


class KilledError(Exception):
    """The server is killed."""


class Federation:
    """A strategy on a grid of scripted clients."""

    def __init__(self, clients, observer=ignore, checkpoint=None, **changes):
        self.configuration = _configuration(federation__num_clients=len(clients), **changes)
        self.grid, self.clients, self.reports = ScriptedGrid(clients), clients, []
        self.state = ServerState.fresh(self.configuration, LAYOUT)
        if checkpoint is not None:
            self.state.restore(*checkpoint)
        self.observer = observer
        self.strategy = AdaDPIGU(
            self.configuration,
            SPEC,
            build(SPEC, seed=0),
            self.state,
            self._observe,
            lambda *_: time.sleep(0.002),
            public=torch.ones(1, 3),
        )

    def _observe(self, report):
        self.reports.append(report)
        self.observer(report)

    def run(self, evaluate_fn=None, timeout=None):
        start = ArrayRecord(build(SPEC, seed=0).state_dict())
        limit = timeout or self.configuration.federation.round_timeout
        return self.strategy.start(self.grid, start, timeout=limit, evaluate_fn=evaluate_fn)

    def account(self, index):
        return self.state.tally[self.clients[index].data_set]


@pytest.fixture(autouse=True)
def task_identity():
    """``Message(...)`` asks Flower who creates it; whatever was set before is put back."""
    outer = worker.set_task_identity((1, 1, 1))
    yield
    worker.set_task_identity(outer)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("server.strategy._POLL_SECONDS", 0.01)
    monkeypatch.setattr("server.strategy._SETTLE_SECONDS", 0.05)


@pytest.fixture
def npz(tmp_path):
    """A small task on which a linear model learns something: two blobs in three dimensions."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 120), ("test", 60)):
        labels = np.arange(count) % 2
        arrays[f"x_{split}"] = (generator.normal(size=(count, 3)) + 2 * labels[:, None]).astype(np.float32)
        arrays[f"y_{split}"] = labels
    path = tmp_path / "task.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.fixture(scope="session")
def configure():
    return _configuration


@pytest.fixture(scope="session")
def kit():
    """What tests need by name."""

    class Kit:
        Federation, Client, Grid, RealGrid, Later, LOST, KilledError = (
            Federation,
            ScriptedClient,
            ScriptedGrid,
            RealGrid,
            Later,
            LOST,
            KilledError,
        )
        SPEC, LAYOUT, D, SETTINGS = SPEC, LAYOUT, D, SETTINGS

        @staticmethod
        def altered(message, **changes):
            """The content of a message with entries changed behind the back of its class; None leaves one out."""
            wire = encode(message)
            arrays, values = dict(wire.arrays), dict(wire.values)
            for name, value in changes.items():
                key = name.replace("__", ".").replace("_", "-")
                arrays.pop(key, None)
                values.pop(key, None)
                if value is not None:
                    (arrays if isinstance(value, np.ndarray) else values)[key] = value
            return to_content(Wire(arrays, values))

        @staticmethod
        def mask(*retained):
            mask = torch.zeros(D, dtype=torch.bool)
            mask[list(retained)] = True
            return mask

    return Kit


@pytest.fixture
def run(kit, monkeypatch):
    """Runs the server on clients in this process; ``crash_in`` ends it before that round's checkpoint is written."""

    def start(settings, crash_in=None):
        configuration = parse(settings)
        folder = RunFolder(server.app.run_folder(configuration, 1))
        with monkeypatch.context() as patch:
            save = folder.save_checkpoint

            def crash(arrays, values):
                if values["round"] == crash_in:
                    raise KilledError
                save(arrays, values)

            patch.setattr(folder, "save_checkpoint", crash)
            return server.app.run(kit.RealGrid(configuration), configuration, folder, wait=lambda *_: None)

    return start
