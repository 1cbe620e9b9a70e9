"""Who takes part: nodes that have described themselves, and why the others do not.

Whatever a node says of a data set counts for its own data set alone, the one that it described itself with.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from adadpigu_core.exceptions import MessageError
from adadpigu_core.messages import Description, Refusal, Wire, decode, kind_of
from adadpigu_core.printable import printable
from server.tally import Tally

log = logging.getLogger("adadpigu.server")

# A node that refuses so often in a row is left alone for the rest of the run.
_PATIENCE = 3
# Nothing that the server can do changes these.
_FINAL = ("budget", "configuration", "data", "model", "policy")
_MOST_TEXT = 300


@dataclass
class Member:
    """A node that takes part.

    Args:
        node: Flower's id of it.
        description: What it said of itself.
        mask_id: Fingerprint of the last mask that it is known to hold.
        refusals: How often in a row it has refused.
    """

    node: int
    description: Description
    mask_id: str = ""
    refusals: int = 0


class Cohort:
    """The nodes of a run.

    Args:
        tally: Told of every ledger summary that arrives.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._members: dict[int, Member] = {}
        self._former: dict[int, Member] = {}
        self._present: frozenset[int] = frozenset()
        self.refused: dict[int, Refusal] = {}

    def newcomers(self, nodes: Iterable[int]) -> list[int]:
        """Note which nodes are there, and list those that have neither described themselves nor refused."""
        self._present = frozenset(nodes)
        return sorted(self._present - self._members.keys() - self.refused.keys())

    @property
    def present(self) -> list[Member]:
        """Members that are there, ordered by node."""
        return [member for member in self if member.node in self._present]

    def admit(self, node: int, wire: Wire) -> None:
        """Take in a node's answer to the request to describe itself."""
        if node in self._members or node in self.refused:
            return  # it was asked twice
        try:
            if kind_of(wire) == "Refusal":
                self.refuse(node, decode(wire, Refusal))
            else:
                self._admit(node, decode(wire, Description))
        except MessageError as error:
            self.refuse(node, Refusal(error.code, str(error), "", ()))

    def _admit(self, node: int, description: Description) -> None:
        twin = next((m.node for m in self._members.values() if m.description.data_set == description.data_set), None)
        if twin in self._present:
            text = f"its data set is already taking part through node {twin}"
            self.refuse(node, Refusal("duplicate", text, "", ()))
            return
        if twin is not None:
            log.warning("node %d takes the place of node %d, which is gone", node, twin)
            self._former[twin] = self._members.pop(twin)
        self._members[node] = Member(node, description)
        self._tally.open(description)

    def refuse(self, node: int, refusal: Refusal) -> None:
        """Go on without a node."""
        refusal = Refusal(printable(refusal.code, 30), printable(refusal.message, _MOST_TEXT), "", ())
        log.warning("node %d does not take part: %s", node, refusal.message or f"code {refusal.code!r}")
        self.refused[node] = refusal
        if node in self._members:
            self._former[node] = self._members.pop(node)

    def refused_round(self, node: int, refusal: Refusal, *, fresh: bool = True) -> None:
        """Note that a node refused a round: its mask is sent again, and after a while it is left alone.

        Args:
            node: The node.
            refusal: What it said.
            fresh: Whether it said so just now.
        """
        member = self.known(node)
        if member is None:
            return
        if refusal.data_set == member.description.data_set:
            self._tally[refusal.data_set].claim(refusal.spent, fresh=fresh)
        if node not in self._members:
            return
        member.mask_id = ""
        member.refusals += 1
        if refusal.code in _FINAL or member.refusals >= _PATIENCE:
            self.refuse(node, refusal)
        else:
            reason = printable(refusal.message or refusal.code, _MOST_TEXT)
            log.warning("%s refused a round: %s", member.description.name or f"node {node}", reason)

    def get(self, node: int) -> Member | None:
        """The member of a node, if it still takes part."""
        return self._members.get(node)

    def known(self, node: int) -> Member | None:
        """The member of a node that takes part or once did."""
        return self._members.get(node) or self._former.get(node)

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=lambda member: member.node))

    def __len__(self) -> int:
        return len(self._members)
