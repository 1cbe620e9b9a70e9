"""Who takes part: nodes that have described themselves, and why the others do not."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from adadpigu_core.exceptions import MessageError
from adadpigu_core.messages import Description, Refusal, Wire, decode, kind_of
from server.tally import Tally

log = logging.getLogger("adadpigu.server")

# A node that refuses so often in a row is left alone for the rest of the run.
_PATIENCE = 3
# Nothing that the server can do changes these.
_FINAL = ("budget", "configuration", "data", "model")


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
        self.refused: dict[int, Refusal] = {}

    def newcomers(self, nodes: Iterable[int]) -> list[int]:
        """Nodes that have neither described themselves nor refused."""
        return sorted(node for node in nodes if node not in self._members and node not in self.refused)

    def admit(self, node: int, wire: Wire) -> None:
        """Take in a node's answer to the request to describe itself."""
        try:
            if kind_of(wire) == "Refusal":
                self.refuse(node, decode(wire, Refusal))
                return
            description = decode(wire, Description)
            self._admit(node, description)
        except MessageError as error:
            self.refuse(node, Refusal(error.code, str(error), "", ()))

    def _admit(self, node: int, description: Description) -> None:
        twin = next((m.node for m in self if m.description.data_set == description.data_set), None)
        if twin is not None:
            text = f"its data set is already taking part through node {twin}"
            self.refuse(node, Refusal("duplicate", text, description.data_set, description.spent))
            return
        self._members[node] = Member(node, description)
        self._tally.open(description)

    def refuse(self, node: int, refusal: Refusal) -> None:
        """Go on without a node."""
        log.warning("node %d does not take part: %s", node, refusal.message or f"code {refusal.code!r}")
        self.refused[node] = refusal
        self._members.pop(node, None)
        self._tally.claim(refusal.data_set, refusal.spent)

    def refused_round(self, node: int, refusal: Refusal) -> None:
        """Note that a node refused a round: its mask is sent again, and after a while it is left alone."""
        member = self._members.get(node)
        if member is None:
            return
        member.mask_id = ""
        member.refusals += 1
        self._tally.claim(refusal.data_set, refusal.spent)
        if refusal.code in _FINAL or member.refusals >= _PATIENCE:
            self.refuse(node, refusal)
        else:
            log.warning("%s refused a round: %s", member.description.name, refusal.message or refusal.code)

    def get(self, node: int) -> Member | None:
        """The member of a node, if it still takes part."""
        return self._members.get(node)

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=lambda member: member.node))

    def __len__(self) -> int:
        return len(self._members)
