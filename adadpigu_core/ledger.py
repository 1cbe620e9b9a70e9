"""The privacy ledger: what a data set has spent, written down before it is spent.

One SQLite file on the machine that holds the data. Rows are keyed by the data set, not by run or process, because the
guarantee is about everything that is ever released from a data set. A charge is committed, with the disk told to keep
it, before the release that it pays for exists; charges are never changed or deleted, which triggers in the file enforce.

A release is stored beside its charge before it leaves, until the next round replaces it. So a repeated request gets the
same release again, and after a crash the rule is simple: a charge without a stored release has let nothing out, and the
round may be computed once more under that same charge.
"""

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adadpigu_core.accounting import Event, Plan, epsilon, fits, merge
from adadpigu_core.exceptions import BudgetError, ConfigurationError, LedgerError, MessageError

SCHEMA_VERSION = 1
_BUSY_SECONDS = 30.0

_SCHEMA = """
CREATE TABLE data_sets (name TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, content TEXT NOT NULL, time REAL NOT NULL);
CREATE TABLE plans (data_set TEXT NOT NULL REFERENCES data_sets(name), run TEXT NOT NULL, plan TEXT NOT NULL,
    target_epsilon REAL NOT NULL, target_delta REAL NOT NULL, time REAL NOT NULL, PRIMARY KEY (data_set, run));
CREATE TABLE charges (id INTEGER PRIMARY KEY AUTOINCREMENT, data_set TEXT NOT NULL REFERENCES data_sets(name),
    run TEXT NOT NULL, round INTEGER NOT NULL, phase TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sampling_probability REAL NOT NULL, count INTEGER NOT NULL, code TEXT NOT NULL, time REAL NOT NULL,
    UNIQUE (data_set, run, round));
CREATE TABLE releases (charge INTEGER PRIMARY KEY REFERENCES charges(id), payload BLOB, memory BLOB);
CREATE TRIGGER charges_keep BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'charges are final'); END;
CREATE TRIGGER charges_stay BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'charges are final'); END;
CREATE TRIGGER plans_keep BEFORE UPDATE ON plans BEGIN SELECT RAISE(ABORT, 'plans are final'); END;
CREATE TRIGGER plans_stay BEFORE DELETE ON plans BEGIN SELECT RAISE(ABORT, 'plans are final'); END;
"""


@dataclass(frozen=True)
class Target:
    """A budget over everything ever released from a data set."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Round:
    """Which round of which run a charge belongs to, and the code that asks for it."""

    run: str
    number: int
    code: str = ""


class RoundCharge:
    """Permission to release a number of times, already paid for.

    Calling it with an event uses one release up; it raises if the event is not the one that was charged, or nothing is
    left.
    """

    def __init__(self, charge_id: int, event: Event) -> None:
        self.charge_id = charge_id
        self._event = event
        self._left = event.count

    def __call__(self, event: Event) -> None:
        """Use up one release.

        Raises:
            LedgerError: If the event was not charged.
        """
        charged = (self._event.phase, self._event.noise_multiplier, self._event.sampling_probability)
        if (event.phase, event.noise_multiplier, event.sampling_probability) != charged or (self._left < event.count):
            raise LedgerError(f"the ledger was charged for {self._event}, not for {event}: nothing is released")
        self._left -= event.count


class Ledger:
    """The ledger of one data set.

    Args:
        path: SQLite file; made with its folder if it does not exist.
        data_set: Name of the data set, the key of everything below.
        content: Fingerprint of the records, to notice the same records under another name.

    Raises:
        LedgerError: If the file cannot be written, is damaged, was deleted, or comes from a newer version.
    """

    def __init__(self, path: Path | str, data_set: str, content: str) -> None:
        self.path = Path(path)
        self.data_set = data_set
        self._open()
        with self._transaction():
            self._register(content)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

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
        rows = self._all(
            "SELECT phase, noise_multiplier, sampling_probability, count FROM charges "
            "WHERE data_set = ? AND run IS NOT ?",
            self.data_set,
            other_than_run,
        )
        try:
            return merge(Event(*row) for row in rows)
        except ConfigurationError as error:
            raise LedgerError(f"{self.path}: a charge makes no sense ({error}); {_RESTORE}") from error

    def epsilon(self, delta: float) -> float:
        """Epsilon spent so far."""
        return epsilon(self.events(), delta)

    def plan(self, run: str) -> Plan | None:
        """The plan recorded for a run, if there is one."""
        row = self._first("SELECT plan FROM plans WHERE data_set = ? AND run = ?", self.data_set, run)
        if row is None:
            return None
        stored = json.loads(row[0])
        return Plan(Event(**stored["pretraining"]), Event(**stored["training"]))

    def record_plan(self, run: str, plan: Plan, target: Target) -> Plan:
        """Fix the plan of a run; the first one recorded stays, and is returned."""
        with self._transaction():
            self._execute(
                "INSERT OR IGNORE INTO plans VALUES (?, ?, ?, ?, ?, ?)",
                self.data_set,
                run,
                json.dumps(asdict(plan)),
                target.epsilon,
                target.delta,
                time.time(),
            )
        recorded = self.plan(run)
        if recorded is None:  # pragma: no cover
            raise LedgerError(f"{self.path}: a plan that was just written cannot be read; {_RESTORE}")
        return recorded

    def target(self, run: str) -> Target | None:
        """The target that the plan of a run was made for."""
        row = self._first(
            "SELECT target_epsilon, target_delta FROM plans WHERE data_set = ? AND run = ?",
            self.data_set,
            run,
        )
        return Target(*row) if row else None

    def charge(self, round_: Round, event: Event, target: Target) -> RoundCharge:
        """Charge a round before it is computed, or find the charge that a crash left unused.

        Raises:
            BudgetError: If everything charged with this event would exceed the target; nothing is charged.
            MessageError: If the round was charged for another event, was released, or lies in the past.
            LedgerError: If the charge cannot be made durable.
        """
        with self._transaction():
            row = self._first(
                "SELECT c.id, c.phase, c.noise_multiplier, c.sampling_probability, c.count, r.charge FROM charges c "
                "LEFT JOIN releases r ON r.charge = c.id WHERE c.data_set = ? AND c.run = ? AND c.round = ?",
                self.data_set,
                round_.run,
                round_.number,
            )
            if row is not None:
                return self._unused(RoundCharge(row[0], Event(*row[1:5])), event, round_, released=row[5] is not None)
            self._refuse_the_past(round_)
            self._refuse_overspending(event, target)
            values = (event.phase, event.noise_multiplier, event.sampling_probability, event.count)
            cursor = self._execute(
                "INSERT INTO charges (data_set, run, round, phase, noise_multiplier, sampling_probability, count, "
                "code, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(self.data_set, round_.run, round_.number),
                *values,
                *(round_.code, time.time()),
            )
            charge_id = cursor.lastrowid
        return RoundCharge(int(charge_id or 0), event)

    def store_release(self, charge: RoundCharge, payload: bytes, memory: bytes) -> bytes:
        """Keep a release before it leaves; returns the release that counts.

        If another process stored one for the same charge first, that one counts and this one is forgotten unseen.
        """
        with self._transaction():
            stored = self._first("SELECT payload FROM releases WHERE charge = ?", charge.charge_id)
            if stored is not None:
                if stored[0] is None:
                    raise MessageError("this round was released and replaced by a later one", "round-past")
                return bytes(stored[0])
            run = self._one("SELECT run FROM charges WHERE id = ?", charge.charge_id)[0]
            self._execute(
                "UPDATE releases SET payload = NULL, memory = NULL WHERE charge IN "
                "(SELECT id FROM charges WHERE data_set = ? AND run = ?)",
                self.data_set,
                run,
            )
            self._execute("INSERT INTO releases VALUES (?, ?, ?)", charge.charge_id, payload, memory)
        return payload

    def stored_release(self, round_: Round) -> bytes | None:
        """The release of a round, if it is the latest of its run."""
        row = self._first(
            "SELECT r.payload FROM releases r JOIN charges c ON c.id = r.charge "
            "WHERE c.data_set = ? AND c.run = ? AND c.round = ?",
            *(self.data_set, round_.run, round_.number),
        )
        return bytes(row[0]) if row and row[0] is not None else None

    def memory(self, run: str) -> bytes | None:
        """What was stored beside the latest release of a run."""
        row = self._first(
            "SELECT r.memory FROM releases r JOIN charges c ON c.id = r.charge "
            "WHERE c.data_set = ? AND c.run = ? AND r.memory IS NOT NULL",
            *(self.data_set, run),
        )
        return bytes(row[0]) if row else None

    def _unused(self, charge: RoundCharge, event: Event, round_: Round, *, released: bool) -> RoundCharge:
        if released:
            text = f"round {round_.number} was released already, and a later one has replaced it"
            raise MessageError(text, text)
        probe = RoundCharge(charge.charge_id, charge._event)
        probe(event)
        return charge

    def _refuse_the_past(self, round_: Round) -> None:
        latest = self._one(
            "SELECT coalesce(max(round), 0) FROM charges WHERE data_set = ? AND run = ?",
            self.data_set,
            round_.run,
        )[0]
        if round_.number <= latest:
            text = f"round {round_.number} lies in the past: round {latest} was charged already"
            raise MessageError(text, text)

    def _refuse_overspending(self, event: Event, target: Target) -> None:
        events = (*self.events(), event)
        if not fits(events, target.epsilon, target.delta):
            text = (
                f"the privacy budget does not allow this round: epsilon would be {epsilon(events, target.delta):.4f} "
                f"of {target.epsilon:g} at delta {target.delta:g}"
            )
            raise BudgetError(text, text)

    def _register(self, content: str) -> None:
        known = self._first("SELECT name FROM data_sets WHERE content = ? AND name != ?", content, self.data_set)
        if known is not None:
            raise LedgerError(
                f"{self.path}: these very records are known as data set {known[0]!r}, not {self.data_set!r}; one data "
                f"set has one budget: use the name {known[0]!r}"
            )
        self._execute(
            "INSERT OR IGNORE INTO data_sets VALUES (?, ?, ?, ?)",
            *(self.data_set, str(uuid.uuid4()), content, time.time()),
        )

    def _open(self) -> None:
        marker = self.path.with_name(self.path.name + ".known")
        if marker.exists() and not self.path.exists():
            raise LedgerError(
                f"{self.path}: the ledger was here and is gone; restore it from a backup. Only if nothing was ever "
                f"released from its data, delete {marker} to start afresh"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            if not os.access(self.path, os.W_OK) or not os.access(self.path.parent, os.W_OK):
                raise LedgerError(f"{self.path}: the ledger is not writable; {_WRITABLE}")
            self._execute("PRAGMA synchronous = EXTRA")
            self._execute("PRAGMA foreign_keys = ON")
            self._check_or_create()
            marker.touch()
        except OSError as error:
            raise LedgerError(f"{self.path}: the ledger cannot be opened ({error}); {_WRITABLE}") from error
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _check_or_create(self) -> None:
        if self._one("PRAGMA quick_check")[0] != "ok":
            raise LedgerError(f"{self.path}: the ledger is damaged; {_RESTORE}")
        version = int(self._one("PRAGMA user_version")[0])
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path}: the ledger has version {version}, this software knows up to {SCHEMA_VERSION}; "
                "update the software"
            )
        if version == 0:
            with self._transaction():
                if self._one("PRAGMA user_version")[0] == 0:  # nobody else was faster
                    for statement in _statements(_SCHEMA):
                        self._execute(statement)
                    self._execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the write lock from the first look to the commit; anything that raises leaves no trace."""
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _one(self, statement: str, *values: object) -> tuple[Any, ...]:
        row = self._first(statement, *values)
        if row is None:
            raise LedgerError(f"{self.path}: a row is missing; {_RESTORE}")
        return row

    def _first(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._execute(statement, *values).fetchone()
        return row

    def _all(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._execute(statement, *values).fetchall()

    def _error(self, error: sqlite3.Error) -> LedgerError:
        text = str(error)
        if "locked" in text:
            remedy = "another process is using it; wait for it to end"
        elif "readonly" in text or "unable to open" in text or "full" in text:
            remedy = _WRITABLE
        else:
            remedy = _RESTORE
        return LedgerError(f"{self.path}: {text}; {remedy}")


_RESTORE = "stop, keep the file, and restore a backup that is known to hold every charge"
_WRITABLE = "give this user write access to the file and its folder, and free disk space"


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
