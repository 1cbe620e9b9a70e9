"""Where relative paths of data sets lead."""

from pathlib import Path

import numpy as np
import pytest

from adadpigu_core import datasets
from adadpigu_core.data_dir import located
from adadpigu_core.exceptions import DataError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("ADADPIGU_DATA_DIR", str(data))
    return here, data


def test_the_current_directory_comes_first(folders):
    here, data = folders
    (data / "file").touch()
    assert located("file") == data / "file"
    (here / "file").touch()
    assert located("file") == here / "file"


def test_what_is_nowhere_is_looked_for_here(folders, monkeypatch):
    here, data = folders
    assert located("file") == here / "file"
    monkeypatch.delenv("ADADPIGU_DATA_DIR")
    (data / "file").touch()
    assert located("file") == here / "file"


def test_absolute_paths_stay(folders):
    _, data = folders
    (data / "file").touch()
    assert located("/nowhere/file") == Path("/nowhere/file")
    assert located(str(data / "file")) == data / "file"


def test_texts_and_arrays_are_found(folders):
    _, data = folders
    (data / "mail.tsv").write_text("".join(f"{label}\tgood morning {label}\n" for label in "0110011001"), "utf-8")
    assert datasets.load("text:mail.tsv##words-64").input_shape == (64,)
    x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1])
    np.savez(data / "records.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert datasets.load("npz:records.npz").input_shape == (3,)
    with pytest.raises(DataError, match="other"):
        datasets.load("npz:other.npz")
