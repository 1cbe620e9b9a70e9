"""Several processes on one ledger, or several handles: races, kills, locks, and any sequence of calls."""

import json
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adadpigu_core import ledger_file as ledger_module
from adadpigu_core.accounting import TRAINING, Event, fits
from adadpigu_core.exceptions import BudgetError, LedgerError, MessageError
from adadpigu_core.ledger import Ledger, Round, Target

# Without sampling, accounting takes milliseconds.
EVENT = Event(TRAINING, 10.0, 1.0, 5)
TARGET = Target(4.0, 1e-5)


# --- two processes on one round, step by step -------------------------------------------------------------------------


@pytest.mark.parametrize("charge_late", [False, True])
@pytest.mark.parametrize("winner", [0, 1])
def test_the_loser_of_a_race_gets_the_release_of_the_winner(path, winner, charge_late, counts):
    with Ledger(path, "site", "content") as first, Ledger(path, "site", "content") as second:
        fast, slow = (first, second) if winner == 0 else (second, first)
        round_ = Round("run", 1)
        paid = fast.charge(round_, EVENT, TARGET)
        paid_too = None if charge_late else slow.charge(round_, EVENT, TARGET)
        assert fast.store_release(paid, b"winner", b"its memory") == b"winner"
        paid_too = paid_too or slow.charge(round_, EVENT, TARGET)
        assert slow.store_release(paid_too, b"loser", b"lost memory") == b"winner"
        for ledger in (first, second):
            assert ledger.stored_release(round_) == b"winner"
            assert ledger.memory("run") == b"its memory"
            assert counts(ledger) == 5


# --- processes --------------------------------------------------------------------------------------------------------

RACE = """
name = str(number)
while not os.path.exists(go):
    time.sleep(0.001)
seen = {}
with Ledger(path, "site", "content") as ledger:
    from adadpigu_core.accounting import Plan
    event = Event(TRAINING, 10.0 + number, 1.0, 5)
    seen["plan"] = str(ledger.record_plan("run", Plan(Event("pretraining", 10.0, 1.0, 0), event), TARGET))
    for round_ in range(1, 9):
        try:
            charge = ledger.charge(Round("run", round_), EVENT, TARGET)
            seen[round_] = ledger.store_release(charge, f"{round_} by {name}".encode(), b"").decode()
        except MessageError as error:  # the others are ahead
            assert "lies in the past" in str(error)
    seen["own"] = 0
    try:
        while True:
            ledger.charge(Round(name, seen["own"] + 1), EVENT, TARGET)
            seen["own"] += 1
    except BudgetError:
        pass
with open(out, "w") as file:
    json.dump(seen, file)
"""


def test_processes_that_race_agree_on_everything(spawn, path, tmp_path, counts):
    # from the creation of the file on: plans, rounds, and who gets what is left of the budget
    go, outs = tmp_path / "go", [tmp_path / f"{number}.json" for number in range(4)]
    processes = [
        spawn(RACE, path=str(path), go=str(go), number=number, out=str(out)) for number, out in enumerate(outs)
    ]
    go.touch()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    seen = [json.loads(out.read_text()) for out in outs]
    assert len({one["plan"] for one in seen}) == 1
    for number in range(1, 9):
        assert len({one[str(number)] for one in seen if str(number) in one}) == 1
    with Ledger(path, "site", "content") as ledger:
        assert counts(ledger) == 5 * (8 + sum(one["own"] for one in seen))
        assert fits(ledger.events(), TARGET.epsilon, TARGET.delta)
        assert not fits((*ledger.events(), EVENT), TARGET.epsilon, TARGET.delta)


CLIENT = """
execute = Ledger._execute
def dying(self, statement, *values):
    if armed and when == "before" and statement.startswith(at):
        os.kill(os.getpid(), signal.SIGKILL)
    cursor = execute(self, statement, *values)
    if armed and when == "after" and statement.startswith(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return cursor
Ledger._execute = dying
armed = stage == "open"
with Ledger(path, "site", "content") as ledger:
    armed = stage == "charge"
    charge = ledger.charge(Round("run", 2), EVENT, TARGET)
    charge(EVENT)
    armed = stage == "store"
    payload = ledger.store_release(charge, payload, b"memory 2")
    with open(sent, "wb") as file:  # what has left
        file.write(payload)
    armed = stage == "sent"
    ledger.events()
"""


@pytest.mark.parametrize(
    ("stage", "when", "at", "charged"),
    [
        ("open", "after", "INSERT OR IGNORE INTO contents", False),
        ("charge", "after", "BEGIN", False),
        ("charge", "after", "INSERT INTO charges", False),
        ("charge", "before", "COMMIT", False),
        ("charge", "after", "COMMIT", True),
        ("store", "before", "BEGIN", True),
        ("store", "after", "UPDATE releases", True),
        ("store", "after", "INSERT INTO releases", True),
        ("store", "before", "COMMIT", True),
        ("store", "after", "COMMIT", True),
        ("sent", "before", "SELECT", True),
    ],
)
def test_a_killed_client_never_spends_less_than_it_released(
    spawn, path, tmp_path, stage, when, at, charged, release, counts
):
    with Ledger(path, "site", "content") as ledger:
        release(ledger, 1)
    sent = tmp_path / "sent"
    large = os.urandom(2**23)  # does not fit into SQLite's cache: the file is written to before the commit
    process = spawn(CLIENT, path=str(path), sent=str(sent), payload=large, stage=stage, when=when, at=at)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if (stage, when, at) == ("store", "before", "COMMIT"):
        assert Path(f"{path}-journal").stat().st_size > 0  # there is something to roll back
    with Ledger(path, "site", "content") as ledger:
        assert counts(ledger) == (10 if charged else 5)
        stored = ledger.stored_release(Round("run", 2))
        assert stored == (
            large if (stage, when, at) in (("store", "after", "COMMIT"), ("sent", "before", "SELECT")) else None
        )
        if sent.exists():
            assert stored == sent.read_bytes()
        if stored is None:
            assert ledger.stored_release(Round("run", 1)) == b"release 1"
            assert ledger.memory("run") == b"memory 1"
        # the next attempt goes on under the same charge
        charge = ledger.charge(Round("run", 2), EVENT, TARGET)
        assert ledger.store_release(charge, b"next attempt", b"") == (stored or b"next attempt")
        assert counts(ledger) == 10


def test_a_process_must_not_inherit_a_ledger(ledger, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(LedgerError, match="fork"):
        ledger.charge(Round("run", 1), EVENT, TARGET)
    monkeypatch.undo()
    assert ledger.events() == ()


# --- locks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(ledger_module, "_BUSY_SECONDS", 0.05)


def test_a_ledger_held_in_wal_mode_is_refused(used, impatient):
    connection = sqlite3.connect(used, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("SELECT * FROM charges").fetchall()
    with pytest.raises(LedgerError, match="another process is using it"):
        Ledger(used, "site", "content")
    connection.close()
    Ledger(used, "site", "content").close()


@pytest.mark.parametrize("mode", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_ledger_that_stays_locked_is_refused(used, impatient, mode, release):
    holder = sqlite3.connect(used, isolation_level=None)
    with Ledger(used, "site", "content") as ledger:
        holder.execute(f"BEGIN {mode}")
        for call in (lambda: Ledger(used, "site", "content"), lambda: ledger.charge(Round("run", 2), EVENT, TARGET)):
            with pytest.raises(LedgerError, match="locked; another process is using it; let it finish"):
                call()
        holder.execute("ROLLBACK")
        release(ledger, 2)
    holder.close()


def test_a_lock_that_is_let_go_is_waited_for(used, spawn, tmp_path, release, counts):
    code = """
with Ledger(path, "site", "content") as ledger, ledger._transaction():
    open(held, "w").close()
    time.sleep(0.5)
"""
    held = tmp_path / "held"
    process = spawn(code, path=str(used), held=str(held))
    with Ledger(used, "site", "content") as ledger:
        while process.is_alive() and not held.exists():
            time.sleep(0.01)
        release(ledger, 2)
        assert counts(ledger) == 10
    process.join(60)
    assert process.exitcode == 0


# --- any sequence of operations ---------------------------------------------------------------------------------------


class AnySequence(RuleBasedStateMachine):
    """Two handles on one file, against a model of a few lines."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.path = Path(self.folder) / "ledger.sqlite"
        self.ledgers = [Ledger(self.path, "site", "content") for _ in range(2)]
        self.charged = {}  # run -> {round: event}
        self.stored = {}  # run -> (round, payload, memory)
        self.charges = []  # what was handed out, and for which run and round

    def teardown(self):
        for ledger in self.ledgers:
            ledger.close()
        shutil.rmtree(self.folder)

    def spent(self):
        return [event for rounds in self.charged.values() for event in rounds.values()]

    runs, who = st.sampled_from(["a", "b"]), st.integers(0, 1)

    @rule(who=who, run=runs, number=st.integers(1, 6), count=st.sampled_from([5, 5, 5, 20]))
    def charge(self, who, run, number, count):
        event, rounds = replace(EVENT, count=count), self.charged.setdefault(run, {})
        latest = max(rounds, default=0)
        if number < latest or rounds.get(number, event) != event:
            expected = MessageError
        elif number > latest and not fits([*self.spent(), event], TARGET.epsilon, TARGET.delta):
            expected = BudgetError
        else:
            rounds[number] = event
            self.charges.append((self.ledgers[who].charge(Round(run, number), event, TARGET), run, number))
            return
        with pytest.raises(expected):
            self.ledgers[who].charge(Round(run, number), event, TARGET)

    @precondition(lambda self: self.charges)
    @rule(who=who, data=st.data())
    def store(self, who, data):
        charge, run, number = data.draw(st.sampled_from(self.charges))
        payload = data.draw(st.binary(max_size=8))
        stored = self.stored.get(run, (0, b"", b""))
        if stored[0] == number:
            assert self.ledgers[who].store_release(charge, payload, b"other") == stored[1]
        elif number < max(self.charged[run]):
            with pytest.raises(MessageError):
                self.ledgers[who].store_release(charge, payload, b"other")
        else:
            memory = bytes([number])
            assert self.ledgers[who].store_release(charge, payload, memory) == payload
            self.stored[run] = (number, payload, memory)

    @rule(who=who)
    def reopen(self, who):
        self.ledgers[who].close()
        self.ledgers[who] = Ledger(self.path, "site", "content")

    @invariant()
    def agrees(self):
        for ledger in self.ledgers:
            assert sum(event.count for event in ledger.events()) == sum(event.count for event in self.spent())
            for run in ("a", "b"):
                number, payload, memory = self.stored.get(run, (0, None, None))
                assert ledger.memory(run) == memory
                for asked in range(1, 7):
                    assert ledger.stored_release(Round(run, asked)) == (payload if asked == number else None)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
