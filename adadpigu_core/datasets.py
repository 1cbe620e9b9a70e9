"""Records in memory, and where they come from.

A data set is two tensors per split: features and labels. How raw values become features depends on their
type and shape alone, never on the values: scaling by a data set's own mean would escape the ledger.

    digits                  scikit-learn's 8 x 8 digits, no download; a fixed split into 1,437 and 360 records
    mnist, fashion-mnist    by torchvision, scaled to [0, 1]
    cifar-10                by torchvision, scaled to [0, 1], then (x - 0.5) / 0.25
    wide-table              made up, see `made_up`; mnist-background likewise
    npz:PATH                the user's own arrays, see `_as_images` and `_features` for what is done to them
    csv:PATH, images:PATH   the user's own tables and images, see `own_files`; then as arrays
    text:PATH               the user's own texts, see `text`
    python:PACKAGE.MODULE:FUNCTION   what a function of the user's own gives, in the shape that it has

Left out: augmentation, and data sets that do not fit into memory.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core import factories, made_up, own_files
from adadpigu_core.data_dir import DATA_DIR_VARIABLE, located
from adadpigu_core.exceptions import ConfigurationError, DataError
from adadpigu_core.named_arrays import of_archive, of_function
from adadpigu_core.text import TEXT_PREFIX, TextSource

NPZ_PREFIX, PYTHON_PREFIX = "npz:", "python:"
_NAMED_ARRAYS = (NPZ_PREFIX, PYTHON_PREFIX)
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar-10": "CIFAR10"}
NAMES = ("digits", *_TORCHVISION, *made_up.NAMES)
_PREFIXES = (NPZ_PREFIX, own_files.CSV_PREFIX, own_files.IMAGES_PREFIX, TEXT_PREFIX)
CHOICES = ", ".join((*NAMES, *(f"{prefix}PATH" for prefix in _PREFIXES), f"{PYTHON_PREFIX}PACKAGE.MODULE:FUNCTION"))
_TASK_KEYS, _SITE_KEYS = ("x_train", "y_train", "x_test", "y_test"), (("x_train", "y_train"), ("x", "y"))
_TASK_CHOICES = ((*_TASK_KEYS, "num_classes"), _TASK_KEYS)


@dataclass(frozen=True, eq=False)
class Records:
    """Features and labels of n records.

    Args:
        features: float32 [n, *input_shape].
        labels: int64 [n].

    Raises:
        DataError: The tensors have other types, or their lengths differ.
    """

    features: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x, y = self.features, self.labels
        if x.dtype != torch.float32 or y.dtype != torch.int64:
            raise DataError(f"features and labels must be float32 and int64, not {x.dtype} and {y.dtype}")
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
            raise DataError(f"features and labels must be [n, ...] and [n], not {[*x.shape]} and {[*y.shape]}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]] | Tensor) -> "Records":
        """Copy the records at these indices, in this order.

        Raises:
            DataError: The indices are not whole numbers; a boolean mask would silently mean records 0 and 1.
        """
        chosen = np.asarray(indices)
        if chosen.size and chosen.dtype.kind not in "iu":
            raise DataError(f"records are selected by whole-number indices, not by {chosen.dtype} values")
        index = torch.from_numpy(chosen.astype(np.int64))
        return Records(self.features[index], self.labels[index])

    def to(self, device: str) -> "Records":
        """The same records on another device."""
        return Records(self.features.to(device), self.labels.to(device))

    def fingerprint(self) -> str:
        """Hash the content: the same records in the same order give the same 64 hex digits everywhere.

        Privacy: an exact function of the records, to name them on their own machine. It must not leave it.
        """
        digest = hashlib.sha256()
        for tensor, portable in ((self.features, "<f4"), (self.labels, "<i8")):
            array = np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=portable)
            digest.update(f"{portable}{array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class DataSet:
    """A task: records to train on, records to test on.

    Args:
        train: The records to protect.
        test: Public records for evaluation.
        num_classes: Labels are 0 ... num_classes - 1.
    """

    train: Records
    test: Records
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the features of one record."""
        return tuple(self.train.features.shape[1:])


TEST, VALIDATION = "test", "validation"
EVALUATED_ON = (TEST, VALIDATION)
_VALIDATION_SHARE = 0.1


def evaluated_on(data: DataSet, part: str) -> DataSet:
    """Say what a task is evaluated on: its test records, or a tenth of the training records, which then do not train.

    Settings that were chosen on test records make results on them look better than they are; chosen on validation
    records, they do not. Which tenth it is depends on the number of records alone.
    """
    if part == TEST:
        return data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    held_out = max(1, round(_VALIDATION_SHARE * len(data.train)))
    parts = (torch.sort(indices).values for indices in (order[held_out:], order[:held_out]))
    train, test = (data.train.select(indices) for indices in parts)
    return DataSet(train, test, data.num_classes)


def is_name(name: str) -> bool:
    """Whether a data set could be loaded by this name, as far as the name goes."""
    if name.startswith(PYTHON_PREFIX):
        return factories.is_factory(name.removeprefix(PYTHON_PREFIX))
    return name in NAMES or is_own(name)


def is_own(name: str) -> bool:
    """Whether a name means records of the user's own."""
    return name.startswith((*_PREFIXES, PYTHON_PREFIX))


def taken_apart(name: str) -> tuple[str, str]:
    """Prefix and path of the user's own files; no prefix and the name itself of any other.

    >>> taken_apart("csv:site.csv"), taken_apart("digits")
    (('csv:', 'site.csv'), ('', 'digits'))
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)


def load(name: str, *, root: str | None = None) -> DataSet:
    """Load a data set by name.

    Args:
        name: One of ``NAMES``, or ``npz:PATH`` with the keys x_train, y_train, x_test, y_test and, where the labels do
            not show all classes, num_classes; csv: and images: are described in `own_files`. A relative path starts
            at the current directory, or where nothing is there, in the folder of ADADPIGU_DATA_DIR. Behind ``python:``
            stands a function that gives arrays under the same keys.
        root: Folder for torchvision's files; else the one in ADADPIGU_DATA_DIR, else ``~/.cache/adadpigu``.

    Raises:
        ConfigurationError: The name is unknown.
        DataError: The files are missing, damaged or do not hold a task.
    """
    if name.startswith(_NAMED_ARRAYS):
        with _naming(_place(name)):
            return _arrays_data_set(_named_arrays(name, *_TASK_CHOICES), shaped=_is_shaped(name))
    if own_files.is_own(name) or name.startswith(TEXT_PREFIX):
        (x, y), (x_test, y_test) = _read_splits(name)
        with _naming(name):
            return _arrays_data_set({"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test})
    if name not in NAMES:
        raise ConfigurationError(f"unknown data set {name!r}: choose {CHOICES}")
    if name == "digits":
        return _digits()
    if name == made_up.WIDE_TABLE:
        train, test = made_up.wide_table()
        return DataSet(Records(*train), Records(*test), num_classes=2)
    if name == made_up.MNIST_BACKGROUND:
        return _with_background(load("mnist", root=root))
    folder = root or os.environ.get(DATA_DIR_VARIABLE) or "~/.cache/adadpigu"
    return _torchvision(name, Path(folder).expanduser())


def _named_arrays(name: str, *choices: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    if name.startswith(PYTHON_PREFIX):
        return of_function(name.removeprefix(PYTHON_PREFIX), *choices)
    return of_archive(_npz_path(name), *choices)


def _is_shaped(name: str) -> bool:
    """Whether features have the shape that they shall have, and no image is looked for in them."""
    return name.startswith(PYTHON_PREFIX)


def _place(name: str) -> object:
    return _npz_path(name) if name.startswith(NPZ_PREFIX) else name


def _read_splits(name: str) -> tuple[own_files.Pair, own_files.Pair]:
    if name.startswith(TEXT_PREFIX):
        return TextSource.of(name).split()
    return own_files.read_split(name, "train"), own_files.read_split(name, "test")


def load_records(source: str, *, root: str | None = None) -> Records:
    """Load training records only, which is all that a deployed client has.

    Args:
        source: As in `load`; the file of ``npz:PATH`` needs the keys x_train and y_train, or x and y. ``csv:PATH`` may
            be one file, ``images:PATH`` one folder of classes. Only the owner of a node may name a function.
        root: As in `load`.

    Returns:
        Records as they are. Whether they fit the task is for `check_records` to say.

    Raises:
        ConfigurationError: The name is unknown.
        DataError: The file is missing, damaged or lacks the keys.
    """
    if own_files.is_own(source) or source.startswith(TEXT_PREFIX):
        x, y = TextSource.of(source).site() if source.startswith(TEXT_PREFIX) else own_files.read_site(source)
        with _naming(source):
            return _npz_records({"x": x, "y": y})
    if source.startswith(_NAMED_ARRAYS):
        with _naming(_place(source)):
            return _npz_records(_named_arrays(source, *_SITE_KEYS), shaped=_is_shaped(source))
    return load(source, root=root).train


def check_records(records: Records, *, input_shape: Sequence[int], num_classes: int) -> None:
    """Check that records fit the task that the server announced.

    Privacy: what is wrong with which record is in the text only, which stays on this machine. That the client
    refuses is visible; mend the file instead of dropping records run by run.

    Raises:
        DataError: No records, another shape, a label out of range, or a feature that is not finite.
    """
    if len(records) == 0:
        raise DataError("the data set holds no records")
    shape, wanted = list(records.features.shape[1:]), list(input_shape)
    if shape != wanted:
        public = f"the records of this client do not have the shape {wanted}"  # repeats what the server sent
        raise DataError(f"records have shape {shape}, the task wants {wanted}", public)
    bad_labels = torch.nonzero((records.labels < 0) | (records.labels >= num_classes))
    if len(bad_labels):
        index, value = int(bad_labels[0]), int(records.labels[bad_labels[0]])
        raise DataError(f"the label of record {index} is {value}; labels must be 0 ... {num_classes - 1}")
    # the extremes tell of anything that is not finite, in a thirtieth of the time that it takes to find it
    if records.features.numel() and not all(map(math.isfinite, torch.aminmax(records.features))):
        bad_features = torch.nonzero(~torch.isfinite(records.features).flatten(1).all(dim=1))
        raise DataError(f"record {int(bad_features[0])} has a feature that is not a finite float32 number")


def _digits() -> DataSet:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes two seconds
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - the same

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) for x in parts[:2])
    y_train, y_test = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return DataSet(Records(x_train, y_train), Records(x_test, y_test), num_classes=10)


def _with_background(data: DataSet) -> DataSet:
    train, test = (
        Records(made_up.with_background(split.features, seed), split.labels)
        for seed, split in enumerate((data.train, data.test), start=1)
    )
    return DataSet(train, test, data.num_classes)


def _torchvision(name: str, folder: Path) -> DataSet:
    splits = []
    for split in _torchvision_splits(_TORCHVISION[name], folder):
        features = torch.from_numpy(_features(_as_images(np.asarray(split.data))))
        if name == "cifar-10":
            features.sub_(0.5).div_(0.25)
        splits.append(Records(features, torch.as_tensor(split.targets, dtype=torch.int64)))
    return DataSet(train=splits[0], test=splits[1], num_classes=10)


def _torchvision_splits(class_name: str, folder: Path) -> list[Any]:
    """Read the training and the test split; download them only if they are not there."""
    from torchvision import datasets  # noqa: PLC0415 - takes more than a second

    def read(*, download: bool) -> list[Any]:
        make = getattr(datasets, class_name)
        return [make(str(folder), train=train, download=download) for train in (True, False)]

    with suppress(Exception):  # torchvision passes on whatever its parsers raise
        return read(download=False)  # The folder may be read-only: a download would fail even if all is there.
    try:
        return read(download=True)
    except Exception as error:
        raise DataError(
            f"{class_name} is not in {folder}, or damaged there, and cannot be downloaded ({error}). Put its "
            f"files there, or name a folder that has them in {DATA_DIR_VARIABLE}"
        ) from error


def _npz_path(source: str) -> Path:
    name = source.removeprefix(NPZ_PREFIX)
    if not name:
        raise ConfigurationError(f"{NPZ_PREFIX} needs a path, as in {NPZ_PREFIX}records.npz")
    return located(name)


@contextmanager
def _naming(place: object) -> Iterator[None]:
    """Put a place in front of what went wrong there."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _arrays_data_set(arrays: dict[str, NDArray[Any]], *, shaped: bool = False) -> DataSet:
    train, test = (
        _npz_records({key: arrays[key] for key in pair}, shaped=shaped) for pair in (_TASK_KEYS[:2], _TASK_KEYS[2:])
    )
    shown = np.array(1 + max([*train.labels.tolist(), *test.labels.tolist()], default=0))
    declared = _whole_numbers("num_classes", arrays.get("num_classes", shown)).ravel().tolist()
    if len(declared) != 1 or declared[0] < 2:
        raise DataError(f"num_classes must be one number, at least 2, not {declared}")
    for key, split in (("x_train, y_train", train), ("x_test, y_test", test)):
        with _naming(key):
            check_records(split, input_shape=train.features.shape[1:], num_classes=declared[0])
    return DataSet(train, test, declared[0])


def _npz_records(pair: dict[str, NDArray[Any]], *, shaped: bool = False) -> Records:
    (x_key, x), (y_key, y) = pair.items()
    features, labels = _features(x if shaped else _as_images(x)), _whole_numbers(y_key, y)
    with _naming(f"{x_key}, {y_key}"):
        return Records(torch.from_numpy(features), torch.from_numpy(labels))


def _whole_numbers(key: str, array: NDArray[Any]) -> NDArray[np.int64]:
    if array.dtype.kind == "f":
        exact = array.astype(np.float64)
        # Beyond 2^53 a float has no unit digit; NaN fails both comparisons.
        odd = np.flatnonzero(~((np.abs(exact) <= 2.0**53) & (exact == np.floor(exact))))
        if len(odd):
            raise DataError(f"{key}[{odd[0]}] is {array.flat[odd[0]]}; store whole numbers")
    return array.astype(np.int64)


def _as_images(raw: NDArray[Any]) -> NDArray[Any]:
    """Put what looks like images into torch's order, by its shape alone.

    [n, H, W] becomes [n, 1, H, W]. [n, H, W, C] with C = 1 or 3 becomes [n, C, H, W], unless the second dimension is 1
    or 3 itself.
    """
    if raw.ndim == 3:
        return raw[:, None]
    if raw.ndim == 4 and raw.shape[3] in (1, 3) and raw.shape[1] not in (1, 3):
        return raw.transpose(0, 3, 1, 2)
    return raw


def _features(raw: NDArray[Any]) -> NDArray[np.float32]:
    """Turn an array into float32: uint8 is taken for pixels and divided by 255; other types keep their values."""
    with np.errstate(over="ignore"):  # Too large for float32 becomes infinite, which `check_records` reports.
        features = np.array(raw, dtype=np.float32, order="C")
    if raw.dtype == np.uint8:
        features /= 255.0
    return features
