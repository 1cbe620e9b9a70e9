import json
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adadpigu_core import ledger as ledger_module
from adadpigu_core.accounting import PRETRAINING, TRAINING, Event, PlanShape, calibrate, epsilon, fits
from adadpigu_core.exceptions import BudgetError, ConfigurationError, LedgerError, MessageError
from adadpigu_core.ledger import Ledger, Round, Target

# Without sampling, accounting takes milliseconds.
EVENT = Event(TRAINING, 10.0, 1.0, 5)
TARGET = Target(4.0, 1e-5)
PLAN = calibrate(PlanShape(1.0, 2, 20, 0.1), TARGET.epsilon, TARGET.delta)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path, "site", "content") as opened:
        yield opened


def administrator(path, *statements):
    """Do to the file what a person with the sqlite3 command could do."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return [connection.execute(statement).fetchall() for statement in statements]
    finally:
        connection.close()


def counts(ledger):
    return sum(event.count for event in ledger.events())


def release(ledger, number, payload=None, run="run"):
    """A whole round, as a client does it."""
    charge = ledger.charge(Round(run, number), EVENT, TARGET)
    return ledger.store_release(charge, payload or f"release {number}".encode(), f"memory {number}".encode())


# --- what a ledger remembers ------------------------------------------------------------------------------------------


def test_a_new_ledger_is_empty(ledger):
    assert ledger.events() == ()
    assert ledger.epsilon(1e-5) == 0
    assert ledger.plan("run") is None
    assert ledger.target("run") is None
    assert ledger.memory("run") is None
    assert ledger.stored_release(Round("run", 1)) is None


def test_everything_survives_being_closed(path):
    with Ledger(path, "site", "content") as ledger:
        identity = ledger.id
        ledger.record_plan("run", PLAN, TARGET)
        release(ledger, 1)
    with Ledger(path, "site", "content") as ledger:
        assert ledger.id == identity
        assert ledger.events() == (EVENT,)
        assert ledger.plan("run") == PLAN
        assert ledger.target("run") == TARGET
        assert ledger.stored_release(Round("run", 1)) == b"release 1"
        assert ledger.memory("run") == b"memory 1"


def test_epsilon_composes_all_runs_and_phases(ledger):
    other = Event(PRETRAINING, 20.0, 1.0, 3)
    ledger.charge(Round("first", 1), EVENT, TARGET)
    ledger.charge(Round("second", 1), other, TARGET)
    ledger.charge(Round("second", 2), EVENT, TARGET)
    assert ledger.events() == (other, replace(EVENT, count=10))
    assert ledger.events(other_than_run="second") == (EVENT,)
    assert ledger.events(other_than_run="third") == ledger.events()
    assert ledger.epsilon(1e-5) == epsilon(ledger.events(), 1e-5)


def test_a_row_tells_the_history(ledger, path):
    ledger.charge(Round("run", 7, code="1.2.3"), EVENT, TARGET)
    [[row]] = administrator(path, "SELECT data_set, run, round, phase, noise_multiplier, count, code FROM charges")
    assert row == ("site", "run", 7, TRAINING, 10.0, 5, "1.2.3")


def test_data_sets_in_one_file_are_apart(path):
    with Ledger(path, "site", "content") as one, Ledger(path, "other", "other content") as two:
        charge = one.charge(Round("run", 1), EVENT, TARGET)
        assert one.id != two.id
        assert two.events() == ()
        two.charge(Round("run", 1), EVENT, TARGET)
        assert counts(one) == counts(two) == 5
        with pytest.raises(LedgerError):  # a charge of one data set pays for nothing of another
            two.store_release(charge, b"payload", b"")
        assert one.store_release(charge, b"payload", b"") == b"payload"
        assert two.stored_release(Round("run", 1)) is None


def test_a_path_may_be_a_string_with_any_characters(tmp_path):
    path = tmp_path / "a folder" / "100%?#&;" / "ledger é.sqlite"
    with Ledger(str(path), "site", "content") as ledger:
        release(ledger, 1)
    assert path.is_file()
    with Ledger(path, "site", "content") as ledger:
        assert counts(ledger) == 5


# --- records and names ------------------------------------------------------------------------------------------------


def test_records_that_were_added_go_on_with_the_same_budget(path):
    with Ledger(path, "site", "content") as ledger:
        release(ledger, 1)
        identity = ledger.id
    with Ledger(path, "site", "content and more") as ledger:
        assert counts(ledger) == 5
        assert ledger.id == identity


@pytest.mark.parametrize("content", ["content", "content and more"])
def test_the_same_records_under_another_name_are_noticed(path, content):
    Ledger(path, "site", "content").close()
    Ledger(path, "site", "content and more").close()
    with pytest.raises(LedgerError, match=r"known as data set 'site', not 'fresh'.*use the name 'site'"):
        Ledger(path, "fresh", content)
    Ledger(path, "fresh", "something else").close()


# --- plans ------------------------------------------------------------------------------------------------------------


def test_the_first_plan_of_a_run_stays(ledger):
    other = calibrate(PlanShape(1.0, 0, 5, 0.1), 1.0, 1e-5)
    assert ledger.record_plan("run", PLAN, TARGET) == PLAN
    assert ledger.record_plan("run", other, Target(1.0, 1e-5)) == PLAN
    assert ledger.target("run") == TARGET
    assert ledger.record_plan("other run", other, Target(1.0, 1e-5)) == other


@pytest.mark.parametrize(
    "values", [(math.nan, 1e-5), (0.0, 1e-5), (-1.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)]
)
def test_a_target_must_be_one(values):
    with pytest.raises(ConfigurationError, match="target"):
        Target(*values)


# --- charging ---------------------------------------------------------------------------------------------------------


def test_a_charge_is_on_the_disk_before_anything_is_computed(ledger, path):
    ledger.charge(Round("run", 1), EVENT, TARGET)
    with Ledger(path, "site", "content") as another:
        assert another.events() == (EVENT,)


def test_a_charge_pays_for_its_event_only_and_as_often_as_charged(ledger):
    charge = ledger.charge(Round("run", 1), EVENT, TARGET)
    one = replace(EVENT, count=1)
    for other in (
        replace(one, noise_multiplier=9.0),
        replace(one, sampling_probability=0.5),
        replace(one, phase=PRETRAINING),
        replace(EVENT, count=6),
    ):
        with pytest.raises(LedgerError, match="nothing is released"):
            charge(other)
    charge(replace(EVENT, count=3))
    charge(one)
    charge(one)
    with pytest.raises(LedgerError, match="nothing is released"):
        charge(one)


def charge_until_refused(ledger, rounds):
    for charged, round_ in enumerate(rounds):
        try:
            ledger.charge(round_, EVENT, TARGET)
        except BudgetError as error:
            return charged, error
    raise AssertionError("never refused")


def test_a_round_beyond_the_budget_is_refused_and_leaves_no_trace(ledger):
    charged, error = charge_until_refused(ledger, [Round("run", number) for number in range(1, 1000)])
    assert "does not allow this round: epsilon would be" in str(error)
    assert error.public_message == str(error)
    assert counts(ledger) == 5 * charged > 0
    assert fits(ledger.events(), TARGET.epsilon, TARGET.delta)
    assert not fits((*ledger.events(), EVENT), TARGET.epsilon, TARGET.delta)
    ledger.charge(Round("run", charged + 1), EVENT, Target(math.inf, 1e-5))  # its owner may go on


def test_all_runs_share_the_budget(ledger):
    charge_until_refused(ledger, [Round(str(run), 1) for run in range(1000)])
    with pytest.raises(BudgetError):
        ledger.charge(Round("new", 1), EVENT, TARGET)
    assert 0 < ledger.epsilon(TARGET.delta) <= TARGET.epsilon


def test_a_whole_plan_can_be_charged(ledger):
    ledger.record_plan("run", PLAN, TARGET)
    steps = [replace(event, count=1) for event in PLAN.events for _ in range(event.count)]
    for number, event in enumerate(steps, start=1):
        ledger.charge(Round("run", number), event, TARGET)
    with pytest.raises(BudgetError):
        ledger.charge(Round("run", len(steps) + 1), steps[-1], TARGET)


def test_a_round_is_charged_once(ledger):
    first = ledger.charge(Round("run", 1), EVENT, TARGET)
    again = ledger.charge(Round("run", 1), EVENT, TARGET)
    assert again.charge_id == first.charge_id
    assert counts(ledger) == 5
    again(EVENT)


@pytest.mark.parametrize("changes", [{"count": 4}, {"count": 6}, {"noise_multiplier": 11.0}, {"phase": PRETRAINING}])
def test_a_charged_round_cannot_become_another(ledger, changes):
    ledger.charge(Round("run", 1), EVENT, TARGET)
    with pytest.raises(MessageError, match="round 1 was charged for"):
        ledger.charge(Round("run", 1), replace(EVENT, **changes), TARGET)
    assert ledger.events() == (EVENT,)


def test_rounds_may_be_skipped_but_not_made_up_for(ledger):
    ledger.charge(Round("run", 5), EVENT, TARGET)
    with pytest.raises(MessageError, match="round 4 lies in the past: round 5 was charged already"):
        ledger.charge(Round("run", 4), EVENT, TARGET)
    ledger.charge(Round("another run", 4), EVENT, TARGET)


@pytest.mark.parametrize("number", [0, -1, 2**31, 2**70, 1.0, math.nan])
def test_a_round_number_must_be_one(number):
    with pytest.raises(MessageError, match="round"):
        Round("run", number)


def test_a_charge_for_nothing_is_refused(ledger):
    with pytest.raises(ConfigurationError, match="count"):
        ledger.charge(Round("run", 1), replace(EVENT, count=0), TARGET)


# --- releases ---------------------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_same_release(ledger):
    assert release(ledger, 1) == b"release 1"
    assert ledger.stored_release(Round("run", 1)) == b"release 1"
    assert release(ledger, 1, b"a second draw") == b"release 1"
    assert counts(ledger) == 5


def test_an_empty_release_is_a_release(ledger):
    charge = ledger.charge(Round("run", 1), EVENT, TARGET)
    assert ledger.store_release(charge, b"", b"") == b""
    assert ledger.store_release(charge, b"a second draw", b"later") == b""
    assert ledger.stored_release(Round("run", 1)) == b""
    assert ledger.memory("run") == b""


def test_a_later_release_replaces_the_earlier_for_good(ledger):
    old = ledger.charge(Round("run", 1), EVENT, TARGET)
    ledger.store_release(old, b"old", b"old memory")
    release(ledger, 2)
    assert ledger.stored_release(Round("run", 1)) is None
    assert ledger.memory("run") == b"memory 2"
    with pytest.raises(MessageError, match="round 1 lies in the past"):
        ledger.store_release(old, b"old again", b"old memory")
    with pytest.raises(MessageError, match="round 1 lies in the past"):
        ledger.charge(Round("run", 1), EVENT, TARGET)
    assert ledger.stored_release(Round("run", 1)) is None
    assert ledger.stored_release(Round("run", 2)) == b"release 2"
    assert ledger.memory("run") == b"memory 2"


def test_the_release_of_a_round_can_be_had_until_the_next_one_is_released(ledger):
    release(ledger, 1)
    ledger.charge(Round("run", 2), EVENT, TARGET)
    assert ledger.stored_release(Round("run", 1)) == b"release 1"
    assert ledger.memory("run") == b"memory 1"


def test_a_round_that_is_still_computed_when_a_later_one_is_charged_is_lost(ledger):
    slow = ledger.charge(Round("run", 1), EVENT, TARGET)
    fast = ledger.charge(Round("run", 2), EVENT, TARGET)
    for _ in range(2):  # before and after the later round is released
        with pytest.raises(MessageError, match="round 1 lies in the past: round 2 was charged already"):
            ledger.store_release(slow, b"late", b"")
        assert ledger.store_release(fast, b"in time", b"") == b"in time"
    assert ledger.stored_release(Round("run", 1)) is None


def test_runs_keep_their_releases_apart(ledger):
    release(ledger, 1, b"one", run="first")
    release(ledger, 1, b"two", run="second")
    assert ledger.stored_release(Round("first", 1)) == b"one"
    assert ledger.stored_release(Round("second", 1)) == b"two"


# --- two processes on one round, step by step -------------------------------------------------------------------------


@pytest.mark.parametrize("charge_late", [False, True])
@pytest.mark.parametrize("winner", [0, 1])
def test_the_loser_of_a_race_gets_the_release_of_the_winner(path, winner, charge_late):
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

PRELUDE = """
import json, os, signal, time
from adadpigu_core.accounting import Event, TRAINING
from adadpigu_core.exceptions import BudgetError, MessageError
from adadpigu_core.ledger import Ledger, Round, Target
EVENT, TARGET = Event(TRAINING, 10.0, 1.0, 5), Target(4.0, 1e-5)
"""


@pytest.fixture(scope="module")
def spawn():
    """Start processes that share nothing with this one; the fork server imports only once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adadpigu_core.ledger"])

    def start(code, **arguments):
        process = context.Process(target=exec, args=(PRELUDE + code, arguments))
        process.start()
        return process

    return start


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


def test_processes_that_race_agree_on_everything(spawn, path, tmp_path):
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
def test_a_killed_client_never_spends_less_than_it_released(spawn, path, tmp_path, stage, when, at, charged):
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


# --- the file ---------------------------------------------------------------------------------------------------------


def refused(path, match, data_set="site"):
    """Open, expect an error, and check that its advice never costs anybody their ledger."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError, match=match) as caught:
        Ledger(path, data_set, "content")
    text = str(caught.value)
    assert str(path) in text
    assert caught.value.public_message == ""
    assert "delete" not in text or "Only if nothing was ever released" in text or "moved or deleted" in text
    assert (path.read_bytes() if path.is_file() else None) == before
    return text


@pytest.fixture
def used(path):
    """The path of a ledger that knows a release."""
    with Ledger(path, "site", "content") as ledger:
        release(ledger, 1)
    return path


def test_only_the_owner_can_read_the_ledger(tmp_path):
    path = tmp_path / "new" / "folders" / "ledger.sqlite"
    with Ledger(path, "site", "content") as ledger, ledger._transaction():
        ledger._execute("INSERT INTO plans VALUES ('site', 'run', '', 1, 1, 1)")
        files = sorted(path.parent.iterdir())
        assert [file.name for file in files] == ["ledger.sqlite", "ledger.sqlite-journal", "ledger.sqlite.known"]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_commits_are_durable(ledger):
    # EXTRA: without it, a power failure after the commit may bring the journal back, and undo the charge
    assert ledger._one("PRAGMA synchronous") == (3,)
    assert ledger._one("PRAGMA journal_mode") == ("delete",)
    assert ledger._one("PRAGMA foreign_keys") == (1,)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE charges SET count = 0",
        "UPDATE charges SET noise_multiplier = 1000",
        "DELETE FROM charges",
        "UPDATE plans SET target_epsilon = 100",
        "DELETE FROM plans",
        "UPDATE data_sets SET name = 'fresh'",
        "DELETE FROM data_sets",
        "UPDATE contents SET data_set = 'fresh'",
        "DELETE FROM contents",
        "UPDATE releases SET payload = x'00'",
        "UPDATE releases SET charge = 7, payload = NULL, memory = NULL",
        "DELETE FROM releases",
    ],
)
def test_rows_are_final(ledger, path, statement):
    ledger.record_plan("run", PLAN, TARGET)
    release(ledger, 1)
    with pytest.raises(sqlite3.IntegrityError, match="final"):
        administrator(path, statement)
    assert ledger.events() == (EVENT,)
    assert ledger.stored_release(Round("run", 1)) == b"release 1"


def test_a_deleted_ledger_is_missed(used):
    used.unlink()
    text = refused(used, "was here and is gone")
    assert "restore it from a backup" in text
    assert not used.exists()
    marker = used.with_name(used.name + ".known")
    assert str(marker) in text
    marker.unlink()  # what the message says for the case that nothing was released
    with Ledger(used, "site", "content") as ledger:
        assert ledger.events() == ()


def test_an_emptied_ledger_is_missed(used):
    used.write_bytes(b"")
    refused(used, "was here and is gone or empty")


def test_a_crash_while_the_ledger_is_made_does_not_lock_anybody_out(path):
    path.touch()  # made, but nothing committed; the marker comes later
    with Ledger(path, "site", "content") as ledger:
        release(ledger, 1)
    path.with_name(path.name + ".known").unlink()  # committed, but the marker was not made
    with Ledger(path, "site", "content") as ledger:
        assert counts(ledger) == 5
    assert path.with_name(path.name + ".known").exists()


def test_a_ledger_can_be_restored(used, tmp_path):
    backup = tmp_path / "backup"
    shutil.copy(used, backup)
    used.unlink()
    shutil.copy(backup, used)
    with Ledger(used, "site", "content") as ledger:
        assert counts(ledger) == 5


def test_a_ledger_that_vanishes_while_in_use_takes_no_charges(ledger, path):
    release(ledger, 1)
    path.rename(path.with_suffix(".moved"))
    with pytest.raises(LedgerError, match="moved or deleted while in use"):
        ledger.charge(Round("run", 2), EVENT, TARGET)
    path.with_suffix(".moved").rename(path)
    assert counts(ledger) == 5


@pytest.mark.parametrize("size", [2, 16, 100, 512, 4096, 3 * 4096, -4096, -1])
@pytest.mark.parametrize("known", [True, False])
def test_a_truncated_ledger_is_refused(used, size, known):
    content = used.read_bytes()
    used.write_bytes(content[:size])
    if not known:
        used.with_name(used.name + ".known").unlink()
    refused(used, "restore")


@pytest.mark.parametrize("pages", [(0,), (1,), (2, 3), (5,)])
def test_a_ledger_with_overwritten_pages_is_refused(used, pages):
    content = bytearray(used.read_bytes())
    for page in pages:
        content[page * 4096 : page * 4096 + 4096] = bytes([0x5A]) * 4096
    used.write_bytes(content)
    refused(used, "restore")


def test_a_file_of_zeros_is_refused(path):
    path.write_bytes(bytes(8192))
    refused(path, "not a ledger")


@pytest.mark.parametrize("text", ["noise_multiplier = 1.0\n", "epsilon,delta\n" * 1000])
def test_a_text_file_is_refused(path, text):
    path.write_text(text)
    refused(path, "not a ledger: correct the path")


def test_another_sqlite_file_is_refused_and_left_alone(path):
    administrator(path, "CREATE TABLE songs (title TEXT)")
    refused(path, "not a ledger: correct the path")
    administrator(path, f"PRAGMA user_version = {ledger_module.SCHEMA_VERSION}", "PRAGMA journal_mode = WAL")
    refused(path, "not a ledger: correct the path")
    assert administrator(path, "PRAGMA journal_mode") == [[("wal",)]]


def test_a_folder_is_refused(path):
    path.mkdir()
    refused(path, "no file; it is not a ledger: correct the path")


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "ledger.sqlite", "write access")


def test_a_newer_ledger_asks_for_newer_software(used):
    administrator(used, "PRAGMA user_version = 2")
    refused(used, "version 2, this software knows version 1; update the software, and keep the file")


@pytest.mark.parametrize(
    "statements",
    [
        ("DROP TRIGGER charges_DELETE",),
        ("DROP TABLE contents",),
        ("DROP TRIGGER charges_DELETE", "DELETE FROM charges"),
    ],
)
def test_an_altered_ledger_is_refused(used, statements):
    administrator(used, *statements)
    refused(used, "damaged, or was altered; stop, keep the file")


def test_charges_that_are_missing_are_noticed(used):
    [[trigger]] = administrator(used, "SELECT sql FROM sqlite_master WHERE name = 'charges_DELETE'")
    administrator(used, "DROP TRIGGER charges_DELETE", "DELETE FROM charges", trigger[0])
    refused(used, "damaged, or was altered; stop, keep the file")


@pytest.mark.parametrize(
    "values", ["'nonsense', 1.0, 0.1, 1", "'training', -1.0, 0.1, 1", "'training', 'much', 0.1, 1"]
)
def test_a_charge_that_makes_no_sense_stops_everything(used, values):
    columns = "data_set, run, round, phase, noise_multiplier, sampling_probability, count, code, time"
    administrator(used, f"INSERT INTO charges ({columns}) VALUES ('site', 'run', 2, {values}, '', 0)")
    with Ledger(used, "site", "content") as ledger:
        for call in (
            ledger.events,
            lambda: ledger.epsilon(1e-5),
            lambda: release(ledger, 2),
            lambda: release(ledger, 3),
        ):
            with pytest.raises(LedgerError, match=r"makes no sense.*restore a backup"):
                call()


@pytest.mark.parametrize("plan", ["", "{}", "[]", "null", '{"pretraining": {}, "training": {"noise": 1}}'])
def test_a_plan_that_makes_no_sense_stops_everything(used, plan):
    administrator(used, f"INSERT INTO plans VALUES ('site', 'run', '{plan}', 1, 1, 0)")
    with Ledger(used, "site", "content") as ledger:
        for call in (ledger.plan, ledger.target, lambda run: ledger.record_plan(run, PLAN, TARGET)):
            with pytest.raises(LedgerError, match=r"makes no sense.*restore a backup"):
                call("run")


def test_a_ledger_in_wal_mode_is_brought_back(used):
    assert administrator(used, "PRAGMA journal_mode = WAL") == [[("wal",)]]
    with Ledger(used, "site", "content") as ledger:
        assert ledger._one("PRAGMA journal_mode") == ("delete",)
        assert counts(ledger) == 5
        release(ledger, 2)
    assert sorted(file.name for file in used.parent.iterdir()) == ["ledger.sqlite", "ledger.sqlite.known"]


def test_what_a_write_ahead_log_still_holds_is_not_lost(used, tmp_path):
    connection = sqlite3.connect(used, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("INSERT INTO data_sets VALUES ('in the log', 'id', 0)")
    crashed = tmp_path / "crashed" / "ledger.sqlite"
    crashed.parent.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{used}{suffix}", f"{crashed}{suffix}")
    connection.close()
    with Ledger(crashed, "in the log", "other content") as ledger:
        assert ledger.id == "id"
        assert ledger._one("PRAGMA journal_mode") == ("delete",)


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
def test_a_ledger_that_stays_locked_is_refused(used, impatient, mode):
    holder = sqlite3.connect(used, isolation_level=None)
    with Ledger(used, "site", "content") as ledger:
        holder.execute(f"BEGIN {mode}")
        for call in (lambda: Ledger(used, "site", "content"), lambda: ledger.charge(Round("run", 2), EVENT, TARGET)):
            with pytest.raises(LedgerError, match="locked; another process is using it; let it finish"):
                call()
        holder.execute("ROLLBACK")
        release(ledger, 2)
    holder.close()


def test_a_lock_that_is_let_go_is_waited_for(used, spawn, tmp_path):
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


def test_read_only_media_are_refused(used, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **rest: connect(name.replace("=rw", "=ro"), **rest))
    refused(used, "readonly database; give this user write access")


def test_a_file_without_write_permission_is_refused(spawn):
    code = """
if os.geteuid() == 0:
    os.setuid(65534)
from adadpigu_core.exceptions import LedgerError
try:
    Ledger(path, "site", "content")
except LedgerError as error:
    os._exit(0 if "readonly database; give this user write access" in str(error) else 1)
os._exit(2)
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        with Ledger(path, "site", "content") as ledger:
            release(ledger, 1)
        path.chmod(0o444)
        os.chmod(folder, 0o555)
        process = spawn(code, path=str(path))
        process.join(60)
        os.chmod(folder, 0o755)
        assert process.exitcode == 0


def test_a_full_disk_stops_the_client_and_loses_nothing(ledger):
    release(ledger, 1)
    charge = ledger.charge(Round("run", 2), EVENT, TARGET)
    (pages,) = ledger._one("PRAGMA page_count")
    ledger._execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match=r"full.*has space"):
        ledger.store_release(charge, bytes(2**20), b"")
    assert ledger.stored_release(Round("run", 1)) == b"release 1"
    assert ledger.memory("run") == b"memory 1"
    assert counts(ledger) == 10
    ledger._execute("PRAGMA max_page_count = 1000000")
    assert ledger.store_release(charge, bytes(2**20), b"") == bytes(2**20)


def test_a_commit_that_fails_charges_nothing(ledger, monkeypatch):
    execute = Ledger._execute

    def failing(self, statement, *values):
        if statement == "COMMIT":
            raise LedgerError("the disk is on fire")
        return execute(self, statement, *values)

    monkeypatch.setattr(Ledger, "_execute", failing)
    with pytest.raises(LedgerError, match="fire"):
        ledger.charge(Round("run", 1), EVENT, TARGET)
    monkeypatch.undo()
    assert ledger.events() == ()
    release(ledger, 1)


def test_a_ledger_used_after_closing_says_so(path):
    ledger = Ledger(path, "site", "content")
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.events()


def test_replaced_releases_do_not_pile_up(used):
    with Ledger(used, "site", "content") as ledger:
        for number in range(2, 12):
            release(ledger, number, os.urandom(10**5))
    assert used.stat().st_size < 3 * 10**5


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
            assert counts(ledger) == sum(event.count for event in self.spent())
            for run in ("a", "b"):
                number, payload, memory = self.stored.get(run, (0, None, None))
                assert ledger.memory(run) == memory
                for asked in range(1, 7):
                    assert ledger.stored_release(Round(run, asked)) == (payload if asked == number else None)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
