"""The in-process grid against a real ClientApp in real worker processes."""

import contextlib
import itertools
import math
import os
import signal
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations.in_process import FIRST_NODE_ID, Fault, InProcessGrid


@pytest.fixture(scope="module")
def shared_grid(apps):
    """Five nodes on two workers, for tests that leave no trace."""
    configs = [{"site": f"s{index}"} for index in range(5)]
    run_config = {"learning-rate": 0.1, "name": "a run", "steps": 3, "on": True}
    with InProcessGrid("toy_app:app", configs, run_config, 2, run_id=7, environment=apps) as grid:
        yield grid


@pytest.fixture
def make_grid(apps):
    """Open grids that are closed, in reverse order, after the test."""
    with contextlib.ExitStack() as stack:

        def make(nodes=2, workers=1, app="toy_app:app", **settings):
            settings.setdefault("environment", apps)
            return stack.enter_context(InProcessGrid(app, [{}] * nodes, {}, workers, **settings))

        yield make


def message(node, kind="query", **config):
    content = RecordDict({"config": ConfigRecord(config)}) if config else RecordDict()
    return Message(content, FIRST_NODE_ID + node, kind)


def facts(reply):
    assert reply.has_content(), reply.error
    return reply.content["facts"]


class TestMessages:
    def test_content_survives_the_round_trip(self, shared_grid):
        arrays = [np.linspace(0, 1, 7, dtype=np.float32), np.arange(6, dtype=np.int64).reshape(2, 3)]
        content = RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "metrics": MetricRecord({"x": 0.5, "list": [1, 2]}),
                "config": ConfigRecord({"text": "ü", "bytes": b"\x00", "flag": True}),
            }
        )
        (reply,) = shared_grid.send_and_receive([Message(content, FIRST_NODE_ID, "train", group_id="3")])
        assert reply.content == content
        for sent, received in zip(arrays, reply.content["arrays"].to_numpy_ndarrays(), strict=True):
            np.testing.assert_array_equal(sent, received, strict=True)

    def test_metadata_is_that_of_flower(self, shared_grid):
        request = message(3)
        (reply,) = shared_grid.send_and_receive([request])
        assert request.metadata.src_node_id == 1
        assert request.metadata.run_id == reply.metadata.run_id == 7
        assert reply.metadata.reply_to_message_id == request.metadata.message_id != ""
        assert reply.metadata.message_id not in ("", request.metadata.message_id)
        assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (FIRST_NODE_ID + 3, 1)

    def test_every_node_has_its_own_configuration_and_state(self, make_grid, apps):
        configs = [{"site": f"s{index}"} for index in range(3)]
        run_config = {"learning-rate": 0.1, "name": "a run", "steps": 3, "on": True}
        with InProcessGrid("toy_app:app", configs, run_config, 2, environment=apps) as grid:
            replies = grid.send_and_receive([message(0), message(1), message(2), message(0)])
        assert [facts(reply)["calls"] for reply in replies] == [1, 1, 1, 2]
        assert [facts(reply)["node.site"] for reply in replies] == ["s0", "s1", "s2", "s0"]
        assert [facts(reply)["node"] for reply in replies] == [1000, 1001, 1002, 1000]
        assert {key: facts(replies[0])["run." + key] for key in run_config} == run_config

    def test_nodes_are_pinned_to_workers(self, shared_grid):
        pids = shared_grid.worker_pids
        replies = shared_grid.send_and_receive([message(index) for index in range(5)])
        assert [facts(reply)["pid"] for reply in replies] == [pids[index % 2] for index in range(5)]

    def test_replies_come_in_the_order_of_the_messages(self, shared_grid):
        delays = [0.2, 0.0, 0.05, 0.0, 0.0]
        replies = shared_grid.send_and_receive(
            [message(index, "query.slow", seconds=delay) for index, delay in enumerate(delays)]
        )
        assert [facts(reply)["node"] for reply in replies] == shared_grid.get_node_ids()

    def test_caller_may_reuse_a_record_for_the_next_message(self, shared_grid):
        content = RecordDict({"config": ConfigRecord({"number": 0})})
        ids = []
        for number in range(20):
            content["config"]["number"] = number
            ids += shared_grid.push_messages([Message(content, FIRST_NODE_ID, "train")])
        received = []
        while shared_grid.wait(ids, 5):
            received += shared_grid.pull_messages(ids)
            if len(received) == len(ids):
                break
        assert [reply.content["config"]["number"] for reply in received] == list(range(20))

    def test_many_messages_are_each_answered_once(self, shared_grid):
        contents = [RecordDict({"config": ConfigRecord({"n": number})}) for number in range(300)]
        requests = [Message(content, FIRST_NODE_ID + n % 5, "train") for n, content in enumerate(contents)]
        replies = shared_grid.send_and_receive(requests)
        assert [reply.content["config"]["n"] for reply in replies] == list(range(300))
        ids = [request.metadata.message_id for request in requests]
        assert len(set(ids)) == 300
        assert shared_grid.pull_messages(ids) == []


class TestWaiting:
    def test_push_and_pull_do_not_block(self, shared_grid):
        shared_grid.send_and_receive([message(0)])
        start = time.monotonic()
        ids = shared_grid.push_messages([message(0, "query.slow", seconds=1.0)])
        assert shared_grid.pull_messages(ids) == []
        assert time.monotonic() - start < 0.9
        assert shared_grid.wait(ids, 5)
        assert len(shared_grid.pull_messages(ids)) == 1
        assert shared_grid.pull_messages(ids) == []

    def test_late_reply_can_still_be_pulled(self, shared_grid):
        requests = [message(0, "query.slow", seconds=1.5), message(1)]
        replies = shared_grid.send_and_receive(requests, timeout=1.0)
        assert [facts(reply)["node"] for reply in replies] == [FIRST_NODE_ID + 1]
        late = [requests[0].metadata.message_id]
        assert shared_grid.wait(late, 5)
        assert facts(*shared_grid.pull_messages(late))["node"] == FIRST_NODE_ID

    def test_wait_gives_up_and_does_not_spin(self, shared_grid):
        start, cpu = time.monotonic(), time.process_time()
        assert not shared_grid.wait(["unknown"], 0.3)
        assert not shared_grid.wait([], 0.0)
        assert time.monotonic() - start >= 0.3
        assert time.process_time() - cpu < 0.1

    def test_zero_timeout_returns_at_once(self, shared_grid):
        request = message(0, "query.slow", seconds=0.2)
        assert shared_grid.send_and_receive([request], timeout=0) == []
        assert shared_grid.wait([request.metadata.message_id], 5)


class TestFailingApps:
    def test_exception_becomes_flowers_error(self, shared_grid):
        (reply,) = shared_grid.send_and_receive([message(0, "query.faulty", code="raise KeyError('secret')")])
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
        assert reply.error.reason == "<class 'KeyError'>:<''secret''>"
        assert reply.metadata.src_node_id == FIRST_NODE_ID
        assert reply.metadata.message_id

    @pytest.mark.parametrize(
        ("kind", "text"), [("query.faulty", "NoneType, not a Message"), ("query.missing", "registered")]
    )
    def test_misbehaving_app_is_an_error(self, shared_grid, kind, text):
        (reply,) = shared_grid.send_and_receive([message(0, kind, code="pass")])
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert text in reply.error.reason

    def test_app_that_cannot_be_imported_says_why(self, make_grid):
        grid = make_grid(app="toy_broken_app:app")
        pids = grid.worker_pids
        replies = grid.send_and_receive([message(0), message(1), message(0)], timeout=20)
        assert [reply.error.code for reply in replies] == [ErrorCode.LOAD_CLIENT_APP_EXCEPTION] * 3
        assert all("a_module_that_is_missing" in reply.error.reason for reply in replies)
        assert grid.worker_pids == pids

    @pytest.mark.parametrize("app", ["toy_app:missing", "toy_app:echo", "toy_app"])
    def test_reference_that_is_no_app_says_why(self, make_grid, app):
        (reply,) = make_grid(app=app).send_and_receive([message(0)], timeout=20)
        assert reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
        assert app in reply.error.reason

    def test_app_that_ends_its_process_on_import_is_not_restarted_for_ever(self, make_grid):
        grid = make_grid(app="toy_exiting_app:app")
        replies = grid.send_and_receive([message(0) for _ in range(5)], timeout=20)
        assert [reply.error.code for reply in replies] == [ErrorCode.CLIENT_APP_CRASHED] * 5
        assert "exited with status 3 while it was loading toy_exiting_app:app" in replies[0].error.reason
        assert "in a row ended while starting" in replies[-1].error.reason

    def test_app_that_exits_is_replaced(self, make_grid):
        grid = make_grid()
        crash, answer = grid.send_and_receive([message(0, "query.faulty", code="sys.exit(4)"), message(0)], timeout=20)
        assert crash.error.code == ErrorCode.CLIENT_APP_CRASHED == 8
        assert facts(answer)["calls"] == 1


class TestKilledWorkers:
    def test_message_in_progress_fails_and_the_next_one_works(self, make_grid):
        grid = make_grid(nodes=2, workers=1)
        grid.send_and_receive([message(0)])
        (pid,) = grid.worker_pids
        ids = grid.push_messages([message(0, "query.slow", seconds=60), message(1)])
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        crash, queued = collect(grid, ids)
        assert crash.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert "SIGKILL" in crash.error.reason
        assert facts(queued)["node"] == FIRST_NODE_ID + 1
        (reply,) = grid.send_and_receive([message(0)], timeout=20)
        assert facts(reply)["calls"] == 1, "the killed process took its contexts along"
        assert [facts(reply)["pid"]] == grid.worker_pids != [pid]

    def test_idle_worker_is_replaced_unnoticed(self, make_grid):
        grid = make_grid()
        for _ in range(4):
            (reply,) = grid.send_and_receive([message(0)], timeout=20)
            assert facts(reply)["calls"] == 1
            os.kill(grid.worker_pids[0], signal.SIGKILL)
            time.sleep(0.05)

    def test_workers_ignore_interrupts(self, make_grid):
        grid = make_grid()
        ids = grid.push_messages([message(0, "query.slow", seconds=0.3)])
        time.sleep(0.1)
        os.kill(grid.worker_pids[0], signal.SIGINT)
        assert grid.wait(ids, 10)
        assert grid.pull_messages(ids)[0].has_content()

    def test_close_ends_busy_workers(self, make_grid, wait_for_end):
        grid = make_grid(nodes=2, workers=2)
        grid.send_and_receive([message(0), message(1)])
        pids, late = grid.worker_pids, message(0)
        grid.push_messages([message(0, "query.slow", seconds=60)] * 2)
        start = time.monotonic()
        grid.close()
        assert time.monotonic() - start < 2
        assert wait_for_end(pids, 0) == []
        with pytest.raises(RuntimeError, match="closed"):
            grid.push_messages([late])


def collect(grid, ids, timeout=20):
    replies = {}
    while len(replies) < len(ids) and grid.wait([key for key in ids if key not in replies], timeout):
        replies |= {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(ids)}
    return [replies[key] for key in ids if key in replies]


class TestFaults:
    def faulty_grid(self, make_grid, *faults):
        """One node; the first messages meet the faults, the later ones none."""
        queue = itertools.chain(faults, itertools.repeat(None))
        return make_grid(nodes=1, on_deliver=lambda _: next(queue))

    def test_dropped_request_never_arrives(self, make_grid):
        grid = self.faulty_grid(make_grid, Fault(drop_request=True))
        assert grid.send_and_receive([message(0)], timeout=0.2) == []
        assert facts(*grid.send_and_receive([message(0)]))["calls"] == 1

    def test_dropped_reply_was_worked_for(self, make_grid):
        grid = self.faulty_grid(make_grid, None, Fault(drop_reply=True))
        grid.send_and_receive([message(0)])
        assert grid.send_and_receive([message(0)], timeout=0.2) == []
        assert facts(*grid.send_and_receive([message(0)]))["calls"] == 3

    def test_delayed_reply_leaves_the_node_free(self, make_grid):
        grid = self.faulty_grid(make_grid, None, Fault(delay_reply=1.0))
        grid.send_and_receive([message(0)])
        start = time.monotonic()
        late = grid.push_messages([message(0)])
        assert facts(*grid.send_and_receive([message(0)]))["calls"] == 3
        assert time.monotonic() - start < 0.9
        assert grid.pull_messages(late) == []
        assert grid.wait(late, 5)
        assert 1.0 <= time.monotonic() - start < 2.0
        assert facts(*grid.pull_messages(late))["calls"] == 2

    def test_second_delivery_of_the_same_message(self, make_grid):
        grid = self.faulty_grid(make_grid, Fault(deliveries=2))
        (reply,) = grid.send_and_receive([message(0)])
        (surplus,) = grid.surplus_replies
        assert [facts(reply)["calls"], facts(surplus)["calls"]] == [1, 2]
        assert reply.metadata.reply_to_message_id == surplus.metadata.reply_to_message_id

    @pytest.mark.parametrize("kill_after", [0.0, 0.2, math.inf])
    def test_killed_worker(self, make_grid, is_alive, tmp_path, kill_after):
        grid = self.faulty_grid(make_grid, Fault(kill_after=kill_after))
        mark = tmp_path / "done"
        code = f"time.sleep(0.5); open({str(mark)!r}, 'w').close()"
        (pid,) = grid.worker_pids
        (reply,) = grid.send_and_receive([message(0, "query.faulty", code=code)], timeout=20)
        assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert mark.exists() == (kill_after == math.inf)
        assert not is_alive(pid)
        assert facts(*grid.send_and_receive([message(0)], timeout=20))["calls"] == 1

    def test_killed_and_delivered_again(self, make_grid):
        grid = self.faulty_grid(make_grid, Fault(kill_after=math.inf, deliveries=2))
        (reply,) = grid.send_and_receive([message(0)], timeout=20)
        assert reply.has_error()
        assert facts(*grid.surplus_replies)["calls"] == 1


class TestGrid:
    def test_task_identity_is_restored(self, make_grid):
        before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
        outer, inner = make_grid(run_id=3), make_grid(run_id=4)
        assert message(0).metadata.run_id == 4
        inner.close()
        inner.close()
        assert message(0).metadata.run_id == 3
        outer.close()
        assert (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id) == before

    def test_run_can_be_described_but_not_renumbered(self, shared_grid):
        assert shared_grid.run.run_id == 7
        shared_grid.set_run(Run.create_empty(7))
        with pytest.raises(ValueError, match="run 7"):
            shared_grid.set_run(Run.create_empty(8))

    def test_nodes_and_messages_as_flower_asks_for_them(self, shared_grid):
        assert shared_grid.get_node_ids() == [1000, 1001, 1002, 1003, 1004]
        assert [node.node_id for node in shared_grid.get_nodes()] == shared_grid.get_node_ids()
        made = shared_grid.create_message(RecordDict(), "query", 1001, "2")
        assert (made.metadata.dst_node_id, made.metadata.group_id) == (1001, "2")

    def test_unknown_node_is_refused(self, shared_grid):
        for node in (-1, 5):
            with pytest.raises(ValueError, match="no node"):
                shared_grid.push_messages([message(node)])

    @pytest.mark.parametrize(("nodes", "workers"), [(0, 1), (1, 0)])
    def test_impossible_sizes_are_refused(self, nodes, workers):
        with pytest.raises(ValueError, match="need a node and a worker"):
            InProcessGrid("toy_app:app", [{}] * nodes, {}, workers)

    def test_no_more_workers_than_nodes(self, make_grid):
        assert len(make_grid(nodes=2, workers=9).worker_pids) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("app", ["toy_app:app", "toy_torch_app:app"])
    def test_torch_computes_on_one_thread(self, make_grid, app):
        (reply,) = make_grid(app=app).send_and_receive([message(0, "query.threads")], timeout=60)
        assert facts(reply)["threads"] == 1
