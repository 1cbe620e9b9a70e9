"""What the tables of results compare, read from TOML.

A table is a list of rows and a list of methods. A row is a settings file that can be run by itself; a method is a
named set of settings that differ from it, the same in every row, with what was tuned for the method in a row on top.
The first method is the one that the others are compared with. The quality that is compared is accuracy, or where
classes are unequal, the area under the curve.

    experiments/ROW.toml            settings of a row
    experiments/methods.toml        methods that any table may name
    experiments/tables/TABLE.toml   title, methods, rows, and methods of the table's own
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adadpigu_core.configuration import Value
from adadpigu_core.exceptions import ConfigurationError

EXPERIMENTS = Path(__file__).parent / "experiments"
_TABLES, _METHODS = EXPERIMENTS / "tables", EXPERIMENTS / "methods.toml"
QUALITIES = {"accuracy": "accuracy", "area_under_curve": "area under the curve"}
_KEYS = {"title", "methods", "rows", "own", "quality"}
_ROW_KEYS = {"label", "settings", "changes"}
_METHOD_KEYS = {"title", "changes", "private"}


@dataclass(frozen=True)
class Method:
    """A column of a table.

    Args:
        name: As files name it.
        title: For the heading.
        changes: Settings that differ from a row's.
        private: False for a bound that looks at records without noise.
    """

    name: str
    title: str
    changes: Mapping[str, Value]
    private: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        label: For the first column.
        settings: Its settings file.
        tuned: By name of a method, what was chosen for it in this row.
    """

    label: str
    settings: Path
    tuned: Mapping[str, Mapping[str, Value]]

    @property
    def name(self) -> str:
        """Name of the row's file, which names its runs."""
        return self.settings.stem

    def changes(self, method: Method) -> dict[str, Value]:
        """What a method changes in this row's settings."""
        return {**method.changes, **self.tuned.get(method.name, {})}


@dataclass(frozen=True)
class Table:
    """Rows and methods.

    Args:
        name: On the command line.
        title: For the heading.
        rows: At least one.
        methods: At least one; the first is compared with each of the others.
        quality: One of ``QUALITIES``.
        changes: Settings that differ from those of all files, as the user wants.
        called: What to ask for it by: its name, or the file of one's own.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    methods: tuple[Method, ...]
    quality: str = "accuracy"
    changes: Mapping[str, Value] = field(default_factory=dict)
    called: str = ""


def names() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    return tuple(sorted(path.stem for path in _TABLES.glob("*.toml")))


def load(name: str) -> Table:
    """Read a table.

    Args:
        name: One of ``names()``, or the path of a TOML file; a row's settings then lie beside it.

    Raises:
        ConfigurationError: If there is no such table, or something in it is unknown or missing.
    """
    path = Path(name) if name.endswith(".toml") else _TABLES / f"{name}.toml"
    if not path.is_file():
        raise ConfigurationError(f"there is no table {name!r}; choose {', '.join(names())}, or name a TOML file")
    content = _read(path)
    _check_keys(f"{path.name}", content, _KEYS, {"title", "methods", "rows"})
    known = {**_read(_METHODS), **content.get("own", {})}
    methods = tuple(_method(path.name, method, known) for method in content["methods"])
    rows = tuple(_row(path, row, {method.name for method in methods}) for row in content["rows"])
    if not methods or not rows:
        raise ConfigurationError(f"{path.name}: a table needs a row and a method")
    quality = content.get("quality", "accuracy")
    if quality not in QUALITIES:
        raise ConfigurationError(f"{path.name}: quality: {quality!r} is none of {', '.join(QUALITIES)}")
    return Table(path.stem, content["title"], rows, methods, quality, called=name)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: is not TOML ({error})") from error


def _check_keys(place: str, table: Mapping[str, Any], known: set[str], required: set[str]) -> None:
    unknown, missing = sorted(set(table) - known), sorted(required - set(table))
    if unknown:
        raise ConfigurationError(f"{place}: {unknown[0]}: there is no such key; known are {', '.join(sorted(known))}")
    if missing:
        raise ConfigurationError(f"{place}: {missing[0]}: is missing")


def _method(place: str, name: str, known: Mapping[str, Any]) -> Method:
    if name not in known:
        raise ConfigurationError(f"{place}: methods: {name!r} is none of {', '.join(sorted(known))}")
    content = known[name]
    _check_keys(f"{place}: {name}", content, _METHOD_KEYS, {"title"})
    return Method(name, content["title"], dict(content.get("changes", {})), bool(content.get("private", True)))


def _row(path: Path, content: Mapping[str, Any], methods: set[str]) -> Row:
    _check_keys(f"{path.name}: rows", content, _ROW_KEYS, {"label", "settings"})
    tuned = content.get("changes", {})
    _check_keys(f"{path.name}: rows: changes", tuned, methods, set())
    folder = EXPERIMENTS if path.parent == _TABLES else path.parent
    return Row(content["label"], folder / content["settings"], tuned)
