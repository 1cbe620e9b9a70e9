"""Who may change a file: everybody who may write it, and everybody who may put another in its place.

A policy or a ledger that another user of the machine can exchange decides nothing. So the file and every folder above
it must be writable by their owners alone; folders in which nobody can remove what belongs to others (``/tmp``) are
fine. Who the owners are is left to them: a policy may belong to somebody else than the service that obeys it.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def open_to_others(path: Path) -> Path | None:
    """Find what others may change: a file, or the nearest folder above it; None if there is nothing.

    Args:
        path: May not exist yet, and may lead over links: then the folders on both ways count.
    """
    return next((place for place in _on_the_way(path) if _may_be_changed(place)), None)


def _on_the_way(path: Path) -> Iterator[Path]:
    for way in dict.fromkeys((path.absolute(), path.resolve())):
        yield from (place for place in (way, *way.parents) if place.exists())


def _may_be_changed(place: Path) -> bool:
    mode = place.stat().st_mode
    keeps = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    return os.name == "posix" and bool(mode & _OTHERS) and not keeps
