"""The clients of a federation as a CSV file: who, how many records, which budget.

    id,records,target_epsilon
    north,1200,8
    south,300,0.5

All three are public by declaration. Everything that is wrong with a file is found at once and named by line and column.
"""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import ConfigurationError

COLUMNS = ("id", "records", "target_epsilon")
_MOST_CLIENTS = 100_000
_MOST_LETTERS = 100
_MOST_PROBLEMS = 10
_MOST_RECORDS = 10**12


@dataclass(frozen=True)
class ClientEntry:
    """One line.

    Args:
        id: Name, at most 100 printable letters.
        records: Declared number of records, at least 1.
        target_epsilon: Budget, positive and finite.
    """

    id: str
    records: int
    target_epsilon: float


def read_clients(path: Path) -> tuple[ClientEntry, ...]:
    """Read a file of clients.

    Raises:
        ConfigurationError: If the file cannot be read, or naming line and column of what is wrong in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    entries: list[ClientEntry] = []
    problems: list[str] = []
    try:
        _read(csv.reader(text.splitlines(keepends=True), strict=True), entries, problems)
    except csv.Error as error:
        problems.append(f"is not CSV ({error})")
    if not entries and not problems:
        problems.append(f"line 2: there are no clients; write one a line, as {','.join(COLUMNS)}")
    if problems:
        shown = [f"  * {problem}" for problem in problems[:_MOST_PROBLEMS]]
        shown += [f"  * and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        raise ConfigurationError(f"{path}: these clients cannot be used:\n" + "\n".join(shown))
    return tuple(entries)


def parse_client(text: str) -> ClientEntry:
    """Read one client that is written like a line of a file: ``id,records,target_epsilon``.

    Raises:
        ConfigurationError: Naming what is wrong.
    """
    cells = [cell.strip() for cell in text.split(",")]
    if len(cells) != len(COLUMNS):
        raise ConfigurationError(f"client {text!r}: must be {','.join(COLUMNS)}")
    values = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        problem, values[name] = _PARSERS[name](cell)
        if problem:
            raise ConfigurationError(f"client {text!r}, {name}: {problem}")
    return ClientEntry(**values)


def _read(rows: Any, entries: list[ClientEntry], problems: list[str]) -> None:
    """Fill in what can be read and what is wrong; ``rows`` is a CSV reader, which knows its line."""
    heading = [name.strip() for name in next(rows, [])]
    problems += _wrong_heading(heading)
    if problems:
        return
    seen: dict[str, int] = {}
    for row in rows:
        line = rows.line_num
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(heading):
            problems.append(f"line {line}: has {len(row)} columns instead of {len(heading)}")
            continue
        wrong, values = [], {}
        for name, cell in zip(heading, row, strict=True):
            problem, values[name] = _PARSERS[name](cell.strip())
            wrong += [f"line {line}, column {name}: {problem}"] if problem else []
        if not wrong and values["id"] in seen:
            wrong = [f"line {line}, column id: {values['id']!r} is on line {seen[values['id']]} already"]
        if not wrong:
            seen[values["id"]] = line
            entries.append(ClientEntry(**values))
        problems += wrong
        if len(entries) > _MOST_CLIENTS:
            problems.append(f"line {line}: there are more than {_MOST_CLIENTS} clients")
            return


def _wrong_heading(heading: list[str]) -> Iterator[str]:
    expected = f"the first line must be {','.join(COLUMNS)}"
    for name in COLUMNS:
        if heading.count(name) != 1:
            how = "is missing" if name not in heading else "stands there more than once"
            yield f"line 1, column {name}: {how}; {expected}"
    for name in heading:
        if name not in COLUMNS:
            yield f"line 1, column {name[:_MOST_LETTERS]!r}: there is no such column; {expected}"


def _id(text: str) -> tuple[str, str]:
    if not text or len(text) > _MOST_LETTERS or not text.isprintable():
        return f"must be 1 to {_MOST_LETTERS} printable letters", text
    return "", text


def _records(text: str) -> tuple[str, int]:
    if not (text.isascii() and text.isdigit() and len(text) <= 13 and 1 <= int(text) <= _MOST_RECORDS):
        return f"must be a whole number from 1, got {text[:_MOST_LETTERS]!r}", 0
    return "", int(text)


def _target(text: str) -> tuple[str, float]:
    try:
        value = float(text)
    except ValueError:
        return f"must be a number, got {text[:_MOST_LETTERS]!r}", 0.0
    if not 0 < value < math.inf:
        return f"must be positive and finite, got {text[:_MOST_LETTERS]!r}", 0.0
    return "", value


_PARSERS: dict[str, Callable[[str], tuple[str, Any]]] = {"id": _id, "records": _records, "target_epsilon": _target}
