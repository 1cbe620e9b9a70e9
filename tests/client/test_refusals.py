"""What a client does not do, whatever it is asked: everything wrong is found before the ledger is charged."""

import math

import numpy as np
import pytest

import client.node
from adadpigu_core.ledger import Ledger
from adadpigu_core.messages import Description, Refusal, TrainReply
from adadpigu_core.models import ModelSpec
from adadpigu_core.reconciliation import lacking, make_up

D = 15  # 4 features x 3 classes, and 3 biases


def refused(reply, code):
    assert isinstance(reply, Refusal), reply
    assert reply.code == code, reply
    return reply.message


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
    "fixed values of a model without any": ({"fixed": vector(0.0)}, "message", "fixed: the model has 0 values"),
    "fixed NaN": ({"fixed": vector(0.0, NAN)}, "message", "fixed: must be finite"),
    "fixed float64": ({"fixed": vector(0.0, dtype=np.float64)}, "message", "fixed: must be float32"),
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
    "ten thousand steps": ({"steps": 10_000}, "message", "steps: a round of this run's plan has 1, not 10000"),
    "endless steps": ({"steps": 2**62}, "message", "steps: a round of this run's plan has 1, not"),
    "two steps of one": ({"steps": 2}, "message", "has 1, not 2"),
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


class TestRestoredBackup:
    """The server's tally knows better than a ledger that was put back."""

    def test_a_ledger_that_lacks_what_the_server_has_seen_is_refused(self, described):
        first = described.train()
        backup = described.ledger.read_bytes()
        second = described.train(round=2, spent=first.spent)
        assert isinstance(second, TrainReply)
        described.ledger.write_bytes(backup)
        before = described.charged()
        for number in (2, 3):
            message = refused(described.train(round=number, spent=second.spent), "ledger")
            assert "1 releases that this client's ledger does not hold: was a backup restored?" in message
        assert described.charged() == before

    def test_and_goes_on_when_its_operator_has_made_up_for_it(self, described):
        first = described.train()
        backup = described.ledger.read_bytes()
        second = described.train(round=2, spent=first.spent)
        described.ledger.write_bytes(backup)
        with Ledger(described.ledger, described.config["dataset"], "x") as ledger:
            make_up(ledger, lacking(ledger.events(), second.spent))
        third = described.train(round=3, spent=second.spent)
        assert [event.count for event in third.spent] == [3]
