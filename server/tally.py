"""What every client has spent, as the server knows it.

Each reply carries the client's whole ledger in summary. The tally keeps the largest count seen of every event, so that
a lost reply is made good by the next; recomputes every epsilon from the events; and flags a client whose summary
shrinks, holds less than the rounds that it has answered, or exceeds its budget. An account takes in only what came
from its own client: who that is, is for the caller to know. The tally watches; what protects a client is its ledger.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adadpigu_core.accounting import Event, epsilon, merge
from adadpigu_core.messages import MOST_STEPS, Description

log = logging.getLogger("adadpigu.server")

_Kind = tuple[str, float, float]

# A ledger beyond these is taken for infinite, not for hours of accounting.
_MOST_KINDS = 500
_MOST_RELEASES = MOST_STEPS
_LEAST_SAMPLING_PROBABILITY = 1e-9
_MOST_NOISE_MULTIPLIER = 1e12


@dataclass
class Account:
    """One data set.

    Args:
        data_set: Its identity.
        name: Name of its client.
        num_records: Declared number of records.
        target_epsilon: Its budget for this run.
        target_delta: Its delta.
        counts: Largest count seen of each (phase, noise multiplier, sampling probability).
        witnessed: What the replies of this run alone amount to.
        releases: Number of rounds that it has answered in this run.
        warnings: What does not add up.
        countable: Whether its events can be accounted for; if not, its epsilon is infinite.
    """

    data_set: str
    name: str
    num_records: int
    target_epsilon: float
    target_delta: float
    counts: dict[_Kind, int] = field(default_factory=dict)
    witnessed: dict[_Kind, int] = field(default_factory=dict)
    releases: int = 0
    warnings: list[str] = field(default_factory=list)
    countable: bool = True

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that is known to be spent."""
        return merge(Event(*kind, count) for kind, count in self.counts.items())

    @property
    def epsilon(self) -> float:
        """Epsilon spent, recomputed from the events; infinite if they cannot be accounted for."""
        if not self.countable:
            return math.inf
        try:
            return epsilon(self.events, self.target_delta)
        except (ArithmeticError, ValueError) as error:  # some client's numbers are beyond dp_accounting's arithmetic
            log.warning("%s: its events cannot be accounted for (%s)", self.name or self.data_set, error)
            return math.inf

    def claim(self, spent: Iterable[Event], *, fresh: bool = True) -> None:
        """Take in a summary of the ledger.

        Args:
            spent: The summary.
            fresh: Whether it was made now; a late or repeated one may rightly show less.
        """
        claimed = {_kind(event): event.count for event in merge(spent)}
        if not _is_countable(claimed) or len(claimed.keys() | self.counts.keys()) > _MOST_KINDS:
            self._warn("its ledger shows events that cannot be accounted for")
            self.countable = False
            return
        if fresh and any(claimed.get(kind, 0) < known for kind, known in self.counts.items()):
            self._warn("its ledger shows fewer releases than before: was a backup restored?")
        for kind, count in claimed.items():
            self.counts[kind] = max(count, self.counts.get(kind, 0))

    def witness(self, event: Event) -> None:
        """Note a release that has arrived, and check that the ledger admits to it."""
        kind = _kind(event)
        self.releases += 1
        self.witnessed[kind] = self.witnessed.get(kind, 0) + event.count
        if self.counts.get(kind, 0) < self.witnessed[kind]:
            self._warn("its ledger admits to fewer releases than have arrived")
            self.counts[kind] = self.witnessed[kind]

    def report(self) -> dict[str, Any]:
        """Give the account in a form from which anyone can recompute its epsilon."""
        spent = self.epsilon
        if spent > self.target_epsilon:
            self._warn("it has spent more than its budget")
        return {
            "data_set": self.data_set,
            "num_records": self.num_records,
            "target_epsilon": self.target_epsilon,
            "delta": self.target_delta,
            "epsilon": spent,
            "releases": self.releases,
            "events": [asdict(event) for event in self.events],
            "warnings": list(self.warnings),
        }

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _kind(event: Event) -> _Kind:
    return event.phase, event.noise_multiplier, event.sampling_probability


def _is_countable(counts: dict[_Kind, int]) -> bool:
    return sum(counts.values()) <= _MOST_RELEASES and all(
        noise <= _MOST_NOISE_MULTIPLIER and probability >= _LEAST_SAMPLING_PROBABILITY
        for _, noise, probability in counts
    )


class Tally:
    """The accounts of all data sets."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._earlier: Mapping[str, Iterable[Event]] = {}

    def remember(self, earlier: Mapping[str, Iterable[Event]]) -> None:
        """Take in what earlier runs have seen of data sets, for when one of them takes part in this one."""
        self._earlier = earlier

    def open(self, description: Description) -> Account:
        """Open the account of a client that takes part, or go on with it under what it says of itself now."""
        facts = {name: getattr(description, name) for name in ("name", "num_records", "target_epsilon", "target_delta")}
        account = self._accounts.setdefault(description.data_set, Account(description.data_set, **facts))
        vars(account).update(facts)
        account.claim(self._earlier.get(description.data_set, ()), fresh=False)
        account.claim(description.spent)
        return account

    def __getitem__(self, data_set: str) -> Account:
        return self._accounts[data_set]

    @property
    def accounts(self) -> list[Account]:
        """All accounts, ordered by name."""
        return sorted(self._accounts.values(), key=lambda account: (_natural(account.name), account.data_set))

    @property
    def largest_epsilon(self) -> float:
        """The largest epsilon that any client has spent."""
        return max((account.epsilon for account in self._accounts.values()), default=0.0)

    @property
    def epsilons(self) -> dict[str, float]:
        """What every client has spent, by its id."""
        return {name: account.epsilon for name, account in self._named()}

    def report(self) -> list[dict[str, Any]]:
        """Give every account; its id is its name, or its data set where names are missing or shared."""
        return [{"id": name, **account.report()} for name, account in self._named()]

    def _named(self) -> list[tuple[str, Account]]:
        accounts = self.accounts
        names = Counter(account.name for account in accounts)
        return [
            (account.name if account.name and names[account.name] == 1 else account.data_set, account)
            for account in accounts
        ]

    def state(self) -> list[dict[str, Any]]:
        """Everything, for a checkpoint."""
        return [
            {
                **vars(account),
                "counts": _rows(account.counts),
                "witnessed": _rows(account.witnessed),
                "warnings": list(account.warnings),
            }
            for account in self.accounts
        ]

    @classmethod
    def restore(cls, state: list[dict[str, Any]]) -> "Tally":
        """Go on from a checkpoint."""
        tally = cls()
        for entry in state:
            rows = {name: _from_rows(entry[name]) for name in ("counts", "witnessed")}
            account = Account(**{**entry, **rows})
            tally._accounts[account.data_set] = account
        return tally


def _rows(counts: dict[_Kind, int]) -> list[list[Any]]:
    return [[*kind, count] for kind, count in counts.items()]


def _from_rows(rows: list[list[Any]]) -> dict[_Kind, int]:
    return {(phase, noise, probability): count for phase, noise, probability, count in rows}


def _natural(name: str) -> tuple[str, int]:
    """Sort client-2 before client-10."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)
