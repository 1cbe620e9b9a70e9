"""The ClientApp as Flower runs it: every message is answered by a message, and no text of an error gets out."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import client.app
from adadpigu_core.messages import Description, Refusal, TrainReply, encode
from client.wire import to_content


def test_the_two_routes(described):
    assert isinstance(described.describe(), Description)
    assert isinstance(described.train(), TrainReply)


@pytest.mark.parametrize("message_type", ["query.describe", "train"])
class TestRefusals:
    """Whatever is wrong, the server gets a code and public facts, and nothing is charged."""

    def ask(self, node, message_type):
        reply = node.describe() if message_type == "query.describe" else node.train()
        assert isinstance(reply, Refusal)
        assert node.rows("charges") == []
        assert reply.spent == ()
        return reply.code, reply.message

    def test_a_node_without_configuration(self, node, message_type):
        node.config = {}
        assert self.ask(node, message_type) == ("configuration", "the node's own configuration is wrong")
        assert not node.ledger.exists()

    def test_a_node_with_a_wrong_configuration(self, node, message_type, caplog):
        node.config = {"dataset": 3, "ledger": "ledger.sqlite", "target-epsilon": -1, "colour": "red"}
        assert self.ask(node, message_type) == ("configuration", "the node's own configuration is wrong")
        for text in (
            "colour: there is no",
            "dataset: expected str",
            "ledger: must be",
            "target-epsilon: the budget of a data set stands in the node's policy",
            "policy: is missing",
        ):
            assert text in caplog.text
        assert not node.ledger.exists()

    @pytest.mark.parametrize("damage", ["missing", "damaged", "unknown"])
    def test_records_that_cannot_be_read(self, node, message_type, damage, caplog):
        if damage == "missing":
            node.data.unlink()
        elif damage == "damaged":
            node.data.write_bytes(b"secret" * 100)
        else:
            node.config["dataset"] = "secret-name"
        code, message = self.ask(node, message_type)
        assert (code, message) == ("configuration" if damage == "unknown" else "data", "")
        assert caplog.text
        assert not node.ledger.exists()

    def test_an_error_that_nobody_has_thought_of(self, node, message_type, monkeypatch, caplog):
        def fails(*_):
            raise ZeroDivisionError("record 3 is 17.5")

        monkeypatch.setattr(client.app, "site", fails)
        assert self.ask(node, message_type) == ("internal", "")
        assert "record 3 is 17.5" in caplog.text
        assert "Traceback" in caplog.text

    def test_an_answer_that_flower_cannot_carry(self, node, message_type, monkeypatch):
        real, calls = client.app.to_content, []

        def fails_once(wire):
            calls.append(wire)
            if len(calls) == 1:
                raise TypeError("17.5 cannot be carried")
            return real(wire)

        monkeypatch.setattr(client.app, "to_content", fails_once)
        assert self.ask(node, message_type) == ("internal", "")

    @pytest.mark.parametrize(
        "content",
        [
            RecordDict(),
            RecordDict({"arrays": ArrayRecord(), "values": ConfigRecord()}),
            RecordDict({"arrays": ArrayRecord(), "values": ConfigRecord({"kind": "Refusal", "protocol-version": 1})}),
            RecordDict(
                {
                    "arrays": ArrayRecord({"weights": Array("float32", (3,), "numpy.ndarray", b"x")}),
                    "values": ConfigRecord(),
                }
            ),
        ],
    )
    def test_a_message_that_is_none_of_ours(self, node, message_type, content):
        reply = node.send(content, message_type)
        assert (type(reply), reply.code) == (Refusal, "message")
        assert reply.message
        assert node.charged() == ([], [])

    def test_a_request_of_the_other_kind(self, node, requests, message_type):
        other = requests.train() if message_type == "query.describe" else requests.describe()
        reply = node.send(to_content(encode(other)), message_type)
        assert reply.code == "message"
        assert "expected" in reply.message


@pytest.mark.parametrize("message_type", ["evaluate", "query", "query.ledger", "train.fast"])
def test_there_are_no_other_routes(node, message_type):
    with pytest.raises(ValueError, match="registered"):
        node.send(RecordDict(), message_type)


def test_the_run_configuration_has_no_say(node, tmp_path):
    node.run_config = {
        "privacy.ledger-dir": str(tmp_path / "elsewhere"),
        "privacy.target-epsilon": 1e6,
        "task.dataset": "npz:/etc/passwd",
        "seed": 0,
        "simulation": True,
        "partition-id": 0,
        "num-partitions": 1,
    }
    reply = node.describe(target_epsilon=1e6, target_delta=0.5)
    assert (reply.target_epsilon, reply.target_delta, reply.num_records) == (8.0, 1e-5, 60)
    assert isinstance(node.train(), TrainReply)
    assert len(node.rows("charges")) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_replies_hold_no_record_values(node, caplog):
    """Values that stand out are in no answer, whatever goes wrong on the way."""
    caplog.set_level(logging.CRITICAL)
    features = np.full((60, 4), 1234.5, np.float32)
    features[7] = 4321.5
    node.save(x=features, y=np.full(60, 2))
    replies = [
        node.describe(),
        node.train(),
        node.train(round=2, learning_rate=1e308),
        node.train(round=3, steps=10_000),
        node.train(round=1),
    ]
    texts = [f"{reply!r}" for reply in replies]
    assert [type(reply).__name__ for reply in replies] == ["Description", "TrainReply", "Refusal", "Refusal", "Refusal"]
    assert not [text for text in texts if "1234.5" in text or "4321.5" in text]
