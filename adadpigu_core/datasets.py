"""Records in memory, and where they come from.

A data set is two tensors per split: features and labels. How raw values become features depends on their
type and shape alone, never on the values: to scale by a data set's own mean would be a release that no ledger
sees.

    digits                  scikit-learn's 8 x 8 digits, no download; a fixed split into 1,437 and 360 records
    mnist, fashion-mnist    by torchvision, scaled to [0, 1]
    cifar-10                by torchvision, scaled to [0, 1], then (x - 0.5) / 0.25
    npz:PATH                the user's own arrays, see `_features` for what is done to them

Left out: augmentation, and data sets that do not fit into memory.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core.exceptions import ConfigurationError, DataError

NPZ_PREFIX = "npz:"
DATA_DIR_VARIABLE = "ADADPIGU_DATA_DIR"


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
            raise DataError(
                f"features must be [n, ...] and labels [n] with the same n, not {list(x.shape)} and {list(y.shape)}"
            )

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


def load(name: str, *, root: str | None = None) -> DataSet:
    """Load a data set by name.

    Args:
        name: One of ``names()``, or ``npz:PATH`` with the keys x_train, y_train, x_test, y_test and, where the
            labels do not show all classes, num_classes. A relative path starts at the current directory.
        root: Folder for torchvision's files; else the one in ADADPIGU_DATA_DIR, else ``~/.cache/adadpigu``.

    Raises:
        ConfigurationError: The name is unknown.
        DataError: The files are missing, damaged or do not hold a task.
    """
    if name.startswith(NPZ_PREFIX):
        return _npz_data_set(_npz_path(name))
    if name not in _LOADERS:
        raise ConfigurationError(f"unknown data set {name!r}: choose {', '.join(names())} or {NPZ_PREFIX}PATH")
    return _LOADERS[name](root)


def load_records(source: str, *, root: str | None = None) -> Records:
    """Load training records only, which is all that a deployed client has.

    Args:
        source: As in `load`; the file of ``npz:PATH`` needs the keys x_train and y_train, or x and y.
        root: As in `load`.

    Returns:
        The records as they are in the file. Whether they fit the task is for `check_records` to say.

    Raises:
        ConfigurationError: The name is unknown.
        DataError: The file is missing, damaged or lacks the keys.
    """
    if not source.startswith(NPZ_PREFIX):
        return load(source, root=root).train
    keys = ("x_train", "y_train")
    path = _npz_path(source)
    arrays = _read_npz(path, keys, ("x", "y"))
    return _npz_records(path, arrays, *arrays)


def names() -> tuple[str, ...]:
    """Names of the built-in data sets."""
    return tuple(_LOADERS)


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
        # The shape is the same for all records, and the text repeats only what the server sent.
        raise DataError(
            f"features of one record have shape {shape}, the task wants {wanted}",
            public_message=f"the records of this client do not have the shape {wanted}",
        )
    bad_labels = torch.nonzero((records.labels < 0) | (records.labels >= num_classes))
    if len(bad_labels):
        index = int(bad_labels[0])
        raise DataError(
            f"the label of record {index} is {int(records.labels[index])}, outside 0 ... {num_classes - 1} "
            f"({len(bad_labels)} such records); labels count from 0"
        )
    bad_features = torch.nonzero(~torch.isfinite(records.features).flatten(1).all(dim=1))
    if len(bad_features):
        raise DataError(
            f"record {int(bad_features[0])} has a feature that is not a finite float32 number "
            f"({len(bad_features)} such records)"
        )


def _digits(root: str | None) -> DataSet:
    del root  # The digits come with scikit-learn.
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes two seconds
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) for x in parts[:2])
    y_train, y_test = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return DataSet(Records(x_train, y_train), Records(x_test, y_test), num_classes=10)


def _from_torchvision(class_name: str, convert: Callable[[Any], Tensor]) -> Callable[[str | None], DataSet]:
    """Make a loader for a data set of torchvision."""

    def load_splits(root: str | None) -> DataSet:
        train, test = (
            Records(convert(split.data), torch.as_tensor(split.targets, dtype=torch.int64))
            for split in _torchvision_splits(class_name, root)
        )
        return DataSet(train, test, num_classes=10)

    return load_splits


def _torchvision_splits(class_name: str, root: str | None) -> list[Any]:
    """Read the training and the test split; download them only if they are not there."""
    from torchvision import datasets  # noqa: PLC0415 - takes more than a second

    folder = Path(root or os.environ.get(DATA_DIR_VARIABLE) or "~/.cache/adadpigu").expanduser()

    def read(download: bool) -> list[Any]:
        make = getattr(datasets, class_name)
        return [make(str(folder), train=train, download=download) for train in (True, False)]

    try:
        return read(download=False)  # first, because the folder may be read-only
    except Exception as missing:  # torchvision passes on whatever its parsers raise
        try:
            return read(download=True)
        except Exception as error:
            raise DataError(
                f"{class_name} could neither be read from {folder} ({missing}) nor downloaded ({error}). Put "
                f"its files there, or set {DATA_DIR_VARIABLE} to a folder that has them as torchvision lays them out"
            ) from error


def _grey(pixels: Tensor) -> Tensor:
    return pixels.unsqueeze(1).to(torch.float32).div_(255.0)


def _colour(pixels: NDArray[np.uint8]) -> Tensor:
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
    return scaled.sub_(0.5).div_(0.25).contiguous()


_LOADERS: dict[str, Callable[[str | None], DataSet]] = {
    "digits": _digits,
    "mnist": _from_torchvision("MNIST", _grey),
    "fashion-mnist": _from_torchvision("FashionMNIST", _grey),
    "cifar-10": _from_torchvision("CIFAR10", _colour),
}


def _npz_path(source: str) -> Path:
    name = source.removeprefix(NPZ_PREFIX)
    if not name:
        raise ConfigurationError(f"{NPZ_PREFIX} needs a path, as in {NPZ_PREFIX}records.npz")
    return Path(name).expanduser().absolute()


def _npz_data_set(path: Path) -> DataSet:
    keys = ("x_train", "y_train", "x_test", "y_test")
    arrays = _read_npz(path, (*keys, "num_classes"), keys)
    train, test = _npz_records(path, arrays, *keys[:2]), _npz_records(path, arrays, *keys[2:])
    if "num_classes" in arrays:
        classes = _whole_numbers(path, "num_classes", arrays["num_classes"]).ravel()
    else:
        classes = np.concatenate([train.labels, test.labels]).max(initial=-1, keepdims=True) + 1
    if len(classes) != 1 or classes[0] < 2:
        raise DataError(f"{path}: num_classes must be one number, at least 2, not {classes.tolist()}")
    for name, split in (("train", train), ("test", test)):
        try:
            check_records(split, input_shape=train.features.shape[1:], num_classes=int(classes[0]))
        except DataError as error:
            raise DataError(f"{path}, {name} split: {error}") from error
    return DataSet(train, test, int(classes[0]))


def _read_npz(path: Path, *choices: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Read the first choice of keys that an archive has. It is not trusted: nothing in it is unpickled."""
    key = "its directory"
    try:
        with np.load(path, allow_pickle=False) as archive:
            present = list(archive.files)
            chosen = next((keys for keys in choices if set(keys) <= set(present)), ())
            arrays = {key: archive[key] for key in chosen}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except Exception as error:  # zipfile and numpy raise a dozen types on damaged files
        raise DataError(
            f"{path}: {key} cannot be read ({error or type(error).__name__}). The file is damaged, or holds Python "
            "objects or a single array; write it again with numpy.savez and numeric arrays"
        ) from error
    if not arrays:
        wanted = " or ".join(", ".join(keys) for keys in reversed(choices))
        raise DataError(f"{path} holds {present}; write it with numpy.savez under the keys {wanted}")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: {name} holds {array.dtype} values; store numbers")
    return arrays


def _npz_records(path: Path, arrays: dict[str, NDArray[Any]], x_key: str, y_key: str) -> Records:
    x, y = _features(arrays[x_key]), _whole_numbers(path, y_key, arrays[y_key])
    try:
        return Records(torch.from_numpy(x), torch.from_numpy(y))
    except DataError as error:
        raise DataError(f"{path}, {x_key} and {y_key}: {error}") from error


def _whole_numbers(path: Path, key: str, array: NDArray[Any]) -> NDArray[np.int64]:
    if array.dtype.kind == "f":
        # Beyond 2^53 a float has no unit digit; NaN fails both comparisons.
        odd = np.flatnonzero(~((np.abs(array) <= 2.0**53) & (array == np.floor(array))))
        if len(odd):
            raise DataError(f"{path}: {key}[{odd[0]}] is {array.flat[odd[0]]}; store whole numbers")
    return array.astype(np.int64)


def _features(raw: NDArray[Any]) -> NDArray[np.float32]:
    """Turn an array into float32 features, by its type and shape alone.

    uint8 is taken for pixels and divided by 255; other types keep their values. [n, H, W] becomes [n, 1, H, W].
    [n, H, W, C] with C = 1 or 3 becomes [n, C, H, W], unless the second dimension is already 1 or 3.
    """
    if raw.ndim == 3:
        raw = raw[:, None]
    elif raw.ndim == 4 and raw.shape[3] in (1, 3) and raw.shape[1] not in (1, 3):
        raw = raw.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):  # Too large for float32 becomes infinite, which `check_records` reports.
        features = np.array(raw, dtype=np.float32, order="C")
    if raw.dtype == np.uint8:
        features /= 255.0
    return features
