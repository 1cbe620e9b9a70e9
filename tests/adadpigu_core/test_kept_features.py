"""Features of public records that are kept on disk."""

import numpy as np
import pytest
import torch

from adadpigu_core import front_ends, kept_features
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.kept_features import FOLDER_VARIABLE, keeping_in, public_features
from adadpigu_core.kept_features import folder as folder_of_features


def records(seed=0, n=3):
    generator = torch.Generator().manual_seed(seed)
    return Records(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def computed(monkeypatch):
    calls, features = [], front_ends.features
    monkeypatch.setattr(front_ends, "features", lambda *given: calls.append(given) or features(*given))
    return calls


def same(one, other):
    return torch.equal(one.features, other.features) and torch.equal(one.labels, other.labels)


def test_nothing_is_written_unless_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert same(public_features("scattering", records()), front_ends.applied("scattering", records()))
    assert list(tmp_path.iterdir()) == []


def test_raw_records_are_not_copied(folder):
    one = records()
    assert public_features("raw", one) is one
    assert not folder.exists()


def test_features_are_computed_once_for_the_same_records(folder, computed):
    first = public_features("scattering", records())
    assert same(first, public_features("scattering", records()))
    assert len(computed) == 1
    assert same(first, front_ends.applied("scattering", records()))
    assert same(public_features("scattering", records(1)), front_ends.applied("scattering", records(1)))
    assert len(list(folder.iterdir())) == 2


def test_another_version_of_the_front_end_computes_anew(folder, computed, monkeypatch):
    public_features("scattering", records())
    monkeypatch.setattr(kept_features, "_version", lambda: "another")
    public_features("scattering", records())
    assert len(computed) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "other shape", "other type", "pickle"])
def test_a_file_that_is_not_what_it_should_be_is_made_again(folder, computed, damage):
    wanted = public_features("scattering", records())
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        shape = wanted.features.shape if damage == "other type" else (3, 2)
        np.save(path, np.zeros(shape, dtype=np.float64 if damage == "other type" else np.float32))
    assert same(public_features("scattering", records()), wanted)
    assert len(computed) == 2
    assert path.read_bytes() == content


def test_a_failed_write_leaves_nothing_behind(folder, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", broken)
    with pytest.raises(ConfigurationError, match=f"{FOLDER_VARIABLE}.*disk full.*name a folder"):
        public_features("scattering", records())
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_is_an_error_that_names_the_variable(folder):
    folder.write_text("a file")
    with pytest.raises(ConfigurationError, match=FOLDER_VARIABLE):
        public_features("scattering", records())


def test_files_are_for_their_owner_alone(folder):
    public_features("scattering", records())
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o077 == 0


def test_a_folder_is_named_for_a_while_and_the_user_has_the_say(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with keeping_in(tmp_path):
        assert folder_of_features() == tmp_path
    assert folder_of_features() is None
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "own"))
    with keeping_in(tmp_path):
        assert folder_of_features() == tmp_path / "own"
    assert folder_of_features() == tmp_path / "own"
