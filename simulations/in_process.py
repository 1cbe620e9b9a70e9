"""A Flower Grid whose nodes live in a few worker processes of this machine.

The strategy talks to this grid as it would to a deployed SuperLink, and the same ClientApp runs behind it:
messages are serialised by Flower's own code in both directions, a failing app answers with Flower's error
codes, and a killed process is noticed and replaced. What is left out is everything slow: no Ray, no network,
no polling.

The one idea: a thread in this process per worker process, which takes one message at a time through
"serialise, send, wait, deserialise". A node is pinned to a worker, so its messages are handled in the order
in which they were sent. Until its turn a message waits here as an object that shares its arrays with the
caller, so that a model that goes to a thousand nodes is held once.

Replies that are lost, late or doubled, and workers that die, can be asked for message by message with
:class:`Fault`. Left out: a message's time to live, and nodes that join or leave.
"""

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from flwr.app import Error, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from simulations import worker
from simulations.worker_process import WorkerDiedError, WorkerProcess, worker_environment

FIRST_NODE_ID = 1000
"""Node ``index`` has the id ``FIRST_NODE_ID + index``; Flower reserves 0 and 1."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one message. The default is that nothing does.

    Args:
        drop_request: The node never sees the message, and no reply comes.
        deliveries: How often the node sees the message. The first reply counts, once all deliveries are
            answered; the others go to :attr:`InProcessGrid.surplus_replies`.
        drop_reply: The node handles the message, and its reply is lost.
        delay_reply: Seconds by which the reply comes late. The node is free meanwhile.
        kill_after: Seconds from the (first) delivery until the node's worker process is killed, or less if it
            answers before that; ``math.inf`` kills it exactly when its work is done and its reply is not out
            yet. The reply is an error.
    """

    drop_request: bool = False
    deliveries: int = 1
    drop_reply: bool = False
    delay_reply: float = 0.0
    kill_after: float | None = None


class InProcessGrid(Grid):
    """Runs a ClientApp for many simulated nodes in a few worker processes.

    Close the grid after use, or use it as a context manager. While it is open, messages can be created as in
    a ServerApp. Grids may be nested, but must be closed in the reverse order of opening. Workers start at
    once and import the ClientApp while the caller goes on.

    Args:
        client_app: Import path of the ClientApp, for example ``client.app:app``.
        node_configs: The node configuration of each simulated node; their number is the number of nodes.
        run_config: The run's configuration, the same for all nodes.
        num_workers: How many processes share the nodes: node ``index`` lives in process ``index %
            num_workers``.
        run_id: The run that all messages belong to.
        environment: Environment variables for the workers, added to this process's own. ``PYTHONPATH`` is
            searched before this process's ``sys.path``. Workers compute on ``OMP_NUM_THREADS`` threads, 1
            unless given here.
        on_deliver: Called for every message, in the order in which they are pushed and in the caller's
            thread, to say what goes wrong with it.

    Raises:
        ValueError: If there is no node or no worker.
    """

    def __init__(
        self,
        client_app: str,
        node_configs: Sequence[Mapping[str, UserConfigValue]],
        run_config: Mapping[str, UserConfigValue],
        num_workers: int,
        *,
        run_id: int = 1,
        environment: Mapping[str, str] | None = None,
        on_deliver: Callable[[Message], Fault | None] | None = None,
    ) -> None:
        if not node_configs or num_workers < 1:
            raise ValueError(f"need a node and a worker, got {len(node_configs)} and {num_workers}")
        self.surplus_replies: list[Message] = []
        self._run = Run.create_empty(run_id)
        self._on_deliver = on_deliver
        self._replies = _Replies()
        self._closed = False
        configs = {FIRST_NODE_ID + index: dict(config) for index, config in enumerate(node_configs)}
        self._node_ids = list(configs)
        setups = [
            worker.WorkerSetup(client_app, run_id, dict(run_config), {node: configs[node] for node in pinned})
            for pinned in (self._node_ids[first::num_workers] for first in range(num_workers))
            if pinned
        ]
        variables = worker_environment(environment or {})
        self._lanes = [_Lane(WorkerProcess(setup, variables), self._replies, self.surplus_replies) for setup in setups]
        identity = (SUPERLINK_NODE_ID, run_id, SUPERLINK_NODE_ID)
        self._outer_identity = worker.set_task_identity(identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing, and forget replies that nobody pulled."""
        if self._closed:
            return
        self._closed = True
        worker.set_task_identity(self._outer_identity)
        for lane in self._lanes:
            lane.hang_up()
        for lane in self._lanes:
            lane.join()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers; the position is the node index modulo the number of workers."""
        return [lane.process.pid for lane in self._lanes]

    @property
    def run(self) -> Run:
        """The run of this grid."""
        return copy.copy(self._run)

    def set_run(self, run: Run) -> None:
        """Replace the description of the run. Its id cannot change: the nodes' contexts belong to it."""
        if run.run_id != self._run.run_id:
            raise ValueError(f"this grid was made for run {self._run.run_id}, not for run {run.run_id}")
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; Flower's own code calls ``Message(...)`` instead."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """List the node ids, in the order of the node configurations."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages without waiting, and give each a message id.

        Raises:
            RuntimeError: If the grid is closed.
            ValueError: If a message is for a node that is not here.
        """
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        if self._closed:
            raise RuntimeError("the grid is closed")
        index = message.metadata.dst_node_id - FIRST_NODE_ID
        if not 0 <= index < len(self._node_ids):
            raise ValueError(f"there is no node {message.metadata.dst_node_id}")
        worker.assign_message_id(message)
        fault = (self._on_deliver and self._on_deliver(message)) or Fault()
        if not fault.drop_request:
            # The caller may reuse its records for the next message. Array data are bytes, which a copy
            # shares.
            self._lanes[index % len(self._lanes)].submit(copy.deepcopy(message), fault)
        return message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once, in the order of ``message_ids``."""
        return self._replies.take(message_ids)

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        """Block until a reply to one of the messages can be pulled, or the time is over.

        Args:
            message_ids: Messages whose replies have not been pulled yet.
            timeout: In seconds; ``None`` waits for ever.

        Returns:
            Whether a reply is there.
        """
        return self._replies.wait(list(message_ids), timeout)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for their replies, at most ``timeout`` seconds.

        Returns:
            The replies that came in time, in the order of ``messages``. Later ones can still be pulled.
        """
        message_ids = self.push_messages(messages)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        replies: dict[str, Message] = {}
        pending = set(message_ids)
        while pending and self.wait(pending, _remaining(deadline)):
            for reply in self.pull_messages(pending):
                replies[reply.metadata.reply_to_message_id] = reply
            pending -= replies.keys()
        return [replies[message_id] for message_id in message_ids if message_id in replies]


def _remaining(deadline: float) -> float | None:
    """Seconds until a deadline, as the standard library wants them."""
    return None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())


class _Replies:
    """Replies that nobody has pulled yet, each with the time from which it counts as arrived."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._waiting: dict[str, tuple[float, Message]] = {}

    def put(self, reply: Message, delay: float) -> None:
        with self._arrived:
            self._waiting[reply.metadata.reply_to_message_id] = (time.monotonic() + delay, reply)
            self._arrived.notify_all()

    def take(self, message_ids: Iterable[str]) -> list[Message]:
        with self._arrived:
            now = time.monotonic()
            due = [key for key in message_ids if self._due(key) <= now]
            return [self._waiting.pop(key)[1] for key in dict.fromkeys(due)]

    def wait(self, message_ids: Sequence[str], timeout: float | None) -> bool:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._arrived:
            while (due := min(map(self._due, message_ids), default=math.inf)) > time.monotonic():
                if deadline <= time.monotonic():
                    return False
                self._arrived.wait(_remaining(min(due, deadline)))
            return True

    def _due(self, message_id: str) -> float:
        return self._waiting[message_id][0] if message_id in self._waiting else math.inf


class _Lane:
    """One worker process and the thread that feeds it."""

    def __init__(self, process: WorkerProcess, replies: _Replies, surplus: list[Message]) -> None:
        self.process = process
        self._replies = replies
        self._surplus = surplus
        self._jobs: queue.SimpleQueue[tuple[Message, Fault] | None] = queue.SimpleQueue()
        # A daemon, so that a grid that is never closed does not keep the interpreter alive.
        self._thread = threading.Thread(target=self._work, name=f"worker-{process.pid}", daemon=True)
        self._thread.start()

    def submit(self, message: Message, fault: Fault) -> None:
        self._jobs.put((message, fault))

    def hang_up(self) -> None:
        self.process.hang_up()
        self._jobs.put(None)

    def join(self) -> None:
        self.process.reap()
        self._thread.join()
        self.process.release()

    def _work(self) -> None:
        self.process.introduce()
        while (job := self._jobs.get()) is not None and not self.process.hung_up:
            message, fault = job
            reply = self._answer(message, fault.kill_after)
            self._surplus += [self._answer(message) for _ in range(1, fault.deliveries)]
            if not fault.drop_reply:
                self._replies.put(reply, fault.delay_reply)

    def _answer(self, message: Message, kill_after: float | None = None) -> Message:
        try:
            return worker.decode(self.process.exchange(worker.encode(message), kill_after))
        except WorkerDiedError as error:
            code, reason = ErrorCode.CLIENT_APP_CRASHED, str(error)
        except Exception as error:  # whoever waits for this message must hear of it
            code, reason = ErrorCode.UNKNOWN, f"{type(error).__name__}: {error}"
        reply = Message(Error(code, reason), reply_to=message)
        worker.assign_message_id(reply)
        return reply
