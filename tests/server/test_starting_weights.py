"""Runs that start from weights which are there already, and models of which a part is not trained."""

import sys

import numpy as np
import pytest
import torch

import client.node
from adadpigu_core import model_file
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import flatten, flatten_fixed
from server.run_folder import CHECKPOINT, MODEL, RunFolder
from server.starting_weights import check_start, start_from

NETWORK = """
import torch
from torch import nn

def net(input_shape, num_classes):
    model = nn.Sequential(nn.Linear(input_shape[0], 5), nn.Tanh(), nn.Linear(5, num_classes))
    model[0].requires_grad_(False)
    model.register_buffer("offset", torch.randn(2))
    return model
"""


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    """A factory whose first layer is random and not trained."""
    (tmp_path / "frozen_networks.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield "frozen_networks:net"
    sys.modules.pop("frozen_networks", None)


@pytest.fixture
def settings(npz, tmp_path, kit):
    return {
        **kit.SETTINGS,
        "task.dataset": npz,
        "task.model": "linear",
        "privacy.target-epsilon": 4.0,
        "seed": 7,
        "runtime.output": str(tmp_path / "run"),
    }


@pytest.fixture
def trained_on(monkeypatch):
    """What models clients have taken a step from: by step, trainable and fixed values."""
    seen = []
    train = client.node.train_round

    def watching(model, *arguments, **options):
        seen.append((flatten(model), flatten_fixed(model)))
        return train(model, *arguments, **options)

    monkeypatch.setattr(client.node, "train_round", watching)
    return seen


def still(settings):
    """Settings under which weights stay where they are."""
    return {**settings, "optimiser.local-learning-rate": 1e-30}


def write(path, **arrays):
    np.savez(path, **{name.replace("__", "."): np.array(array, np.float32) for name, array in arrays.items()})
    return str(path)


def test_a_run_starts_from_a_file(run, settings, trained_on, tmp_path):
    path = write(tmp_path / "start.npz", output__weight=[[1, 2, 3], [4, 5, 6]], output__bias=[7, 8])
    run({**still(settings), "task.weights": path})
    assert {tuple(weights.tolist()) for weights, _ in trained_on} == {(1, 2, 3, 4, 5, 6, 7, 8)}


def test_a_run_starts_from_the_model_of_an_earlier_one(run, settings, trained_on, tmp_path):
    first = run({**settings, "runtime.output": str(tmp_path / "first")})
    model = tmp_path / "first" / MODEL
    trained_on.clear()
    second = run({**still(settings), "task.weights": str(model)})
    assert (second["accuracy"], second["loss"]) == (first["accuracy"], pytest.approx(first["loss"]))
    assert torch.equal(trained_on[0][0], torch.from_numpy(RunFolder(model.parent).load_checkpoint()[0]["weights"]))
    assert model.read_bytes() == (tmp_path / "run" / MODEL).read_bytes()


def test_a_layer_that_is_not_retained_gets_no_noise_and_sends_nothing(run, settings, tmp_path):
    """Where nothing is released for a ranking, layers outside the mask stay as they are, to the bit."""
    changes = {
        "pretraining.round-share": 0.0,
        "pretraining.ranking": "random",
        "retention.granularity": "layer",
        "retention.schedule": "constant",
        "retention.initial-ratio": 0.1,
        "adaptive-clipping.rule": "none",
        "task.model": "mlp",
    }
    path = tmp_path / "start.npz"
    spec = ModelSpec("mlp", "relu", "none", (3,), 2)
    path.write_bytes(model_file.pack(build(spec, seed=1)))
    result = run({**settings, **changes, "task.weights": str(path)})
    before, after = np.load(path), np.load(tmp_path / "run" / MODEL)
    moved = {name for name in before.files if not np.array_equal(before[name], after[name])}
    assert moved == {"output.bias"}
    assert result["bytes_up"] < result["bytes_down"] / 5


def test_what_a_file_lacks_starts_at_random_and_is_logged(settings, tmp_path, caplog):
    path = write(tmp_path / "start.npz", output__weight=np.ones((2, 3)))
    spec = ModelSpec("linear", "relu", "none", (3,), 2)
    model = build(spec, seed=7)
    start_from(model, spec, parse({**settings, "task.weights": path}))
    assert "no output.bias: there the model starts at random" in caplog.text
    assert torch.equal(model.output.bias, build(spec, seed=7).output.bias)


@pytest.mark.parametrize("start", ["random", "file"])
def test_clients_train_the_network_that_the_server_evaluates(run, settings, frozen, trained_on, tmp_path, start):
    """A client draws parameters anew when it builds a model; of those that are not trained it must not keep any."""
    settings = {**settings, "task.model": frozen, "retention.granularity": "layer"}
    if start == "file":
        path = write(tmp_path / "start.npz", **{"0__weight": np.ones((5, 3)), "offset": [1, 2]})
        settings["task.weights"] = path
    run(settings)
    spec = ModelSpec(frozen, "relu", "none", (3,), 2)
    wanted = build(spec, seed=7)
    start_from(wanted, spec, parse(settings))
    assert len(trained_on) == 8
    assert all(torch.equal(fixed, flatten_fixed(wanted)) for _, fixed in trained_on)
    assert not torch.equal(flatten_fixed(wanted), flatten_fixed(build(spec, seed=0)))  # what a client draws
    final = np.load(tmp_path / "run" / MODEL)
    np.testing.assert_array_equal(final["0.weight"], wanted[0].weight.detach().numpy())


def test_a_run_goes_on_without_the_file(kit, run, settings, frozen, trained_on, tmp_path):
    """Start, ranking and what is not trained are those of the checkpoint."""
    path = write(tmp_path / "start.npz", **{"0__weight": np.ones((5, 3)), "2__bias": [3, -3]})
    settings = {**settings, "task.model": frozen, "task.weights": path}
    whole = run({**settings, "runtime.output": str(tmp_path / "whole")})
    wanted = list(trained_on)
    with pytest.raises(kit.KilledError):
        run(settings, crash_in=1)
    (tmp_path / "start.npz").unlink()
    trained_on.clear()
    with pytest.raises(kit.KilledError):
        run(settings, crash_in=3)
    again = run(settings)
    assert (again["accuracy"], again["loss"]) == (whole["accuracy"], whole["loss"])
    assert all(torch.equal(fixed, wanted[0][1]) for _, fixed in trained_on)
    for name in (CHECKPOINT, MODEL):
        one, other = np.load(tmp_path / "whole" / name), np.load(tmp_path / "run" / name)
        for key in set(one.files) - {"values.json"}:
            np.testing.assert_array_equal(one[key], other[key])


def test_a_public_ranking_is_that_of_the_first_weights_also_when_a_run_goes_on(kit, run, settings, tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 20)):
        arrays[f"y_{split}"] = np.arange(count) % 10
        arrays[f"x_{split}"] = generator.random((count, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", **arrays)
    start = np.zeros((10, 64), np.float32)
    start[3] = 5.0  # of one class the outputs are sure, so that gradients are not those of random weights
    changes = {"task.dataset": f"npz:{tmp_path / 'images.npz'}", "pretraining.ranking": "public"}
    settings = {**settings, **changes, "task.weights": write(tmp_path / "start.npz", output__weight=start)}
    run({**settings, "runtime.output": str(tmp_path / "whole")})
    with pytest.raises(kit.KilledError):
        run(settings, crash_in=2)
    (tmp_path / "start.npz").unlink()
    run(settings)
    scores = [RunFolder(tmp_path / name).load_checkpoint()[0]["importance."] for name in ("whole", "run")]
    np.testing.assert_array_equal(*scores)
    assert (tmp_path / "whole" / MODEL).read_bytes() == (tmp_path / "run" / MODEL).read_bytes()


def test_a_run_does_not_go_on_with_other_weights(run, settings, tmp_path):
    run(settings)
    with pytest.raises(ConfigurationError, match=r"task\.weights = ''; use these"):
        run({**settings, "task.weights": str(tmp_path / "other.npz")})


def test_a_bad_file_ends_a_run_before_it_begins(run, settings, tmp_path):
    path = write(tmp_path / "start.npz", output__weight=np.ones((2, 4)))
    with pytest.raises(ConfigurationError, match=r"^task\.weights: .*output\.weight has shape \(2, 4\)"):
        run({**settings, "task.weights": path})
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_public_digits_where_they_fit_and_where_they_do_not(settings):
    spec = ModelSpec("linear", "relu", "none", (1, 8, 8), 10)
    configuration = parse({**settings, "task.weights": "public-digits"})
    check_start(spec, configuration)
    model = build(spec, seed=7)
    start_from(model, spec, configuration)
    assert not torch.equal(flatten(model), flatten(build(spec, seed=7)))
    with pytest.raises(ConfigurationError, match=r"^task\.weights: public-digits"):
        check_start(ModelSpec("linear", "relu", "none", (3,), 2), configuration)
