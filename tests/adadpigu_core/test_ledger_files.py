"""The file of a ledger: who may read and write it, what is final in it, and what becomes of one that is damaged."""

import os
import shutil
import sqlite3
import stat
import tempfile
from pathlib import Path

import pytest

from adadpigu_core import ledger_file as ledger_module
from adadpigu_core.accounting import TRAINING, Event, PlanShape, calibrate
from adadpigu_core.exceptions import LedgerError
from adadpigu_core.ledger import Ledger, Round, Target

# Without sampling, accounting takes milliseconds.
EVENT = Event(TRAINING, 10.0, 1.0, 5)
TARGET = Target(4.0, 1e-5)
PLAN = calibrate(PlanShape(1.0, 2, 20, 0.1), TARGET.epsilon, TARGET.delta)


def administrator(path, *statements):
    """Do to the file what a person with the sqlite3 command could do."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return [connection.execute(statement).fetchall() for statement in statements]
    finally:
        connection.close()


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


def test_a_row_tells_the_history(ledger, path):
    ledger.charge(Round("run", 7, code="1.2.3"), EVENT, TARGET)
    [[row]] = administrator(path, "SELECT data_set, run, round, phase, noise_multiplier, count, code FROM charges")
    assert row == ("site", "run", 7, TRAINING, 10.0, 5, "1.2.3")


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
def test_rows_are_final(ledger, path, statement, release):
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


def test_a_crash_while_the_ledger_is_made_does_not_lock_anybody_out(path, release, counts):
    path.touch()  # made, but nothing committed; the marker comes later
    with Ledger(path, "site", "content") as ledger:
        release(ledger, 1)
    path.with_name(path.name + ".known").unlink()  # committed, but the marker was not made
    with Ledger(path, "site", "content") as ledger:
        assert counts(ledger) == 5
    assert path.with_name(path.name + ".known").exists()


def test_a_ledger_can_be_restored(used, tmp_path, counts):
    backup = tmp_path / "backup"
    shutil.copy(used, backup)
    used.unlink()
    shutil.copy(backup, used)
    with Ledger(used, "site", "content") as ledger:
        assert counts(ledger) == 5


def test_a_ledger_that_vanishes_while_in_use_takes_no_charges(ledger, path, release, counts):
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
def test_a_charge_that_makes_no_sense_stops_everything(used, values, release):
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


def test_a_ledger_in_wal_mode_is_brought_back(used, release, counts):
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


def test_read_only_media_are_refused(used, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **rest: connect(name.replace("=rw", "=ro"), **rest))
    refused(used, "readonly database; give this user write access")


def test_a_file_without_write_permission_is_refused(spawn, release):
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


def test_a_full_disk_stops_the_client_and_loses_nothing(ledger, release, counts):
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


def test_a_commit_that_fails_charges_nothing(ledger, monkeypatch, release):
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


def test_replaced_releases_do_not_pile_up(used, release):
    with Ledger(used, "site", "content") as ledger:
        for number in range(2, 12):
            release(ledger, number, os.urandom(10**5))
    assert used.stat().st_size < 3 * 10**5
