"""Sending requests and collecting replies, late ones included.

Flower's own ``send_and_receive`` forgets what arrives after its time-out. Here a request stays open until it is
answered, so that the reply of a straggler still reaches the tally: its noise was charged, whether its update is used or
not. A reply belongs to the node that its request was sent to, whatever it says of itself.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from adadpigu_core.exceptions import MessageError
from adadpigu_core.messages import Wire
from adadpigu_core.printable import printable
from server.wire import from_content

log = logging.getLogger("adadpigu.server")

Wait = Callable[[Iterable[str], float], object]
_POLL_SECONDS = 0.2
_MOST_TEXT = 300


@dataclass(frozen=True)
class Reply:
    """What came back from a node.

    Args:
        node: The node that was asked.
        round: The round in which it was asked.
        kind: Flower's type of the message that it was asked with.
        wire: The message; None if there is none.
        problem: Why there is none.
    """

    node: int
    round: int
    kind: str
    wire: Wire | None
    problem: str = ""


def sleep(_: Iterable[str], seconds: float) -> None:
    """Wait for replies in the only way that every grid has."""
    time.sleep(seconds)


class Exchange:
    """Open requests and the bytes they moved.

    Args:
        grid: Flower's way to the nodes.
        wait: Waits up to some seconds for a reply to one of some message ids.
    """

    def __init__(self, grid: Grid, wait: Wait = sleep) -> None:
        self.grid = grid
        self.bytes_up = 0
        self.bytes_down = 0
        self._wait = wait
        self._sent: dict[str, Reply] = {}
        self._open: set[str] = set()

    def send(self, messages: list[Message], round_number: int) -> None:
        """Send requests without waiting."""
        ids = list(self.grid.push_messages(messages)) if messages else []
        if len(ids) < len(messages):  # together they were too large for Flower
            ids = [next(iter(self.grid.push_messages([message])), "") for message in messages]
        for message_id, message in zip(ids, messages, strict=True):
            if not message_id:
                log.warning("node %d: Flower did not take a message for it", message.metadata.dst_node_id)
            else:
                metadata = message.metadata
                self._sent[message_id] = Reply(metadata.dst_node_id, round_number, metadata.message_type, None)
                self._open.add(message_id)
                self.bytes_down += _bytes(message)

    def collect(self, kind: str, round_number: int, timeout: float) -> list[Message]:
        """Wait for the replies of a round; whatever else has arrived by then comes along."""
        deadline = time.monotonic() + timeout
        messages = self._arrived()
        while self.missing(kind, round_number):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._wait(list(self._open), min(left, _POLL_SECONDS))
            messages += self._arrived()
        return messages

    def missing(self, kind: str, round_number: int) -> list[int]:
        """Nodes that have not answered a round yet."""
        sent = (self._sent[message_id] for message_id in self._open)
        return sorted(reply.node for reply in sent if (reply.kind, reply.round) == (kind, round_number))

    def resolve(self, messages: Iterable[Message]) -> list[Reply]:
        """Find out who sent what, ordered by round and node, so that no sum depends on who was faster."""
        replies = []
        for message in messages:
            sent = self._sent.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                replies.append(_filled(sent, message))
        return sorted(replies, key=lambda reply: (reply.round, reply.node))

    def _arrived(self) -> list[Message]:
        messages = self._pulled(sorted(self._open)) if self._open else []
        for message in messages:
            self._open.discard(message.metadata.reply_to_message_id)
            self.bytes_up += _bytes(message)
        return messages

    def _pulled(self, ids: list[str]) -> list[Message]:
        """Pull replies; one that Flower cannot even read must not take the others with it."""
        try:
            return list(self.grid.pull_messages(ids))
        except Exception as error:  # Flower passes on whatever its parsers raise
            if _is_about_the_network(error):
                raise
            if len(ids) > 1:
                return [message for one in ids for message in self._pulled([one])]
            log.warning("node %d: its reply cannot be read (%s)", self._sent[ids[0]].node, type(error).__name__)
            self._open.discard(ids[0])
            return []


def request(content: RecordDict, node: int, message_type: str, round_number: int) -> Message:
    """Make the message that carries a request; several may share a content, which is then held once."""
    return Message(content, dst_node_id=node, message_type=message_type, group_id=str(round_number))


def _is_about_the_network(error: Exception) -> bool:
    origins = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not origins.isdisjoint({"httpx", "grpc"})


def _filled(sent: Reply, message: Message) -> Reply:
    if message.has_error():
        return replace(sent, problem=printable(f"error {message.error.code}: {message.error.reason}", _MOST_TEXT))
    try:
        return replace(sent, wire=from_content(message.content))
    except MessageError as error:
        return replace(sent, problem=str(error))


def _bytes(message: Message) -> int:
    """Size of the payload: arrays as they are, values as text, without Flower's envelope."""
    if not message.has_content():
        return 0
    records = message.content
    arrays = (array for record in records.array_records.values() for array in record.values())
    values = (item for record in records.config_records.values() for item in record.items())
    return sum(len(array.data) for array in arrays) + sum(len(key) + len(str(value)) for key, value in values)
