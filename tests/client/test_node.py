"""What a client does with a message: refuses, or charges once and releases once."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import client.node
from adadpigu_core import archive, masking
from adadpigu_core.adaptive_clipping import AdaptiveClipping, RunningStatistics
from adadpigu_core.ledger import Ledger
from adadpigu_core.messages import Description, Refusal, TrainReply
from adadpigu_core.models import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
D = 15  # 4 features x 3 classes, and 3 biases


def refused(reply, code):
    assert isinstance(reply, Refusal), reply
    assert reply.code == code, reply
    return reply.message


def first(number):
    """A mask that retains the first coordinates, and its name."""
    mask = torch.arange(D) < number
    return {"mask": masking.pack(mask), "mask_id": masking.fingerprint(mask)}


class TestDescribe:
    def test_says_public_facts_and_charges_nothing(self, node):
        reply = node.describe()
        assert isinstance(reply, Description)
        assert (reply.num_records, reply.target_epsilon, reply.target_delta) == (60, 8.0, 1e-5)
        assert 0.3 < reply.training_noise_multiplier < reply.pretraining_noise_multiplier * 2
        assert reply.spent == ()
        assert node.charged() == ([], [])

    @pytest.mark.parametrize(
        ("own", "asked", "holds"),
        [
            ((2.0, 1e-6), (8.0, 1e-5), (2.0, 1e-6)),
            ((8.0, 1e-5), (2.0, 1e-6), (2.0, 1e-6)),
            ((2.0, 1e-5), (8.0, 1e-6), (2.0, 1e-6)),
        ],
    )
    def test_the_server_may_ask_for_less_budget_and_never_for_more(self, make_node, own, asked, holds):
        node = make_node(**{"target-epsilon": own[0], "target-delta": own[1]})
        reply = node.describe(target_epsilon=asked[0], target_delta=asked[1])
        assert (reply.target_epsilon, reply.target_delta) == holds
        node.train()
        with Ledger(node.ledger, node.config["dataset"], "x") as ledger:
            assert 0 < ledger.epsilon(holds[1]) <= holds[0]

    def test_the_first_plan_of_a_run_stays(self, described):
        first_reply = described.describe()
        again = described.describe(training_steps=1000, sampling_probability=0.9, target_epsilon=1.0)
        assert again == first_reply
        assert len(described.rows("plans")) == 1

    def test_an_owner_who_lowers_the_budget_is_obeyed_in_the_middle_of_a_run(self, described):
        assert isinstance(described.train(), TrainReply)
        described.config["target-epsilon"] = 0.5
        before = described.charged()
        assert "budget" in refused(described.train(round=2), "budget")
        assert described.describe().target_epsilon == 0.5
        assert described.charged() == before

    def test_declared_records_are_told_and_used(self, make_node, monkeypatch):
        seen = []
        real = client.node.train_round
        monkeypatch.setattr(client.node, "train_round", lambda *a, **k: seen.append(a[3]) or real(*a, **k))
        node = make_node(**{"num-records": 1000})
        assert node.describe().num_records == 1000
        assert isinstance(node.train(), TrainReply)
        assert (seen[0].num_records, seen[0].expected_batch_size) == (1000, 500.0)

    def test_a_release_is_divided_by_declared_records(self, make_node):
        node = make_node(**{"num-records": 10**9})
        node.describe()
        # noise and signal alike: the sum of at most 60 gradients and noise of about one, over 5e8
        assert float(np.abs(node.train().update).max()) < 1e-6

    @pytest.mark.parametrize(
        ("changes", "code", "text"),
        [
            ({"code": "0.0.0+other"}, "message", "install the same release on both"),
            ({"layout": "0123456789abcdef"}, "message", "layout: the server's parameters"),
            ({"model.name": "gpt"}, "message", "model.unknown model 'gpt'"),
            ({"model.num-classes": 1}, "message", "num_classes"),
            ({"model.input-shape": [5]}, "data", "do not have the shape [5]"),
            ({"model.input-shape": [0]}, "message", "is not a shape"),
            ({"sampling-probability": 0.0}, "message", "sampling_probability"),
            ({"sampling-probability": 1.5}, "message", "sampling_probability"),
            ({"training-steps": 0}, "message", "training_steps"),
            ({"pretraining-steps": -1}, "message", "pretraining_steps"),
            ({"pretraining-share": 0.0}, "message", "pretraining_share"),
            ({"pretraining-share": 2.0}, "message", "pretraining_share"),
            ({"target-epsilon": 0.0}, "message", "epsilon"),
            ({"target-epsilon": -8.0}, "message", "epsilon"),
            ({"target-epsilon": math.inf}, "message", "target-epsilon: must be finite"),
            ({"target-epsilon": math.nan}, "message", "target-epsilon: must be finite"),
            ({"target-delta": 0.0}, "message", "delta"),
            ({"target-delta": 1e-300}, "message", "too small"),
            ({"target-epsilon": 1e-12, "target-delta": 1e-12}, "budget", "no amount of noise"),
            ({"run": 3}, "message", "run: must be str"),
            ({"run": None}, "message", "run: is missing"),
            ({"ledger": "/tmp/mine.sqlite"}, "message", "ledger: there is no such field"),
            ({"protocol-version": 2}, "message", "protocol-version"),
        ],
    )
    def test_a_request_that_makes_no_sense_is_refused(self, node, requests, changes, code, text):
        assert text in refused(node.ask(requests.describe(), changes), code)
        assert node.charged() == ([], [])
        assert node.rows("plans") == []

    @pytest.mark.parametrize("request_kind", ["describe", "train"])
    def test_a_model_that_mixes_records_is_refused(self, described, requests, monkeypatch, request_kind):
        def mixing(spec, seed):
            return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))

        monkeypatch.setattr(client.node, "build", mixing)
        request = getattr(requests, request_kind)(run="run-1")
        assert "BatchNorm1d" in refused(described.ask(request), "model")
        assert described.charged() == ([], [])

    def test_a_model_that_mixes_records_under_another_name_is_refused(self, node, monkeypatch):
        class Centred(nn.Module):
            def forward(self, x):
                return x - x.mean(dim=0)

        def mixing(spec, seed):
            return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), Centred())

        monkeypatch.setattr(client.node, "build", mixing)
        node_layout = client.node.ParameterLayout.of(mixing(None, 0)).fingerprint
        assert "mixes the records" in refused(node.describe(layout=node_layout), "model")
        assert node.rows("plans") == []


NAN, INF = np.float32(np.nan), np.float32(np.inf)


def vector(*values, length=D, dtype=np.float32):
    return np.resize(np.array(values, dtype=dtype), length)


BAD_TRAIN_REQUESTS = {
    "weights too short": ({"weights": vector(0.0, length=14)}, "message", "weights: the model has 15"),
    "weights too long": ({"weights": vector(0.0, length=16)}, "message", "weights: the model has 15"),
    "weights none": ({"weights": vector(0.0, length=0)}, "message", "weights"),
    "weights two-dimensional": ({"weights": np.zeros((3, 5), np.float32)}, "message", "weights: must be float32 [n]"),
    "weights float64": ({"weights": vector(0.0, dtype=np.float64)}, "message", "weights: must be float32"),
    "weights big-endian": ({"weights": vector(0.0).astype(">f4")}, "message", "weights: must be float32"),
    "weights NaN": ({"weights": vector(0.0, NAN)}, "message", "weights: must be finite"),
    "weights infinite": ({"weights": vector(0.0, INF)}, "message", "weights: must be finite"),
    "weights missing": ({"weights": None}, "message", "weights: is missing"),
    "mask too short": ({"mask": np.ones(1, np.uint8), "mask-id": "x"}, "message", "does not hold 15"),
    "mask too long": ({"mask": np.ones(3, np.uint8), "mask-id": "x"}, "message", "does not hold 15"),
    "mask of bool": ({"mask": np.ones(2, np.bool_), "mask-id": "x"}, "message", "mask: bool"),
    "mask of float": ({"mask": np.ones(2, np.float32), "mask-id": "x"}, "message", "mask: float32"),
    "mask of one coordinate too many": ({"mask": np.full(2, 255, np.uint8), "mask-id": "x"}, "message", "between 1"),
    "mask of nothing": ({"mask": np.zeros(2, np.uint8), "mask-id": "x"}, "message", "between 1 and 15"),
    "mask without a name": ({"mask": np.full(2, 128, np.uint8)}, "message", "mask: was sent without a mask-id"),
    "mask with a wrong name": ({"mask": np.full(2, 128, np.uint8), "mask-id": "abc"}, "message", "mask-id: is not"),
    "mask never sent": ({"mask-id": "abc"}, "unknown-mask", "send it"),
    "mask in pretraining": (
        {"mask": np.full(2, 128, np.uint8), "mask-id": "x", "phase": "pretraining"},
        "message",
        "pretraining retains everything",
    ),
    "scale zero": ({"gradient-scale": vector(1.0, 0.0, length=2)}, "message", "gradient-scale: must be positive"),
    "scale negative": ({"gradient-scale": vector(1.0, -1.0, length=2)}, "message", "gradient-scale: must be positive"),
    "scale infinite": ({"gradient-scale": vector(1.0, INF, length=2)}, "message", "gradient-scale: must be finite"),
    "scale NaN": ({"gradient-scale": vector(1.0, NAN, length=2)}, "message", "gradient-scale: must be finite"),
    "scale of three layers": ({"gradient-scale": vector(1.0, length=3)}, "message", "gradient-scale: expected 2"),
    "scale integer": ({"gradient-scale": np.ones(2, np.int64)}, "message", "gradient-scale: must be float32"),
    "mean too short": ({"gradient-mean": vector(0.0, length=3)}, "message", "gradient-mean: must have 15"),
    "mean NaN": ({"gradient-mean": vector(NAN)}, "message", "gradient-mean: must be finite"),
    "learning rate zero": ({"learning-rate": 0.0}, "message", "learning-rate: must be positive"),
    "learning rate negative": ({"learning-rate": -0.5}, "message", "learning-rate: must be positive"),
    "learning rate infinite": ({"learning-rate": math.inf}, "message", "learning-rate: must be finite"),
    "clipping norm zero": ({"clipping-norm": 0.0}, "message", "clipping-norm: must be positive"),
    "clipping norm negative": ({"clipping-norm": -1.0}, "message", "clipping-norm: must be positive"),
    "clipping norm infinite": ({"clipping-norm": math.inf}, "message", "clipping-norm: must be finite"),
    "clipping norm NaN": ({"clipping-norm": math.nan}, "message", "clipping-norm: must be finite"),
    "no steps": ({"steps": 0}, "message", "steps: must be at least 1"),
    "negative steps": ({"steps": -3}, "message", "steps: must be at least 1"),
    "ten thousand steps": ({"steps": 10_000}, "message", "steps: the plan of this run has 3 training steps, not 10000"),
    "endless steps": ({"steps": 2**62}, "message", "steps: the plan of this run has 3 training steps"),
    "two steps of one": ({"steps": 2, "phase": "pretraining"}, "message", "has 1 pretraining steps, not 2"),
    "a bit of a step": ({"steps": 0.5}, "message", "steps: must be int"),
    "a true step": ({"steps": True}, "message", "steps: must be int"),
    "unknown phase": ({"phase": "testing"}, "message", "phase: unknown value 'testing'"),
    "round zero": ({"round": 0}, "message", "round: must be at least 1"),
    "negative round": ({"round": -1}, "message", "round: must be at least 1"),
    "another run": ({"run": "run-2"}, "message", "run: this client has no plan for it"),
    "other code": ({"code": "0.0.0+other"}, "message", "code: the server runs 0.0.0+other"),
    "other model": ({"model.name": "mlp"}, "message", "weights: the model has"),
    "unknown model": ({"model.name": "../../etc/passwd"}, "message", "unknown model"),
    "other records": ({"model.input-shape": [2, 2]}, "data", "do not have the shape [2, 2]"),
    "unknown rule": ({"clipping.rule": "none of these"}, "message", "rule: unknown value"),
    "unknown granularity": ({"clipping.granularity": "bit"}, "message", "granularity: unknown value"),
    "decay one": ({"clipping.decay": 1.0}, "message", "decay"),
    "floor zero": ({"clipping.floor": 0.0}, "message", "floor"),
    "unknown measure": ({"importance-measure": "loss"}, "message", "importance-measure: unknown value 'loss'"),
    "wish for no noise": ({"noise-multiplier": 0.0}, "message", "noise-multiplier: there is no such field"),
    "wish for a seed": ({"seed": 0}, "message", "seed: there is no such field"),
    "one more array": ({"more": vector(0.0)}, "message", "more: there is no such field"),
    "other protocol": ({"protocol-version": 0}, "message", "protocol-version: this side speaks version 1"),
}


class TestBadTrainRequests:
    @pytest.mark.parametrize("name", BAD_TRAIN_REQUESTS)
    def test_are_refused_before_anything_is_charged(self, described, requests, name):
        changes, code, text = BAD_TRAIN_REQUESTS[name]
        before = described.ledger.read_bytes()
        message = refused(described.ask(requests.train(), changes), code)
        assert text in message
        assert described.ledger.read_bytes() == before
        assert described.charged() == ([], [])

    def test_a_round_from_the_past_is_refused(self, described):
        for number in (2, 4):
            assert isinstance(described.train(round=number), TrainReply)
        before = described.charged()
        for number in (1, 2, 3):
            assert "lies in the past" in refused(described.train(round=number), "message")
        assert described.charged() == before

    def test_a_mask_is_remembered_for_one_round_and_no_longer(self, described):
        named = first(7)
        assert len(described.train(**named).update) == 7
        assert len(described.train(round=2, mask_id=named["mask_id"]).update) == 7
        assert len(described.train(round=3).update) == D
        before = described.charged()
        refused(described.train(round=4, mask_id=named["mask_id"]), "unknown-mask")
        assert described.charged() == before


class TestRecords:
    """What is wrong with a record stays here; the server hears that the data set does not fit, and no more."""

    @pytest.fixture(params=["describe", "train"])
    def asked(self, request, described):
        """A node with a plan whose records are exchanged, and how it is asked."""

        def ask(**arrays):
            described.save(**arrays)
            return getattr(described, request.param)(run="run-1")

        yield ask
        assert described.charged() == ([], [])

    def test_a_label_out_of_range(self, asked, caplog):
        assert refused(asked(x=np.full((5, 4), 0.1234, np.float32), y=np.array([0, 1, 2, 7, 0])), "data") == ""
        assert "label of record 3 is 7" in caplog.text

    def test_a_negative_label(self, asked):
        assert refused(asked(x=np.ones((2, 4), np.float32), y=np.array([0, -1])), "data") == ""

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_feature_that_is_not_finite(self, asked, caplog, value):
        features = np.ones((5, 4), np.float32)
        features[2, 1] = value
        assert refused(asked(x=features, y=np.zeros(5, int)), "data") == ""
        assert "record 2" in caplog.text

    def test_no_records(self, asked):
        assert refused(asked(x=np.ones((0, 4), np.float32), y=np.zeros(0, int)), "data") == ""

    def test_another_shape(self, asked):
        assert "[4]" in refused(asked(x=np.ones((5, 6), np.float32), y=np.zeros(5, int)), "data")

    def test_declared_classes_keep_the_largest_label_to_the_client(self, make_node):
        """Without a declaration, tasks with fewer classes would be refused by the labels alone."""
        answers = []
        for labels in (np.zeros(60, int), np.arange(60) % 3):
            node = make_node(**{"num-classes": 3})
            node.save(x=np.ones((60, 4), np.float32), y=labels)
            spec = ModelSpec("linear", "relu", "none", (4,), 2)
            answers.append(node.describe(run="probe", model=spec, layout=""))
        assert (
            answers[0].message
            == answers[1].message
            == ("model.num-classes: this client declares 3 classes, the task has 2")
        )

    def test_labels_must_fit_the_declaration(self, make_node):
        node = make_node(**{"num-classes": 2})
        assert refused(node.describe(), "data") == ""

    def test_a_task_may_have_more_classes_than_declared(self, make_node):
        node = make_node(**{"num-classes": 3})
        spec = ModelSpec("linear", "relu", "none", (4,), 12)
        assert isinstance(node.describe(model=spec, layout=""), Description)


class TestRelease:
    def test_is_charged_with_the_clients_own_noise(self, described):
        description = described.describe()
        assert isinstance(described.train(steps=2), TrainReply)
        ((_, data_set, run, number, phase, noise, sampling, count, *_),) = described.rows("charges")
        assert (data_set, run, number, phase) == (described.config["dataset"], "run-1", 1, "training")
        assert (noise, sampling, count) == (description.training_noise_multiplier, 0.5, 2)

    def test_comes_with_the_ledger(self, described):
        reply = described.train()
        assert [(event.phase, event.count) for event in reply.spent] == [("training", 1)]
        assert reply.data_set == described.describe().data_set
        reply = described.train(round=2, phase="pretraining", importance_measure="energy")
        assert [(event.phase, event.count) for event in reply.spent] == [("pretraining", 1), ("training", 1)]
        assert len(reply.importance) == D

    def test_holds_noise_that_nobody_can_repeat(self, make_node):
        """The same request to the same node with a fresh ledger, twice."""
        updates = []
        for folder in ("a", "b"):
            node = make_node(ledger="")
            node.ledger = node.folder / folder / "ledger.sqlite"
            node.config["ledger"] = str(node.ledger)
            node.describe()
            updates.append(node.train().update)
        assert np.abs(updates[0] - updates[1]).min() > 0

    def test_is_the_same_when_asked_for_again(self, described):
        reply = described.train()
        before = described.charged()
        again = described.train()
        assert again.update.tobytes() == reply.update.tobytes()
        assert again.spent == reply.spent
        assert described.charged() == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"weights": np.ones(D, np.float32)},
            {"steps": 3},
            {"learning_rate": 0.25},
            {"phase": "pretraining"},
            {"clipping_norm": 9.0},
            {"gradient_scale": np.full(2, 3.0, np.float32)},
            first(3),
        ],
    )
    def test_is_the_same_when_asked_for_in_other_words(self, described, changes):
        reply = described.train()
        before = described.charged()
        again = described.train(**changes)
        assert again.update.tobytes() == reply.update.tobytes()
        assert described.charged() == before

    def test_of_another_process_counts_if_it_was_faster(self, described, monkeypatch):
        real, inner = client.node.train_round, []

        def slow(*arguments, **settings):
            monkeypatch.setattr(client.node, "train_round", real)
            inner.append(described.train(weights=np.ones(D, np.float32)))
            return real(*arguments, **settings)

        monkeypatch.setattr(client.node, "train_round", slow)
        outer = described.train()
        assert outer.update.tobytes() == inner[0].update.tobytes()
        assert [len(rows) for rows in described.charged()] == [1, 1]

    def test_stops_at_the_budget(self, described):
        replies = [described.train(round=number) for number in range(1, 8)]
        kinds = [type(reply) for reply in replies]
        refusals = kinds.count(Refusal)
        assert kinds == [TrainReply] * (7 - refusals) + [Refusal] * refusals
        assert 3 <= kinds.count(TrainReply) <= 4
        with Ledger(described.ledger, described.config["dataset"], "x") as ledger:
            assert ledger.epsilon(1e-5) <= 8.0
        assert "of 8 at delta 1e-05" in refused(replies[-1], "budget")


class TestOutcomeOfACharge:
    """Once noise may have been drawn, whatever happened is what the charge has bought."""

    def test_an_update_that_overflows_is_stored(self, described):
        message = refused(described.train(learning_rate=1e308), "message")
        assert message == "update: must be finite everywhere"
        before = described.charged()
        assert [len(rows) for rows in before] == [1, 1]
        # a modest request cannot have another draw for the same money
        assert refused(described.train(learning_rate=0.1), "message") == message
        assert described.charged() == before
        assert isinstance(described.train(round=2), TrainReply)

    def test_an_unexpected_error_is_stored_without_its_text(self, described, monkeypatch, caplog):
        real = client.node.train_round

        def fails(*arguments, **settings):
            update = real(*arguments, **settings)
            raise RuntimeError(f"record 17 said {update.update[0]}")

        monkeypatch.setattr(client.node, "train_round", fails)
        assert refused(described.train(), "internal") == ""
        assert "record 17 said" in caplog.text
        monkeypatch.setattr(client.node, "train_round", real)
        before = described.charged()
        assert refused(described.train(), "internal") == ""
        assert described.charged() == before

    def test_a_refusal_keeps_what_the_client_remembers(self, described):
        settings = {"clipping": AdaptiveClipping("energy"), "client_statistics": True}
        named = first(9)
        described.train(**named, **settings)
        memory = archive.unpack(described.rows("releases")[0][2])[0]
        refused(described.train(round=2, learning_rate=1e308, mask_id=named["mask_id"], **settings), "message")
        kept = archive.unpack(described.rows("releases")[1][2])[0]
        assert kept.keys() == memory.keys()
        assert all(np.array_equal(kept[name], memory[name]) for name in kept)

    @pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("moment", ["before the noise", "after the noise"])
    def test_a_process_that_ends_has_released_nothing(self, described, monkeypatch, ending, moment):
        real = client.node.train_round

        def ends(*arguments, **settings):
            if moment == "after the noise":
                real(*arguments, **settings)
            raise ending

        monkeypatch.setattr(client.node, "train_round", ends)
        with pytest.raises(ending):
            described.train()
        assert [len(rows) for rows in described.charged()] == [1, 0]
        monkeypatch.setattr(client.node, "train_round", real)
        charges = described.rows("charges")
        reply = described.train()
        assert isinstance(reply, TrainReply)
        assert described.rows("charges") == charges
        assert described.train().update.tobytes() == reply.update.tobytes()

    def test_after_a_crash_the_charge_is_for_nothing_else(self, described, monkeypatch):
        real = client.node.train_round

        def ends(*_arguments, **_settings):
            raise SystemExit

        monkeypatch.setattr(client.node, "train_round", ends)
        with pytest.raises(SystemExit):
            described.train()
        monkeypatch.setattr(client.node, "train_round", real)
        before = described.charged()
        for other in ({"steps": 2}, {"phase": "pretraining"}):
            assert "was charged for" in refused(described.train(**other), "message")
        assert described.charged() == before
        assert isinstance(described.train(round=2), TrainReply)
        assert "past" in refused(described.train(round=1), "message")


KILL = """
import importlib.util, os, pathlib, signal, sys
import torch._dynamo  # torch imports it at the first gradient, once for all children if it is here
import client.node
from adadpigu_core.ledger import Ledger

conftest, *folders = sys.argv[1:]
spec = importlib.util.spec_from_file_location("node_files", conftest)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)


def kill(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)


for folder in folders:  # forked before torch computes, after which a fork would hang
    child = os.fork()
    if child == 0:
        node = files.Node(pathlib.Path(folder))
        node.describe()
        moment = pathlib.Path(folder).name
        setattr(Ledger if moment == "store_release" else client.node, moment, kill)
        node.train()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
MOMENTS = {"train_round": (1, 0), "encode": (1, 0), "store_release": (1, 0), "_unpack": (1, 1)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Nodes whose process was killed in their first round, each at another moment."""
    top = tmp_path_factory.mktemp("killed")
    folders = {moment: top / moment for moment in MOMENTS}
    for folder in folders.values():
        folder.mkdir()
    command = [sys.executable, "-c", KILL, Path(__file__).with_name("conftest.py"), *folders.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS), done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestKilledProcess:
    """SIGKILL before the noise, after it, before the release is stored, and after."""

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_never_shows_less_than_it_released(self, killed, make_node, moment):
        node = make_node(folder=killed[moment])
        charges = node.rows("charges")
        assert tuple(len(rows) for rows in node.charged()) == MOMENTS[moment]
        reply = node.train()
        assert isinstance(reply, TrainReply)
        assert node.rows("charges") == charges
        assert node.train().update.tobytes() == reply.update.tobytes()
        assert [event.count for event in reply.spent] == [1]


OWN_STATISTICS = {"clipping": AdaptiveClipping("energy", decay=0.5), "client_statistics": True}


class TestClientStatistics:
    def test_survive_a_restart(self, described, monkeypatch):
        started, ended = [], []
        real = client.node.train_round

        def spy(*arguments, **settings):
            started.append(arguments[5])
            ended.append(real(*arguments, **settings))
            return ended[-1]

        monkeypatch.setattr(client.node, "train_round", spy)
        for number in (1, 2, 3):
            assert isinstance(described.train(round=number, **OWN_STATISTICS), TrainReply)
        assert isinstance(started[0], RunningStatistics)
        assert not started[0].weight.any()
        for before, after in zip(ended, started[1:], strict=False):
            for name in ("mean", "moment", "weight"):
                assert torch.equal(getattr(before.statistics, name), getattr(after, name))
        assert started[2].weight.tolist() == [0.75, 0.75]

    def test_are_functions_of_releases_alone(self, described):
        reply = described.train(**OWN_STATISTICS)
        memory = archive.unpack(described.rows("releases")[0][2])[0]
        gradient = -reply.update / 0.5
        np.testing.assert_allclose(memory["mean"], 0.5 * gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "changes",
        [
            {"clipping": AdaptiveClipping("energy", granularity="row")},
            # as many layers, other sizes
            {"model": ModelSpec("linear", "relu", "none", (4,), 4), "weights": np.zeros(20, np.float32)},
        ],
    )
    def test_must_fit_the_request(self, described, changes):
        described.train(**OWN_STATISTICS)
        before = described.charged()
        assert "changed during the run" in refused(described.train(round=2, **{**OWN_STATISTICS, **changes}), "message")
        assert described.charged() == before


class TestSecondRun:
    def test_gets_what_is_left(self, described):
        first_noise = described.describe().training_noise_multiplier
        described.train()
        described.train(round=2)
        second = described.describe(run="run-2")
        assert isinstance(second, Description)
        assert second.training_noise_multiplier > first_noise
        for number in (1, 2, 3):
            assert isinstance(described.train(run="run-2", round=number), TrainReply)
        with Ledger(described.ledger, described.config["dataset"], "x") as ledger:
            assert ledger.epsilon(1e-5) <= 8.0

    def test_is_refused_when_nothing_is_left(self, described):
        described.describe(run="run-2")  # planned while all was there
        described.train(phase="pretraining", importance_measure="energy")
        for number in (2, 3, 4):
            described.train(round=number)
        message = refused(described.describe(run="run-3", target_epsilon=7.5), "budget")
        assert "the privacy budget of this data set is spent" in message
        assert "nothing is left" in message
        before = described.charged()
        refused(described.train(run="run-2"), "budget")
        refused(described.describe(run="run-4"), "budget")
        assert described.charged() == before


class TestLedger:
    """A client whose ledger cannot be trusted or written releases nothing, and does not say where the ledger is."""

    def check(self, node):
        for reply in (node.describe(run="run-9"), node.train()):
            assert refused(reply, "ledger") == ""
            assert reply.spent == ()

    def test_a_folder_in_its_place(self, node):
        node.ledger.mkdir(parents=True)
        self.check(node)

    def test_a_file_in_place_of_its_folder(self, node):
        node.ledger.parent.write_text("not a folder")
        self.check(node)

    def test_a_file_that_is_no_ledger(self, node):
        node.ledger.parent.mkdir()
        node.ledger.write_text("minutes of the meeting\n" * 100)
        content = node.ledger.read_bytes()
        self.check(node)
        assert node.ledger.read_bytes() == content

    def test_a_ledger_that_was_deleted(self, described):
        described.train()
        described.ledger.unlink()
        self.check(described)
        assert not described.ledger.exists()

    def test_the_same_records_under_another_name(self, described):
        described.config["data-set-name"] = "a fresh budget, please"
        self.check(described)

    def test_a_disk_that_fills_up_before_the_charge(self, described, monkeypatch):
        real = Ledger._execute

        def full(self, statement, *values):
            if statement.startswith("INSERT INTO charges"):
                raise client.node.AdaDPIGUError("disk full at /home/alice")
            return real(self, statement, *values)

        monkeypatch.setattr(Ledger, "_execute", full)
        assert refused(described.train(), "error") == ""
        assert described.charged() == ([], [])

    def test_a_release_that_cannot_be_stored_does_not_leave(self, described, monkeypatch):
        real = Ledger._execute

        def full(self, statement, *values):
            if statement.startswith("INSERT INTO releases"):
                raise client.node.AdaDPIGUError("disk full at /home/alice")
            return real(self, statement, *values)

        monkeypatch.setattr(Ledger, "_execute", full)
        assert refused(described.train(), "error") == ""
        assert [len(rows) for rows in described.charged()] == [1, 0]
        monkeypatch.setattr(Ledger, "_execute", real)
        assert isinstance(described.train(), TrainReply)
        assert [len(rows) for rows in described.charged()] == [1, 1]
