"""The privacy ledger: what a data set has spent, written down before it is spent.

One SQLite file on the machine that holds the data. Rows are keyed by the data set, not by run or process, because the
guarantee is about everything that is ever released from a data set. A charge is committed, with the disk told to keep
it, before the release that it pays for exists. Charges are never changed or deleted; triggers in the file enforce it.

A release is stored beside its charge before it leaves, until a later round replaces it, and what leaves is what
``store_release`` returns. So a repeated request gets the same release again, whoever computed it, and after a crash
the rule is simple: a charge without a stored release has let nothing out, and the round may be computed once more under
that same charge. A round is closed for good as soon as a later round of its run is charged.

Left out: protection against whoever may write the file, and against an old copy of it being put back.
"""

import json
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from adadpigu_core.accounting import Event, Plan, epsilon, fits, merge
from adadpigu_core.exceptions import BudgetError, ConfigurationError, LedgerError, MessageError
from adadpigu_core.ledger_file import NONSENSE, LedgerFile


@dataclass(frozen=True)
class Target:
    """A budget over everything ever released from a data set; an infinite epsilon is no limit."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not 0 < self.delta < 1:  # NaN fails too
            raise ConfigurationError(f"target: needs epsilon > 0 and delta in (0, 1), got {self.epsilon}, {self.delta}")


@dataclass(frozen=True)
class Round:
    """Which round of which run a charge belongs to, counted from 1, and the code that asks for it."""

    run: str
    number: int
    code: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.number, int) or not 1 <= self.number < 2**31:
            text = f"round: must be a number from 1, got {self.number}"
            raise MessageError(text, text)


class RoundCharge:
    """Permission to release a number of times, already paid for; each call with the event uses it up."""

    def __init__(self, charge_id: int, event: Event) -> None:
        self.charge_id = charge_id
        self._event = event
        self._left = event.count

    def __call__(self, event: Event) -> None:
        """Use up one release.

        Raises:
            LedgerError: If the event is not the one that was charged, or nothing is left.
        """
        if event != replace(self._event, count=event.count) or event.count > self._left:
            raise LedgerError(f"the ledger was charged for {self._event}, not for {event}: nothing is released")
        self._left -= event.count


class Ledger(LedgerFile):
    """The ledger of one data set.

    Any number of processes may open the same file; each opens its own, in the thread that uses it, after any fork.

    Args:
        path: SQLite file on a local disk; made with its folder if it does not exist, readable by its owner only.
        data_set: Name of the data set, the key of everything below.
        content: Fingerprint of the records, to notice the same records under another name. Other content under the
            same name, such as records that were added, goes on with the same budget.

    Raises:
        LedgerError: If the file cannot be written, is damaged, was deleted, or comes from a newer version.
    """

    def __init__(self, path: Path | str, data_set: str, content: str) -> None:
        super().__init__(path)
        self.data_set = data_set
        try:
            self._register(content)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """Random public identity of the data set, made when it was first seen."""
        return str(self._one("SELECT id FROM data_sets WHERE name = ?", self.data_set)[0])

    def events(self, *, other_than_run: str | None = None) -> tuple[Event, ...]:
        """Everything charged so far, equal events added up."""
        query = "SELECT phase, noise_multiplier, sampling_probability, count FROM charges WHERE data_set = ?"
        rows = self._all(query + " AND run IS NOT ?", self.data_set, other_than_run)
        with self._explained(*NONSENSE):
            return merge(Event(*row) for row in rows)

    def epsilon(self, delta: float) -> float:
        """Epsilon spent so far."""
        return epsilon(self.events(), delta)

    def plan(self, run: str) -> Plan | None:
        """The plan recorded for a run, if there is one."""
        rows = self._all("SELECT plan FROM plans WHERE data_set = ? AND run = ?", self.data_set, run)
        with self._explained(*NONSENSE):
            plans = [json.loads(text) for (text,) in rows]
            return Plan.from_dict(plans[0]) if plans else None

    def record_plan(self, run: str, plan: Plan, target: Target) -> Plan:
        """Fix the plan of a run; the first one recorded stays, and is returned.

        A plan reserves nothing: two runs that plan at the same time get what is left when they charge.
        """
        with self._transaction():
            recorded = self.plan(run)
            if recorded is not None:
                return recorded
            self._execute(
                "INSERT INTO plans VALUES (?, ?, ?, ?, ?, ?)",
                *(self.data_set, run, json.dumps(plan.to_dict()), target.epsilon, target.delta, time.time()),
            )
        return plan

    def target(self, run: str) -> Target | None:
        """The target that the plan of a run was made for."""
        query = "SELECT target_epsilon, target_delta FROM plans WHERE data_set = ? AND run = ?"
        rows = self._all(query, self.data_set, run)
        with self._explained(*NONSENSE):
            return Target(*rows[0]) if rows else None

    def charge(self, round_: Round, event: Event, target: Target) -> RoundCharge:
        """Charge a round before it is computed, or find its charge if a crash or another process has left one.

        Raises:
            BudgetError: If everything charged with this event would exceed the target; nothing is charged.
            MessageError: If the round was charged for another event, or lies before the latest charged round.
            LedgerError: If the charge cannot be made durable.
        """
        if event.count < 1:
            raise ConfigurationError(f"event.count: a round charges at least 1 release, got {event.count}")
        with self._transaction():
            if self._is_charged(round_.run, round_.number):
                return self._charged_before(round_, event)
            self._refuse_overspending(event, target)
            cursor = self._execute(
                "INSERT INTO charges (data_set, run, round, phase, noise_multiplier, sampling_probability, count, "
                "code, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(self.data_set, round_.run, round_.number),
                *(event.phase, event.noise_multiplier, event.sampling_probability, event.count),
                *(round_.code, time.time()),
            )
            return RoundCharge(int(cursor.lastrowid or 0), event)

    def store_release(self, charge: RoundCharge, payload: bytes, memory: bytes) -> bytes:
        """Keep a release before it leaves; returns the release that counts, the only one that may leave.

        If another process stored one for the same charge first, that one counts and this one is forgotten unseen.

        Raises:
            MessageError: If a later round of the run was charged or released meanwhile.
        """
        with self._transaction():
            query = "SELECT run, round, payload FROM rounds WHERE id = ? AND data_set = ?"
            run, number, stored = self._one(query, charge.charge_id, self.data_set)
            if stored is not None:
                return bytes(stored)
            self._is_charged(run, number)
            self._execute(
                "UPDATE releases SET payload = NULL, memory = NULL WHERE charge IN "
                "(SELECT id FROM charges WHERE data_set = ? AND run = ?)",
                *(self.data_set, run),
            )
            self._execute("INSERT INTO releases VALUES (?, ?, ?)", charge.charge_id, payload, memory)
        return payload

    def stored_release(self, round_: Round) -> bytes | None:
        """The release of a round, if it is the latest of its run."""
        query = "SELECT payload FROM rounds WHERE data_set = ? AND run = ? AND round = ? AND payload IS NOT NULL"
        rows = self._all(query, self.data_set, round_.run, round_.number)
        return bytes(rows[0][0]) if rows else None

    def memory(self, run: str) -> bytes | None:
        """What was stored beside the latest release of a run."""
        query = "SELECT memory FROM rounds WHERE data_set = ? AND run = ? AND memory IS NOT NULL"
        rows = self._all(query, self.data_set, run)
        return bytes(rows[0][0]) if rows else None

    def _is_charged(self, run: str, number: int) -> bool:
        """Whether a round was charged; refuses any round before the latest that was."""
        query = "SELECT coalesce(max(round), 0) FROM charges WHERE data_set = ? AND run = ?"
        latest = int(self._one(query, self.data_set, run)[0])
        if number < latest:
            text = f"round {number} lies in the past: round {latest} was charged already"
            raise MessageError(text, text)
        return number == latest

    def _charged_before(self, round_: Round, event: Event) -> RoundCharge:
        query = "SELECT id, phase, noise_multiplier, sampling_probability, count FROM charges WHERE data_set = ?"
        query += " AND run = ? AND round = ?"
        charge_id, *row = self._one(query, self.data_set, round_.run, round_.number)
        with self._explained(*NONSENSE):
            charged = Event(*row)
        if charged != event:
            text = f"round {round_.number} was charged for {charged} and is now asked for {event}"
            raise MessageError(text, text)
        return RoundCharge(charge_id, charged)

    def _refuse_overspending(self, event: Event, target: Target) -> None:
        events = (*self.events(), event)
        if not fits(events, target.epsilon, target.delta):
            text = (
                f"the privacy budget does not allow this round: epsilon would be {epsilon(events, target.delta):.4f} "
                f"of {target.epsilon:g} at delta {target.delta:g}"
            )
            raise BudgetError(text, text)

    def _register(self, content: str) -> None:
        with self._transaction():
            for (known,) in self._all("SELECT data_set FROM contents WHERE content = ?", content):
                if known != self.data_set:
                    raise LedgerError(
                        f"{self.path}: these very records are known as data set {known!r}, not {self.data_set!r}; "
                        f"one data set has one budget: use the name {known!r}"
                    )
            now, identity = time.time(), str(uuid.uuid4())
            self._execute("INSERT OR IGNORE INTO data_sets VALUES (?, ?, ?)", self.data_set, identity, now)
            self._execute("INSERT OR IGNORE INTO contents VALUES (?, ?, ?)", content, self.data_set, now)
