"""Open requests, whose reply is whose, and what Flower does when it fails."""

import time

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from adadpigu_core.messages import Refusal, Wire, decode, encode
from server.exchange import Exchange, request, sleep
from server.wire import from_content, to_content
from simulations import worker

WIRE = Wire({"weights": np.arange(5, dtype=np.float32)}, {"round": 1, "name": "ü", "list": [1, 2]})


class Pipe:
    """A grid that answers by hand."""

    def __init__(self):
        self.pushed, self.replies, self.fails = [], {}, {}

    def push_messages(self, messages):
        for message in messages:
            worker.assign_message_id(message)
            self.pushed.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        for key in ids:
            if key in self.fails:
                raise self.fails[key]
        return [self.replies.pop(key) for key in ids if key in self.replies]

    def reply(self, index, content=None):
        message = self.pushed[index]
        answer = Message(to_content(encode(Refusal("x", "", "", ()))) if content is None else content, reply_to=message)
        self.replies[message.metadata.message_id] = answer
        return answer


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def exchange(pipe):
    """Requests of round 1 to nodes 10 to 12."""
    exchange = Exchange(pipe, lambda *_: time.sleep(0.001))
    exchange.send([request(to_content(WIRE), node, "train", 1) for node in (10, 11, 12)], 1)
    return exchange


class TestWire:
    def test_round_trip_through_flower(self):
        message = Message(to_content(WIRE), dst_node_id=3, message_type="train")
        wire = from_content(worker.decode(worker.encode(message)).content)
        assert wire.values == WIRE.values
        np.testing.assert_array_equal(wire.arrays["weights"], WIRE.arrays["weights"], strict=True)

    @pytest.mark.parametrize("values", [{"spent": []}, {"truth": True, "large": 2**62, "small": -1e-300}])
    def test_values_keep_their_types(self, values):
        message = Message(to_content(Wire({}, values)), dst_node_id=3, message_type="train")
        back = from_content(worker.decode(worker.encode(message)).content).values
        assert back == values
        assert {key: type(value) for key, value in back.items()} == {key: type(value) for key, value in values.items()}


class TestReplies:
    def test_belong_to_the_node_that_was_asked_and_are_ordered(self, pipe, exchange):
        for index in (2, 0, 1):
            pipe.reply(index)
        replies = exchange.resolve(reversed(exchange.collect("train", 1, 1.0)))
        assert [(reply.node, reply.round, reply.kind) for reply in replies] == [(n, 1, "train") for n in (10, 11, 12)]
        assert all(decode(reply.wire, Refusal).code == "x" for reply in replies)

    def test_are_waited_for_until_the_time_is_over(self, pipe, exchange):
        pipe.reply(1)
        begun = time.monotonic()
        assert len(exchange.collect("train", 1, 0.05)) == 1
        assert 0.05 <= time.monotonic() - begun < 5
        assert exchange.missing("train", 1) == [10, 12]
        assert exchange.missing("train", 2) == exchange.missing("query", 1) == []
        pipe.reply(0)
        assert len(exchange.collect("train", 1, 0.0)) == 1

    def test_of_other_rounds_come_along(self, pipe, exchange):
        exchange.send([request(to_content(WIRE), 10, "train", 2)], 2)
        pipe.reply(0)
        pipe.reply(3)
        replies = exchange.resolve(exchange.collect("train", 2, 1.0))
        assert [(reply.node, reply.round) for reply in replies] == [(10, 1), (10, 2)]

    def test_count_once(self, pipe, exchange):
        pipe.reply(0)
        messages = exchange.collect("train", 1, 0.0)
        assert len(exchange.resolve(messages * 2)) == 1
        assert exchange.resolve(messages) == []

    def test_to_nothing_that_was_asked_do_not_count(self, exchange):
        other = request(to_content(WIRE), 10, "train", 1)
        worker.assign_message_id(other)
        assert exchange.resolve([Message(RecordDict(), reply_to=other)]) == []

    def test_errors_and_nonsense_have_a_problem_instead_of_a_message(self, pipe, exchange):
        pipe.reply(0, Error(5, "gone\x1b[0m" * 1000))
        pipe.reply(1, RecordDict())
        pipe.reply(2)
        broken, empty, whole = exchange.resolve(exchange.collect("train", 1, 1.0))
        assert (broken.wire, empty.wire, whole.problem) == (None, None, "")
        assert broken.problem.startswith("error 5: gone")
        assert len(broken.problem) <= 300
        assert broken.problem.isprintable()
        assert "expected the records" in empty.problem


class TestBytes:
    def test_are_those_of_the_payload(self, pipe, exchange):
        values = sum(len(key) + len(str(value)) for key, value in WIRE.values.items())
        array = len(to_content(WIRE)["arrays"]["weights"].data)
        assert exchange.bytes_down == 3 * (values + array)
        pipe.reply(0, Error(1, "not counted"))
        pipe.reply(1)
        exchange.collect("train", 1, 0.0)
        assert exchange.bytes_up == sum(
            len(k) + len(str(v)) for k, v in encode(Refusal("x", "", "", ())).values.items()
        )

    def test_any_content_can_be_counted(self, pipe, exchange):
        pipe.reply(0, RecordDict())
        exchange.collect("train", 1, 0.0)
        assert exchange.bytes_up == 0


class TestFlowerFails:
    def test_a_message_that_it_does_not_take_is_not_waited_for(self, pipe, caplog):
        pipe.push_messages = lambda messages: [None, "", "id"]
        exchange = Exchange(pipe)
        exchange.send([request(to_content(WIRE), node, "train", 1) for node in (10, 11, 12)], 1)
        assert exchange.missing("train", 1) == [12]
        assert "node 11" in caplog.text

    def test_messages_that_are_too_large_together_are_sent_one_by_one(self, pipe):
        push = pipe.push_messages
        pipe.push_messages = lambda messages: push(messages) if len(messages) == 1 else []
        exchange = Exchange(pipe)
        exchange.send([request(to_content(WIRE), node, "train", 1) for node in (10, 11)], 1)
        assert exchange.missing("train", 1) == [10, 11]

    @pytest.mark.parametrize("error", [KeyError("no such class"), ValueError(), AttributeError("metadata")])
    def test_a_reply_that_it_cannot_read_does_not_take_the_others_with_it(self, pipe, exchange, error, caplog):
        pipe.reply(0)
        pipe.reply(2)
        pipe.fails[pipe.pushed[1].metadata.message_id] = error
        replies = exchange.resolve(exchange.collect("train", 1, 1.0))
        assert [reply.node for reply in replies] == [10, 12]
        assert "node 11: its reply cannot be read" in caplog.text

    def test_a_lost_connection_is_another_matter(self, pipe, exchange):
        kind = type("ConnectError", (Exception,), {"__module__": "httpx"})
        for error in (ConnectionError("refused"), kind("refused")):
            pipe.fails = {message.metadata.message_id: error for message in pipe.pushed}
            with pytest.raises(type(error), match="refused"):
                exchange.collect("train", 1, 1.0)
        pipe.fails = {}
        assert exchange.missing("train", 1) == [10, 11, 12]

    def test_nothing_to_send_is_not_sent(self, pipe):
        Exchange(pipe).send([], 1)
        assert pipe.pushed == []

    def test_sleeping_is_waiting(self):
        begun = time.monotonic()
        sleep(["id"], 0.01)
        assert time.monotonic() - begun >= 0.01
