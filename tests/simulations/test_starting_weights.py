"""Simulations that start from public weights: paths, checks before a folder is made, and equal clients as one."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from adadpigu_core import datasets
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import build
from adadpigu_core.settings_file import read_toml
from server import public_digits
from server.app import model_spec
from server.evaluation import evaluator
from server.run_folder import CONFIGURATION, MODEL
from simulations import doctor_server, pooled
from simulations.display import introduce
from simulations.oracle import oracle_scores
from simulations.simulate import prepare, read_settings, resolved, simulate


@pytest.fixture
def settings(tmp_path):
    """Ten classes of images, whose bright row says which."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 200), ("test", 100)):
        arrays[f"y_{split}"] = np.arange(count) % 10
        arrays[f"x_{split}"] = generator.random((count, 1, 10, 10)).astype(np.float32)
        arrays[f"x_{split}"][np.arange(count), 0, np.arange(count) % 10] += 1
    np.savez(tmp_path / "task.npz", **arrays)
    return {
        "task.dataset": f"npz:{tmp_path / 'task.npz'}",
        "task.model": "linear",
        "task.weights": "public-digits",
        "federation.num-clients": 2,
        "federation.num-rounds": 2,
        "optimiser.local-learning-rate": 1e-9,
        "runtime.output": str(tmp_path / "run"),
        "runtime.workers": 1,
    }


def test_equal_clients_as_one_start_where_the_federation_does(settings, tmp_path):
    configuration = parse(settings)
    data = datasets.load(configuration.task.dataset)
    spec = model_spec(configuration, data)
    start = public_digits.trained(spec, 0)
    wanted = evaluator(build(spec, seed=0), data.test)(start)
    result = simulate(prepare(settings), "in-process", lambda _: None)
    assert (result["accuracy"], result["loss"]) == (wanted.accuracy, pytest.approx(wanted.loss, rel=1e-4))
    as_one = pooled.run(configuration)
    assert (as_one["accuracy"], as_one["loss"]) == (wanted.accuracy, pytest.approx(wanted.loss, rel=1e-4))
    assert np.load(tmp_path / "run" / MODEL)["output.bias"] == pytest.approx(start[-10:].numpy(), abs=1e-5)


def test_rates_from_the_plan_are_those_of_these_weights(settings):
    settings = {**settings, "optimiser.local-learning-rate": 0.0}
    from_digits = pooled.run(parse(settings))["learning_rate"]
    assert simulate(prepare(settings), "in-process", lambda _: None)["learning_rate"] == pytest.approx(from_digits)


def test_an_oracle_looks_at_these_weights(settings, monkeypatch):
    """Gradients at other weights would rank other coordinates."""
    seen = []
    monkeypatch.setattr(
        pooled, "oracle_scores", lambda _, model, rate: seen.append(model) or oracle_scores(_, model, rate)
    )
    changes = {"pretraining.ranking": "oracle", "optimiser.local-learning-rate": 1e-9}
    configuration = parse({**settings, **changes})
    pooled.run(configuration)
    spec = model_spec(configuration, datasets.load(configuration.task.dataset))
    assert torch.allclose(seen[0].output.bias, public_digits.trained(spec, 0)[-10:], atol=1e-5)


def test_a_bad_file_is_found_before_a_folder_is_made(settings, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^task\.weights: .*there is no such file"):
        prepare({**settings, "task.weights": str(tmp_path / "none.npz")})
    assert not (tmp_path / "run").exists()


def test_a_path_in_a_file_of_settings_is_beside_it_and_on_the_command_line_here(settings, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for written, wanted in (("start.npz", tmp_path / "sub" / "start.npz"), ("public-digits", "public-digits")):
        (tmp_path / "sub" / "run.toml").write_text(f'[task]\nweights = "{written}"\n')
        assert read_settings(tmp_path / "sub" / "run.toml")["task.weights"] == str(wanted)
    monkeypatch.chdir(tmp_path)
    for given, wanted in (("start.npz", str(tmp_path / "start.npz")), ("public-digits", "public-digits"), ("", "")):
        assert resolved(parse({**settings, "task.weights": given})).task.weights == wanted
    np.savez(tmp_path / "start.npz", **{"output.bias": np.zeros(10, np.float32)})
    prepare({**settings, "task.weights": "start.npz"})
    assert parse(read_toml(tmp_path / "run" / CONFIGURATION)).task.weights == str(tmp_path / "start.npz")


@pytest.mark.parametrize("weights", ["", "public-digits"])
def test_whoever_starts_a_run_is_told_what_no_epsilon_covers(settings, weights):
    output = io.StringIO()
    introduce(Console(file=output), parse({**settings, "task.weights": weights}), [100], done=0)
    assert ("starts from public-digits, which must be public" in output.getvalue()) == bool(weights)


def test_the_doctor_looks_at_them(settings, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'[task]\ndataset = "{settings["task.dataset"]}"\nmodel = "linear"\nweights = "none.npz"\n'
    )
    with pytest.raises(ConfigurationError, match="there is no such file"):
        list(doctor_server._settings(tmp_path / "run.toml"))
