"""Files of settings: nested TOML tables, read as flat dotted keys. Whether the keys make sense is for others to say."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import ConfigurationError

Value = bool | int | float | str


def read_toml(path: Path) -> dict[str, Value]:
    """Read a TOML file of nested tables into flat dotted keys.

    Raises:
        ConfigurationError: If the file is missing or is not TOML.
    """
    try:
        return dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or beyond what Python parses
        raise ConfigurationError(f"{path}: is not TOML ({error})") from error


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
