"""Files of weights: what was packed comes back, and nothing else gets in."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adadpigu_core import model_file
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import ModelSpec, build


def network(seed=0):
    return build(ModelSpec("linear", "relu", "none", (3,), 2), seed=seed)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "start.npz"


class Named(nn.Module):
    """Parameters of given names and shapes."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


shapes = st.dictionaries(
    st.sampled_from(["a", "b", "file", "allow_pickle", "values", "größe"]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    min_size=1,
)


@given(shapes, st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_what_was_packed_comes_back(tmp_path_factory, shapes, seed):
    torch.manual_seed(seed)
    first, second = Named(shapes), Named(shapes)
    path = tmp_path_factory.mktemp("round") / "start.npz"
    path.write_bytes(model_file.pack(first))
    assert model_file.load(path, second) == ()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert model_file.pack(first) == model_file.pack(second)


def test_other_programs_write_it_with_numpy(path):
    first, second = network(1), network(2)
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in first.state_dict().items()})
    assert model_file.load(path, second) == ()
    assert model_file.pack(first) == model_file.pack(second)


def test_other_orders_of_memory_are_the_same_array(path):
    first, second = network(1), network(2)
    np.savez(path, **{name: np.asfortranarray(tensor.numpy()) for name, tensor in first.state_dict().items()})
    model_file.load(path, second)
    assert model_file.pack(first) == model_file.pack(second)


def test_frozen_parameters_and_buffers_are_in_it(path):
    def model(seed):
        made = nn.Sequential(network(seed), nn.Linear(2, 2))
        made[1].weight.requires_grad_(False)
        made.register_buffer("offset", torch.full((2,), float(seed)))
        made.register_buffer("count", torch.tensor(seed))
        return made

    path.write_bytes(model_file.pack(model(1)))
    loaded = model(2)
    assert model_file.load(path, loaded) == ()
    assert torch.equal(loaded[1].weight, torch.from_numpy(np.load(path)["1.weight"]))
    assert loaded.offset.tolist() == [1, 1]
    assert int(loaded.count) == 2  # follows from the code alone


def test_what_a_file_lacks_stays_as_it_is_and_is_named(path):
    model = network(1)
    np.savez(path, **{"output.weight": np.ones((2, 3), np.float32)})
    bias = model.output.bias.detach().clone()
    assert model_file.load(path, model) == ("output.bias",)
    assert torch.equal(model.output.weight, torch.ones(2, 3))
    assert torch.equal(model.output.bias, bias)


def test_one_name_of_a_shared_parameter_is_enough(path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    np.savez(path, **{"1.weight": np.ones((2, 2), np.float32)})
    assert model_file.load(path, model) == ()
    assert torch.equal(model[0].weight, torch.ones(2, 2))


WEIGHT = np.ones((2, 3), np.float32)
GOOD = {"output.weight": WEIGHT}


class Evil:
    """Says so if anybody unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def claiming(shape):
    """A member that says it is far larger than what follows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", r"cannot be read.*numpy\.savez"),
        (b"weights", "cannot be read"),
        (npz(**GOOD)[:-30], "cannot be read"),
        (npz(**GOOD).replace(np.float32(1).tobytes(), np.float32(2).tobytes(), 1), "cannot be read.*CRC"),
        (npz(), "holds no parameters"),
        (npz(**GOOD, nonsense=WEIGHT), r"'nonsense' is no parameter of the model; it has output\.weight, output\.bias"),
        (zipped(**GOOD | {"output.weight": b"no array"}), "cannot be read"),
        (npz(**{"output.weight": WEIGHT.astype(np.float64)}), "output.weight holds float64 values; store float32"),
        (npz(**{"output.weight": WEIGHT.astype(">f4")}), "output.weight holds >f4"),
        (npz(**{"output.weight": np.ones((2, 3), int)}), "output.weight holds int64"),
        (npz(**{"output.weight": np.array([Evil()], object)}), "output.weight holds object values"),
        (npz(**{"output.weight": WEIGHT.T}), r"output.weight has shape \(3, 2\), and the model's has \(2, 3\); leave"),
        (npz(**{"output.weight": WEIGHT[0]}), r"has shape \(3,\)"),
        (npz(**{"output.weight": WEIGHT * np.nan}), "output.weight is not finite everywhere"),
        (npz(**{"output.weight": WEIGHT * np.inf}), "output.weight is not finite everywhere"),
        (zipped(**{"output.weight": claiming((10**12,))}), r"has shape \(1000000000000,\)"),
        (zipped(**{"output.weight": claiming((2, 3))}), "cannot be read"),
        (zipped(**{"output.weight": npy(WEIGHT) + b"more"}), "longer than its shape says"),
        (zipped(**{"output.weight": b"\x93NUMPY\x09\x00" + npy(WEIGHT)[8:]}), "cannot be read|unknown format"),
    ],
)
def test_whatever_is_wrong_is_named_and_the_model_stays_as_it_is(path, data, problem):
    path.write_bytes(data)
    model = network(1)
    before = model_file.pack(model)
    with pytest.raises(ConfigurationError, match=rf"^task\.weights: {path}: .*({problem})"):
        model_file.load(path, model)
    assert model_file.pack(model) == before


def test_nothing_is_taken_from_a_file_of_which_one_part_is_bad(path):
    np.savez(path, **{"output.weight": WEIGHT, "output.bias": np.full(2, np.nan, np.float32)})
    model = network(1)
    before = model_file.pack(model)
    with pytest.raises(ConfigurationError, match=r"output\.bias"):
        model_file.load(path, model)
    assert model_file.pack(model) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile says what the test does on purpose
def test_a_name_that_is_there_twice(path):
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("output.weight.npy", npy(WEIGHT))
    with pytest.raises(ConfigurationError, match=r"output\.weight is there several times"):
        model_file.load(path, network())


def test_no_file_and_a_folder(path, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^task\.weights: .*there is no such file; correct the path"):
        model_file.load(path, network())
    with pytest.raises(ConfigurationError, match=r"^task\.weights: .*cannot be read"):
        model_file.load(tmp_path, network())
