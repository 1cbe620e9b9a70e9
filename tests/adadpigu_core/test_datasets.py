"""Records, where they come from, and what is said when they cannot be read."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import datasets

from adadpigu_core.datasets import NAMES, DataSet, Records, check_records, is_name, load, load_records
from adadpigu_core.exceptions import ConfigurationError, DataError

needs_files = pytest.mark.skipif(
    "ADADPIGU_DATA_DIR" not in os.environ, reason="ADADPIGU_DATA_DIR does not name a folder with MNIST"
)


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def records(n=4, shape=(2,), classes=3):
    generator = torch.Generator().manual_seed(n)
    return Records(torch.rand(n, *shape, generator=generator), torch.arange(n) % classes)


def write(path, **changes):
    """Write a good archive with some arrays exchanged, or left out where the change is None."""
    arrays = {
        "x_train": np.arange(12, dtype=np.float32).reshape(6, 2),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": np.ones((2, 2)),
        "y_test": np.array([1, 0]),
    }
    arrays = {key: array for key, array in {**arrays, **changes}.items() if array is not None}
    np.savez(path, **arrays)
    return f"npz:{path}"


# Records


def test_records_have_a_length_and_can_be_selected():
    some = records(5)
    chosen = some.select([3, 0])
    assert len(some) == 5
    assert torch.equal(chosen.features, some.features[[3, 0]])
    assert chosen.labels.tolist() == [0, 0]
    assert len(some.select([])) == 0


@pytest.mark.parametrize("indices", [np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2]), (1, 2)])
def test_indices_come_in_several_types(indices):
    assert records(5).select(indices).labels.tolist() == [1, 2]


def test_read_only_indices_are_fine():
    indices = np.array([1, 2])
    indices.flags.writeable = False
    assert len(records(5).select(indices)) == 2


@pytest.mark.parametrize("indices", [np.array([True, False, True]), [0.0, 1.0]])
def test_masks_and_fractions_are_not_indices(indices):
    with pytest.raises(DataError, match="whole-number indices"):
        records(3).select(indices)


def test_selected_records_are_copies():
    some = records(3)
    some.select([0, 1, 2]).features.zero_()
    assert some.features.abs().sum() > 0


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)),
    ],
)
def test_records_of_wrong_type_or_length_are_refused(features, labels):
    with pytest.raises(DataError):
        Records(features, labels)


def test_fingerprint_is_stable():
    # A changed value would orphan every ledger that is keyed by it.
    known = Records(torch.tensor([[0.5, -1.0]]), torch.tensor([7]))
    assert known.fingerprint() == "9a015791450eb251a92e50f937bf39a639bf8293e29dc3ed1677ae03a6b8fbec"


def test_fingerprint_depends_on_content_order_and_shape_only():
    some = records(4)
    same = Records(some.features.t().contiguous().t(), some.labels.clone())
    assert same.fingerprint() == some.fingerprint()
    shaped = Records(some.features.reshape(4, 1, 2), some.labels)
    moved = Records(some.features, some.labels.roll(1))
    prints = {x.fingerprint() for x in (some, shaped, moved, some.select([1, 0, 2, 3]), some.select([]))}
    assert len(prints) == 5


# Checks against the task


def test_good_records_pass():
    check_records(records(), input_shape=(2,), num_classes=3)


@pytest.mark.parametrize(("label", "classes"), [(3, 3), (-1, 3), (2**40, 10)])
def test_label_out_of_range_is_named_in_private(label, classes):
    some = records(5)
    some.labels[2] = label
    with pytest.raises(DataError, match=rf"record 2 is {label};") as caught:
        check_records(some, input_shape=(2,), num_classes=classes)
    assert caught.value.public_message == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_feature_that_is_not_finite_is_named_in_private(value):
    some = records(5, shape=(1, 3, 3))
    some.features[4, 0, 2, 1] = value
    with pytest.raises(DataError, match="record 4 ") as caught:
        check_records(some, input_shape=(1, 3, 3), num_classes=3)
    assert caught.value.public_message == ""


def test_wrong_shape_is_public_without_the_own_shape():
    with pytest.raises(DataError, match=r"shape \[7\]") as caught:
        check_records(records(shape=(7,)), input_shape=(1, 28, 28), num_classes=3)
    assert "[1, 28, 28]" in caught.value.public_message
    assert "7" not in caught.value.public_message


def test_empty_set_is_refused():
    with pytest.raises(DataError, match="no records"):
        check_records(records(3).select([]), input_shape=(2,), num_classes=3)


# Built-in data sets


def test_digits_is_split_the_same_way_each_time(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.input_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert digits.train.fingerprint() == load("digits").train.fingerprint()
    assert (float(digits.train.features.min()), float(digits.train.features.max())) == (0.0, 1.0)
    assert digits.test.labels.bincount().min() >= 34
    check_records(digits.train, input_shape=(1, 8, 8), num_classes=10)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigurationError) as caught:
        load("minst")
    assert all(name in str(caught.value) for name in (*NAMES, "npz:PATH"))


def test_empty_path_is_a_mistake_of_configuration():
    with pytest.raises(ConfigurationError, match="needs a path"):
        load_records("npz:")


@needs_files
def test_mnist_is_read_from_the_folder_in_the_environment():
    mnist = load("mnist")
    assert mnist.train.features.shape == (60000, 1, 28, 28)
    assert mnist.test.features.shape == (10000, 1, 28, 28)
    assert mnist.train.labels[:3].tolist() == [5, 0, 4]
    assert (float(mnist.train.features.min()), float(mnist.train.features.max())) == (0.0, 1.0)


@pytest.mark.parametrize(("name", "class_name"), [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST")])
def test_without_network_the_message_says_where_to_put_files(tmp_path, monkeypatch, name, class_name):
    monkeypatch.setattr(getattr(datasets, class_name), "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError) as caught:
        load(name, root=str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "ADADPIGU_DATA_DIR" in str(caught.value)


def test_root_comes_before_the_environment(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "MNIST", lambda root, **_: asked.append(root) or 1 / 0)
    monkeypatch.setenv("ADADPIGU_DATA_DIR", str(tmp_path / "environment"))
    for root in (str(tmp_path / "argument"), None):
        with pytest.raises(DataError):
            load("mnist", root=root)
    monkeypatch.delenv("ADADPIGU_DATA_DIR")
    with pytest.raises(DataError):
        load("mnist")
    assert [Path(path).name for path in asked[::2]] == ["argument", "environment", "adadpigu"]


def test_colours_are_standardised_with_public_constants(tmp_path, monkeypatch):
    class Fake:
        data = np.tile(np.array([0, 255, 51], dtype=np.uint8), (2, 32, 32, 1))
        targets = [9, 0]  # noqa: RUF012 - torchvision's name, never changed

    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: Fake())
    cifar = load("cifar-10", root=str(tmp_path))
    assert cifar.input_shape == (3, 32, 32)
    torch.testing.assert_close(cifar.train.features[1, :, 5, 6], torch.tensor([-2.0, 2.0, -1.2]))


# The user's own files


def test_own_arrays(tmp_path):
    own = load(write(tmp_path / "own.npz"))
    assert (len(own.train), len(own.test), own.input_shape, own.num_classes) == (6, 2, (2,), 3)
    assert own.train.features[1].tolist() == [2.0, 3.0]


def test_number_of_classes_can_be_declared(tmp_path):
    assert load(write(tmp_path / "own.npz", num_classes=np.array(5))).num_classes == 5


@pytest.mark.parametrize("declared", [2, 2.5, 1, [3, 3], []])
def test_declared_number_of_classes_must_fit(tmp_path, declared):
    with pytest.raises(DataError, match=r"own\.npz"):
        load(write(tmp_path / "own.npz", num_classes=np.array(declared)))


@pytest.mark.parametrize(
    ("shape", "dtype", "expected", "scale"),
    [
        ((6, 5, 4), np.uint8, (1, 5, 4), 255),
        ((6, 5, 4, 3), np.uint8, (3, 5, 4), 255),
        ((6, 5, 4, 1), np.float64, (1, 5, 4), 1),
        ((6, 3, 5, 3), np.float32, (3, 5, 3), 1),
        ((6, 5, 4, 2), np.int16, (5, 4, 2), 1),
        ((6, 5), np.bool_, (5,), 1),
        ((6, 2, 2, 2, 3), np.int64, (2, 2, 2, 3), 1),
    ],
)
def test_arrays_become_features_by_type_and_shape(tmp_path, shape, dtype, expected, scale):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    train = load_records(write(tmp_path / "own.npz", x_train=x))
    assert tuple(train.features.shape[1:]) == expected
    moved = np.moveaxis(x, 3, 1) if expected in ((3, 5, 4), (1, 5, 4)) and x.ndim == 4 else x
    np.testing.assert_allclose(train.features.numpy().ravel(), moved.ravel() / scale, rtol=1e-6)


@pytest.mark.parametrize("keys", [("x_train", "y_train"), ("x", "y")])
def test_a_client_needs_training_arrays_only(tmp_path, keys):
    np.savez(tmp_path / "mine.npz", **{keys[0]: np.ones((3, 2)), keys[1]: np.array([2.0, 0.0, 1.0])})
    assert load_records(f"npz:{tmp_path}/mine.npz").labels.tolist() == [2, 0, 1]


def test_paths_are_relative_or_start_at_home(tmp_path, monkeypatch):
    write(tmp_path / "own.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_records("npz:own.npz")) == len(load_records("npz:~/own.npz")) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_train": None}, ["y_train", "numpy.savez"]),
        ({"x_train": np.array([{}] * 6, dtype=object)}, ["x_train", "numpy.savez"]),
        ({"x_train": np.array([["a", "b"]] * 6)}, ["x_train", "numbers"]),
        ({"x_train": np.ones((6, 2), dtype=complex)}, ["x_train", "numbers"]),
        ({"y_train": np.array([0, 1, 2.5, 0, 1, 2])}, ["y_train[2]", "2.5"]),
        ({"y_train": np.array([0, 1, 2, 0, np.nan, 2])}, ["y_train[4]", "nan"]),
        ({"y_train": np.array([0, 1, 2, 0, 1, 1e30])}, ["y_train[5]", "1e+30"]),
        ({"y_train": np.array([0, 1])}, ["x_train", "y_train", "[6, 2]", "[2]"]),
        ({"y_train": np.zeros((6, 1), dtype=int)}, ["y_train", "[6, 1]"]),
        ({"x_train": np.float32(1)}, ["x_train"]),
        ({"x_test": np.ones((2, 3))}, ["x_test", "[3]"]),
        ({"x_test": np.array([[1, 1], [np.nan, 1]])}, ["x_test", "record 1"]),
        ({"x_train": np.full((6, 2), 1e300)}, ["x_train", "record 0"]),
        ({"y_train": np.array([0, 1, -1, 0, 1, 1])}, ["y_train", "record 2 is -1"]),
        ({"x_test": np.ones((0, 2)), "y_test": np.ones(0)}, ["x_test", "no records"]),
        ({"y_train": np.zeros(6), "y_test": np.zeros(2)}, ["num_classes", "[1]"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, changes, words):
    source = write(tmp_path / "own.npz", **changes)
    with pytest.raises(DataError) as caught:
        load(source)
    assert all(word in str(caught.value) for word in [str(tmp_path / "own.npz"), *words])
    assert caught.value.public_message == ""


def test_missing_file_single_array_and_folder(tmp_path):
    np.save(tmp_path / "single.npy", np.ones(3))
    for name, words in (("none.npz", "no such file"), ("single.npy", "numpy.savez"), ("", "cannot be read")):
        with pytest.raises(DataError, match=words):
            load_records(f"npz:{tmp_path}/{name}")


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    (tmp_path / "trap.npz").write_bytes(pickle.dumps(Trap()))
    np.savez(tmp_path / "inside.npz", x=np.array([[Trap()]], dtype=object), y=np.array([0]))
    for name in ("trap.npz", "inside.npz"):
        with pytest.raises(DataError):
            load_records(f"npz:{tmp_path}/{name}")
    assert not (tmp_path / "sprung").exists()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_unchanged(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    good = load_records(write(folder / "own.npz")).fingerprint()
    raw = bytearray((folder / "own.npz").read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1), label="length")]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1), label="position")] ^= data.draw(st.integers(1, 255))
    (folder / "own.npz").write_bytes(raw)
    try:
        found = load_records(f"npz:{folder}/own.npz").fingerprint()
    except DataError:
        return
    assert found == good


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Install a module with a function ``load`` of this body; gives its name as a source."""
    monkeypatch.syspath_prepend(tmp_path)
    names = (f"own_records_{number}" for number in itertools.count())
    made = []

    def make(body):
        made.append(next(names))
        (tmp_path / f"{made[-1]}.py").write_text(f"import numpy as np\nimport torch\ndef load():\n    {body}\n")
        return f"python:{made[-1]}:load"

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_records_of_a_function_keep_their_shape(function):
    source = function(
        "return {'x_train': np.ones((6, 3, 7)), 'y_train': [0, 1, 2, 0, 1, 2], "
        "'x_test': torch.ones(2, 3, 7), 'y_test': torch.tensor([0, 1]), 'num_classes': 4, 'more': 'text'}"
    )
    data = load(source)
    assert data.input_shape == (3, 7)
    assert data.num_classes == 4
    assert len(load_records(source)) == len(data.train) == 6


def test_a_site_of_a_function(function):
    records = load_records(function("return {'x': np.full((4, 2, 3, 3), 255, dtype=np.uint8), 'y': np.arange(4)}"))
    assert records.features.shape == (4, 2, 3, 3)
    assert bool((records.features == 1).all())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return {'x_train': np.ones((6, 2))}", ["x_train", "y_test", "give arrays"]),
        ("return [1, 2]", ["must give arrays by name", "AttributeError"]),
        ("raise OSError('no such share')", ["it failed", "no such share"]),
        ("return dict.fromkeys(('x_train', 'y_train', 'x_test', 'y_test'), np.array(['a']))", ["x_train", "numbers"]),
        ("return dict.fromkeys(('x_train', 'y_train', 'x_test', 'y_test'), np.full((2, 2), np.nan))", ["y_train"]),
        ("return sys", ["it failed", "NameError"]),
        ("return {", ["cannot be imported"]),
    ],
)
def test_what_is_wrong_with_a_function_is_named(function, body, words):
    source = function(body)
    with pytest.raises(DataError) as caught:
        load(source)
    assert all(word in str(caught.value) for word in [source, *words]), str(caught.value)
    assert caught.value.public_message == ""


@pytest.mark.parametrize("path", ["", "load", "a:b:c", "os.system('x'):load", "../records.py:load"])
def test_a_function_needs_an_import_path(path):
    assert not is_name(f"python:{path}")
    with pytest.raises(DataError, match="import path"):
        load_records(f"python:{path}")


def test_import_is_light():
    code = "import sys, adadpigu_core.datasets; print({'torchvision', 'sklearn'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
