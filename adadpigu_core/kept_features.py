"""Features of public records, kept on disk, so that the many runs of a table compute them once.

A front end is a fixed function, and for tens of thousands of images it takes longer than training a layer on top of it.
Whoever simulates may name a folder in ADADPIGU_FEATURES_DIR; without it nothing is written.

Privacy: features are as private as their records. Only simulations and the server's own evaluation, whose records are
public, come here; a client that owns records keeps its features in memory.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adadpigu_core import front_ends, leaves, patches, principal_axes, scattering, strokes
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError

FOLDER_VARIABLE = "ADADPIGU_FEATURES_DIR"


def folder() -> Path | None:
    """Where features are kept; None = nowhere."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else None


@contextlib.contextmanager
def keeping_in(place: Path) -> Iterator[None]:
    """Keep features in a folder, here and in processes that are started meanwhile, unless the user names another."""
    if folder() is not None:
        yield
        return
    os.environ[FOLDER_VARIABLE] = str(place.absolute())
    try:
        yield
    finally:
        del os.environ[FOLDER_VARIABLE]


def public_features(front_end: str, records: Records) -> Records:
    """Records with a front end's features in place of their own, from the folder of kept features if there is one.

    A file that is not what it should be is made again.

    Args:
        front_end: One of ``front_ends.FEATURES``.
        records: Public.

    Raises:
        ConfigurationError: If the front end does not take records of this shape, or the folder cannot be written.
    """
    place = folder()
    if front_end == front_ends.RAW or place is None:
        return front_ends.applied(front_end, records)
    shape = (len(records), *front_ends.feature_shape(front_end, tuple(records.features.shape[1:])))
    path = place / f"{front_end}-{records.fingerprint()[:32]}-{_version()}.npy"
    found = _read(path, shape)
    if found is None:
        found = front_ends.features(front_end, records.features)
        try:
            _write(path, found)
        except OSError as error:
            remedy = "name a folder with room, or none"
            raise ConfigurationError(
                f"{FOLDER_VARIABLE}: cannot keep features in {place} ({error}); {remedy}"
            ) from error
    return Records(found, records.labels)


def _version() -> str:
    """Hash of the source of the front ends: features of another version are others."""
    modules = (front_ends, scattering, strokes, leaves, patches, principal_axes)
    sources = (Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # pages are shared by all runs; nobody writes
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(array) if array.dtype == np.float32 and array.shape == shape else None


def _write(path: Path, features: Tensor) -> None:
    """Write a file whole or not at all: other runs may look for it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        try:
            np.save(part, features.cpu().numpy())
            part.close()
            os.replace(part.name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part.name)
            raise
