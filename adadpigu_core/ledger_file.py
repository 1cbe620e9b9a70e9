"""The file of a privacy ledger: opened with care, checked whole, every error explained.

What the rows mean is in ``ledger``. Here is what can be wrong with a file: it is missing though it was known, is no
ledger, is damaged or altered, comes from other software, cannot be written, or is held by another process. Each has a
message that says what to do, because the only safe answer to all of them is to stop.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import ConfigurationError, LedgerError

SCHEMA_VERSION = 1
_APPLICATION = 0x41445047  # "ADPG" in the file's header: this SQLite file is a ledger
_BUSY_SECONDS = 30.0

_SCHEMA = (
    "CREATE TABLE data_sets (name TEXT NOT NULL PRIMARY KEY, id TEXT NOT NULL UNIQUE, time REAL NOT NULL)",
    "CREATE TABLE contents (content TEXT NOT NULL PRIMARY KEY, data_set TEXT NOT NULL REFERENCES data_sets(name), "
    "time REAL NOT NULL)",
    "CREATE TABLE plans (data_set TEXT NOT NULL REFERENCES data_sets(name), run TEXT NOT NULL, plan TEXT NOT NULL, "
    "target_epsilon REAL NOT NULL, target_delta REAL NOT NULL, time REAL NOT NULL, PRIMARY KEY (data_set, run))",
    "CREATE TABLE charges (id INTEGER PRIMARY KEY AUTOINCREMENT, data_set TEXT NOT NULL REFERENCES data_sets(name), "
    "run TEXT NOT NULL, round INTEGER NOT NULL, phase TEXT NOT NULL, noise_multiplier REAL NOT NULL, "
    "sampling_probability REAL NOT NULL, count INTEGER NOT NULL, code TEXT NOT NULL, time REAL NOT NULL, "
    "UNIQUE (data_set, run, round))",
    "CREATE TABLE releases (charge INTEGER PRIMARY KEY REFERENCES charges(id), payload BLOB, memory BLOB)",
    "CREATE VIEW rounds AS SELECT * FROM charges LEFT JOIN releases ON charge = id",
    *(
        f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, '{table} are final'); END"
        for table in ("data_sets", "contents", "plans", "charges")
        for verb in ("UPDATE", "DELETE")
    ),
    "CREATE TRIGGER releases_DELETE BEFORE DELETE ON releases BEGIN SELECT RAISE(ABORT, 'releases are final'); END",
    "CREATE TRIGGER releases_UPDATE BEFORE UPDATE ON releases WHEN NEW.payload IS NOT NULL OR NEW.memory IS NOT NULL "
    "OR NEW.charge IS NOT OLD.charge BEGIN SELECT RAISE(ABORT, 'releases are final'); END",
)
_HEADER = (f"PRAGMA application_id = {_APPLICATION}", f"PRAGMA user_version = {SCHEMA_VERSION}")
_RESTORE = "stop, keep the file, and restore a backup that is known to hold every charge"
_WAIT = "another process is using it; let it finish, or end it, and try again"
_WRITABLE = "give this user write access to the file and its folder, and see to it that the disk works and has space"
_FOREIGN = "it is not a ledger: correct the path; if a ledger was here, restore it from a backup"
_MOVED = "the file was moved or deleted while in use: put it back, or restore a backup that holds every charge"
_DEFECT = "keep the file; this is a defect of the software or of a change to it, please report it"
_REMEDIES = {
    **dict.fromkeys((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED), _WAIT),
    **dict.fromkeys((sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN), _WRITABLE),
    **dict.fromkeys((sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL), _WRITABLE),
    sqlite3.SQLITE_READONLY_DBMOVED: _MOVED,
    sqlite3.SQLITE_CORRUPT: _RESTORE,
    sqlite3.SQLITE_NOTADB: _FOREIGN,
}
NONSENSE = (ConfigurationError, KeyError, TypeError, ValueError)  # what damaged rows may raise when they are read


class LedgerFile:
    """An open ledger file.

    Args:
        path: SQLite file on a local disk.
        create: Whether to make it, with its folder, if it does not exist and never did.

    Raises:
        LedgerError: If it cannot be used, with a remedy.
    """

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        self.path = Path(path)
        self._marker = self.path.with_name(self.path.name + ".known")  # made after the ledger: to be looked at before
        self._process = os.getpid()
        with self._explained():
            if create:
                self._make_file()
            elif not self.path.is_file():
                raise self._absent()
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            self._connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            with self._explained():
                self._prepare(create=create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _absent(self) -> LedgerError:
        if self._marker.exists():
            return self._gone()
        return LedgerError(f"{self.path}: there is no ledger here; correct the path")

    def _make_file(self) -> None:
        """Make an empty file. One that exists is never opened here: to close it would drop this process's locks."""
        if self._marker.exists() and not self.path.exists():
            raise self._gone()
        if self.path.exists() and not self.path.is_file():
            raise LedgerError(f"{self.path}: this is no file; {_FOREIGN}")
        made = [folder for folder in self.path.absolute().parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for folder in made if os.name == "posix" else ():  # the last one, that of the file, is synced by SQLite
            descriptor = os.open(folder.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def _prepare(self, *, create: bool) -> None:
        for setting in ("synchronous = EXTRA", "fullfsync = ON", "foreign_keys = ON"):
            self._execute(f"PRAGMA {setting}")
        if create and self._header() == (0, 0, 0):
            with self._transaction():
                if self._header() == (0, 0, 0):  # no other process was faster
                    if self._marker.exists():
                        raise self._gone()
                    for statement in (*_SCHEMA, *_HEADER):
                        self._execute(statement)
        self._check()
        if create and not self._marker.exists():
            self._marker.touch(0o600)  # each commit syncs the folder, so that this lasts from the first charge on

    def _header(self) -> tuple[int, ...]:
        queries = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        return tuple(int(self._one(query)[0]) for query in queries)

    def _check(self) -> None:
        application, version, _ = self._header()
        if application != _APPLICATION:
            raise LedgerError(f"{self.path}: {_FOREIGN}")
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path}: the ledger has version {version}, this software knows version {SCHEMA_VERSION}; "
                "update the software, and keep the file"
            )
        if self._one("PRAGMA journal_mode = DELETE")[0] != "delete":  # a write-ahead log would be a second file to lose
            raise LedgerError(f"{self.path}: the ledger cannot leave write-ahead mode; {_WAIT}")
        whole = self.path.stat().st_size % self._one("PRAGMA page_size")[0] == 0
        whole = whole and self._one("PRAGMA integrity_check(1)")[0] == "ok"
        whole = whole and {sql for (sql,) in self._all("SELECT sql FROM sqlite_master")} >= set(_SCHEMA)
        gaps = "SELECT coalesce(max(seq), 0) - (SELECT count(*) FROM charges) FROM sqlite_sequence"
        if not whole or self._one(gaps)[0] != 0:
            raise LedgerError(f"{self.path}: the ledger is damaged, or was altered; {_RESTORE}")

    def _gone(self) -> LedgerError:
        return LedgerError(
            f"{self.path}: the ledger was here and is gone or empty; restore it from a backup that holds every charge. "
            f"Only if nothing was ever released from its data, delete {self._marker} to start afresh"
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the write lock from the first look to the commit; anything that raises leaves no trace."""
        try:
            self._execute("BEGIN IMMEDIATE")
            yield
            self._execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            raise

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        if os.getpid() != self._process:
            raise LedgerError(f"{self.path}: opened before a fork; a process must open the ledger itself")
        with self._explained():
            return self._connection.execute(statement, values)

    def _one(self, statement: str, *values: object) -> tuple[Any, ...]:
        rows = self._all(statement, *values)
        if not rows:
            raise LedgerError(f"{self.path}: a row is missing; {_RESTORE}")
        return rows[0]

    def _all(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._explained():
            return self._execute(statement, *values).fetchall()

    @contextmanager
    def _explained(self, *nonsense: type[Exception]) -> Iterator[None]:
        """Say what to do about errors of the file system, of SQLite, and of reading what is in a row."""
        try:
            yield
        except OSError as error:
            raise LedgerError(f"{self.path}: the ledger cannot be opened ({error}); {_WRITABLE}") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE)
            remedy = _REMEDIES.get(code, _REMEDIES.get(code & 0xFF, _DEFECT))
            raise LedgerError(f"{self.path}: {error}; {remedy}") from error
        except nonsense as error:
            raise LedgerError(f"{self.path}: a row makes no sense ({error!r}); {_RESTORE}") from error
