"""Texts as records: labelled lines, hashed into numbers.

    text:PATH                       a line a record: label, tab, text; labels are numbers
    text:PATH#ham,spam              the same with names of classes, in the order of their numbers
    text:PATH#ham,spam#KIND-SIZE    what a record becomes:
        words-4096      how often each word occurs, by hash, scaled to norm 1 (the default)
        bytes-4096      the same of all runs of three bytes
        sequence-64     the hashes of the first 64 words, from 1 to 8192; 0 is padding: for `embedding_bag`

A word is a run of letters and digits in lower case, or one other sign. The hash is fixed and public: a vocabulary made
from the texts would tell which words they hold. Classes are named by the user, because a client that lacks one would
call all later ones by other numbers. Where training and test records are needed, as on a server, PATH is a folder that
holds ``train.tsv`` and ``test.tsv``, or one file, of which every fifth line is for testing.

Texts of errors name files and lines: they describe records, and stay on this machine.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from adadpigu_core.data_dir import located
from adadpigu_core.exceptions import ConfigurationError, DataError

TEXT_PREFIX = "text:"
VOCABULARY = 8192
_WORD = re.compile(r"\w+|[^\w\s]")
_FEATURES = re.compile(r"(words|bytes|sequence)-([1-9]\d{0,5})")
_DEFAULT = "words-4096"
_TEST_EVERY = 5
_WIDTH = 16

Pair = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class TextSource:
    """A place of texts, and what becomes of them.

    Args:
        path: File, or folder of two.
        classes: Their names; empty if labels are numbers.
        kind: ``words``, ``bytes`` or ``sequence``.
        size: Length of a record's features.
    """

    path: Path
    classes: tuple[str, ...]
    kind: str
    size: int

    @classmethod
    def of(cls, name: str) -> "TextSource":
        """Take a name apart.

        Raises:
            ConfigurationError: If it is not one.

        >>> source = TextSource.of("text:/data/sms.tsv#ham,spam#words-1024")
        >>> source.path.as_posix(), source.classes, source.kind, source.size
        ('/data/sms.tsv', ('ham', 'spam'), 'words', 1024)
        """
        path, classes, features, *more = (*name.removeprefix(TEXT_PREFIX).split("#"), "", "")
        known = _FEATURES.fullmatch(features or _DEFAULT)
        if not path or known is None or any(more):
            raise ConfigurationError(f"{name}: write text:PATH, text:PATH#ham,spam or text:PATH#ham,spam#words-4096")
        names = tuple(classes.split(",")) if classes else ()
        return cls(located(path), names, known[1], int(known[2]))

    def split(self) -> tuple[Pair, Pair]:
        """Read training and test records."""
        if self.path.is_dir():
            return self._read(self.path / "train.tsv"), self._read(self.path / "test.tsv")
        x, y = self._read(self.path)
        test = np.arange(len(y)) % _TEST_EVERY == _TEST_EVERY - 1
        return (x[~test], y[~test]), (x[test], y[test])

    def site(self) -> Pair:
        """Read the records of one site: all of a file, or the training records of a folder."""
        return self._read(self.path / "train.tsv" if self.path.is_dir() else self.path)

    def _read(self, path: Path) -> Pair:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such file") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        records = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
        if not records:
            raise DataError(f"{path}: holds no texts")
        labels, texts = zip(*(self._parted(path, number, line) for number, line in records), strict=True)
        return features_of(texts, self.kind, self.size), np.array(labels, dtype=np.int64)

    def _parted(self, path: Path, number: int, line: str) -> tuple[int, str]:
        label, tab, text = line.partition("\t")
        if not tab:
            raise DataError(f"{path}: line {number} has no tab between label and text")
        if self.classes and label in self.classes:
            return self.classes.index(label), text
        if self.classes or not re.fullmatch(r"\d{1,5}", label):
            wanted = f"one of {', '.join(self.classes)}" if self.classes else "a number; name the classes after a #"
            raise DataError(f"{path}: line {number} has the label {label!r}, which must be {wanted}")
        return int(label), text


def features_of(texts: Sequence[str], kind: str, size: int) -> NDArray[np.float32]:
    """Turn texts into numbers, each by itself.

    Args:
        texts: n of them.
        kind: ``words``, ``bytes`` or ``sequence``.
        size: Number of hashes, or of words of a sequence.

    Returns:
        float32 [n, size].
    """
    features = np.zeros((len(texts), size), dtype=np.float32)
    for number, text in enumerate(texts):
        if kind == "sequence":
            found = _hashes(_words(text)[:size], VOCABULARY)
            features[number, : len(found)] = found + 1
            continue
        np.add.at(features[number], _hashes(_words(text) if kind == "words" else _runs(text), size), 1.0)
        features[number] /= max(float(np.linalg.norm(features[number])), 1.0)
    return features


def _words(text: str) -> list[bytes]:
    return [word.encode() for word in _WORD.findall(text.lower())]


def _runs(text: str) -> list[bytes]:
    data = text.encode()
    return [data[start : start + 3] for start in range(max(1, len(data) - 2))]


def _hashes(pieces: Sequence[bytes], size: int) -> NDArray[np.int64]:
    return np.array([zlib.crc32(piece) % size for piece in pieces], dtype=np.int64)


class EmbeddingBag(nn.Module):
    """The mean of the embeddings of a record's words, then a linear layer.

    Args:
        num_classes: Number of outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY + 1, _WIDTH)
        self.output = nn.Linear(_WIDTH, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map hashes [n, length] to logits [n, num_classes]."""
        words = features.clamp(0, VOCABULARY).long()
        there = (words > 0).unsqueeze(-1).float()
        mean = (self.embedding(words) * there).sum(dim=1) / there.sum(dim=1).clamp(min=1.0)
        logits: Tensor = self.output(mean)
        return logits


def embedding_bag(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Make the model for ``sequence`` features: ``task.model = "adadpigu_core.text:embedding_bag"``."""
    if len(input_shape) != 1:
        raise ConfigurationError(f"embedding_bag takes texts as sequence-LENGTH, not features of shape {input_shape}")
    return EmbeddingBag(num_classes)
