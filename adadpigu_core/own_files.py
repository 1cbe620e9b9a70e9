"""The user's own records as a table or as images, read into arrays.

    csv:PATH            a header, then one record a line; the column ``label`` holds the class, all others are features
    csv:PATH#COLUMN     the same with another name for the column of the class
    images:FOLDER       one folder a class, named by its number: ``0``, or ``3-malignant``; images of one size

Where training and test records are needed, as on a server, PATH is a folder that holds ``train.csv`` and ``test.csv``,
and FOLDER holds ``train`` and ``test``. Labels are numbers in the files themselves, not the order in which names
appear, because a client that lacks a class would then call all later ones by other numbers.

Texts of errors name lines and files: they describe records, and stay on this machine.
"""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.data_dir import located
from adadpigu_core.exceptions import ConfigurationError, DataError

CSV_PREFIX, IMAGES_PREFIX = "csv:", "images:"
_LABEL = "label"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"}
_CLASS = re.compile(r"(\d{1,5})(-.*)?")

Pair = tuple[NDArray[Any], NDArray[Any]]


def is_own(source: str) -> bool:
    """Whether a data set's name means one of these.

    >>> is_own("csv:site.csv"), is_own("digits")
    (True, False)
    """
    return source.startswith((CSV_PREFIX, IMAGES_PREFIX))


def place_of(source: str) -> tuple[str, Path, str]:
    """Take a name apart: prefix, absolute path, and name of the label's column.

    >>> prefix, path, column = place_of("csv:/data/site.csv#diagnosis")
    >>> prefix, path.as_posix(), column
    ('csv:', '/data/site.csv', 'diagnosis')
    """
    prefix = CSV_PREFIX if source.startswith(CSV_PREFIX) else IMAGES_PREFIX
    name, column = source.removeprefix(prefix), _LABEL
    if prefix == CSV_PREFIX and "#" in name:
        name, _, column = name.rpartition("#")
    if not name or not column:
        raise ConfigurationError(f"{source}: needs a path, as in csv:records.csv#label or images:folder")
    return prefix, located(name), column


def read_split(source: str, split: str) -> Pair:
    """Read the training or the test records of a folder that holds both.

    Raises:
        DataError: If they are missing, damaged or do not fit together.
    """
    prefix, path, column = place_of(source)
    return _read_csv(path / f"{split}.csv", column) if prefix == CSV_PREFIX else _read_images(path / split)


def read_site(source: str) -> Pair:
    """Read the records of one site: of a file, of a folder of classes, or the training records of a folder of both.

    Raises:
        DataError: If they are missing, damaged or do not fit together.
    """
    prefix, path, column = place_of(source)
    if prefix == CSV_PREFIX:
        return read_split(source, "train") if path.is_dir() else _read_csv(path, column)
    return read_split(source, "train") if (path / "train").is_dir() else _read_images(path)


def _read_csv(path: Path, column: str) -> Pair:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header.count(column) != 1 or len(header) < 2:
                raise DataError(f"{path}: needs one column {column!r} and features beside it; it has {header}")
            at = header.index(column)
            values = [_numbers(path, rows.line_num, row, header) for row in rows if row]
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    table = np.array(values, dtype=np.float64).reshape(len(values), len(header))
    return np.delete(table, at, axis=1), table[:, at]


def _numbers(path: Path, line: int, row: list[str], header: list[str]) -> list[float]:
    if len(row) != len(header):
        raise DataError(f"{path}: line {line} has {len(row)} fields, the header {len(header)}")
    try:
        return [float(field) for field in row]
    except ValueError as error:
        raise DataError(f"{path}: line {line} holds something else than numbers ({error})") from error


def _read_images(folder: Path) -> Pair:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        match = _CLASS.fullmatch(path.name)
        if match is None:
            raise DataError(f"{path}: name the folder of a class by its number, as in 3 or 3-malignant")
        for file in sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in _SUFFIXES):
            image = _read_image(file)
            if images and image.shape != images[0].shape:
                text = f"{file}: is of size and colours {image.shape}, the images before are of {images[0].shape}"
                raise DataError(f"{text}; make them alike")
            images.append(image)
            labels.append(int(match[1]))
    if not images:
        raise DataError(f"{folder}: holds no images; put them into one folder a class")
    return np.stack(images), np.array(labels)


def _read_image(file: Path) -> NDArray[np.uint8]:
    """Read bytes, grey [1, H, W] or coloured [3, H, W]: which of them depends on the format, never on pixels."""
    from PIL import Image  # noqa: PLC0415 - not needed by other clients

    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise DataError(f"{file}: cannot be read as an image ({type(error).__name__})") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
