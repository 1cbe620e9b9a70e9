"""Equal clients as one."""

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adadpigu_core import datasets
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import ParameterLayout, flatten
from adadpigu_core.sampling import SeededRandomness
from server import outcome
from server.run_folder import RESULT
from server.state import ServerState
from simulations.command_line import app
from simulations.pooled import _NoiseOfAll, _pool, run
from simulations.simulate import prepare, simulate


@pytest.fixture
def settings(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 400), ("test", 200)):
        arrays[f"y_{split}"] = np.arange(count) % 2
        arrays[f"x_{split}"] = (generator.normal(size=(count, 6)) + arrays[f"y_{split}"][:, None]).astype(np.float32)
    np.savez(tmp_path / "task.npz", **arrays)
    return {
        "task.dataset": f"npz:{tmp_path / 'task.npz'}",
        "task.model": "linear",
        "federation.num-clients": 4,
        "federation.num-rounds": 10,
        "pretraining.measure": "drift",
        "pretraining.round-share": 0.2,
        "retention.initial-ratio": 0.5,
        "retention.schedule": "constant",
    }


def test_it_learns_and_repeats_itself(settings):
    configuration = parse(settings)
    first = run(configuration)
    assert first == run(configuration)
    assert first["accuracy"] > 0.7
    assert first["bytes_up"] == 4 * 4 * (2 * 14 + 8 * 7)
    assert first != run(parse({**settings, "seed": 1}))


def test_views_of_a_record_are_drawn():
    few = {"federation.num-clients": 2, "federation.num-rounds": 2}
    one = run(parse({**few, "training.views": 1, "training.augmentation": "shifts"}))
    assert one != run(parse(few))
    assert one != run(parse({**few, "training.views": 3, "training.augmentation": "shifts"}))


def test_it_is_ranked_anew_by_what_training_releases(settings):
    anew = {**settings, "pretraining.round-share": 0.0, "retention.rerank-every": 3}
    result = run(parse(anew))
    assert result["bytes_up"] == 4 * 4 * (3 * 14 + 7 * 7)
    assert result["accuracy"] > 0.7
    # from two rounds of pretraining on, what is ranked differs only where rankings do
    noisy = {**settings, "privacy.target-epsilon": 0.5, "retention.initial-ratio": 0.2}
    outcomes = {every: run(parse({**noisy, "retention.rerank-every": every})) for every in (0, 1, 8)}
    assert outcomes[0] == outcomes[8]
    assert outcomes[0]["bytes_up"] == outcomes[1]["bytes_up"]
    assert outcomes[0]["area_under_curve"] != outcomes[1]["area_under_curve"]


def test_a_rate_that_is_not_set_is_the_one_that_the_federation_would_use(settings, tmp_path):
    assert run(parse(settings))["learning_rate"] == simulated_rate(settings, tmp_path / "run")
    assert run(parse({**settings, "optimiser.local-learning-rate": 0.3}))["learning_rate"] == 0.3


def simulated_rate(settings, folder):
    simulate(prepare({**settings, "runtime.output": str(folder)}), "in-process", lambda _: None)
    return json.loads((folder / RESULT).read_text())["learning_rate"]


def releases(settings, num_clients, count=60):
    configuration = parse({**settings, "federation.num-clients": num_clients})
    pool = _pool(configuration, datasets.load(configuration.task.dataset))
    model = build(ModelSpec("linear", "relu", "none", (6,), 2), seed=0)
    state = ServerState.fresh(configuration, ParameterLayout.of(model))
    state.optimiser.reset(flatten(model))
    whole = Standardisation.identity(14)
    drawn = []
    for seed in range(count):
        object.__setattr__(configuration, "seed", seed)
        drawn.append(pool.release(state, model, whole, 5, "training"))
    return torch.stack(drawn), pool


def test_the_noise_is_that_of_all_clients_together(settings):
    """sigma C / (q n) of each of N clients, averaged over N: sqrt(N) sigma C / (q N n)."""
    drawn, pool = releases(settings, 4)
    noise = pool.plan.training.noise_multiplier
    expected = noise / (0.5 * 100) / 2
    centred = drawn - drawn.mean(dim=0)
    found = float(centred.square().sum() / (len(drawn) - 1) / 14) ** 0.5
    sampling = 0.5 / 0.5 * 400**-0.5 / 14**0.5  # at most, of gradients of norm 1
    assert expected * 0.9 < found < 1.1 * (expected**2 + sampling**2) ** 0.5
    assert not expected * 0.9 < found / 2 < 1.1 * (expected**2 + sampling**2) ** 0.5


def test_noise_does_not_depend_on_the_mask(settings):
    configuration = parse({**settings, "privacy.target-epsilon": 0.1})
    pool = _pool(configuration, datasets.load(configuration.task.dataset))
    model = build(ModelSpec("linear", "relu", "none", (6,), 2), seed=0)
    state = ServerState.fresh(configuration, ParameterLayout.of(model))
    state.optimiser.reset(flatten(model))
    whole, some = Standardisation.identity(14), torch.arange(14) % 3 > 0
    masked = Standardisation(some, whole.mean, whole.scale)
    every = torch.stack([pool.release(state, model, whole, number, "training") for number in range(1, 9)])
    part = torch.stack([pool.release(state, model, masked, number, "training") for number in range(1, 9)])
    assert part[:, ~some].eq(0).all()
    spread = every.std()
    # what is left over is what clipping to fewer coordinates changes
    assert (part - every)[:, some].std() < 0.05 * spread
    assert (part.roll(1, dims=0) - every)[:, some].std() > 0.5 * spread


def test_noise_for_retained_coordinates_may_be_asked_for_in_parts():
    mask = torch.tensor([True, False, True, True, False, True])
    expected = SeededRandomness(7, 3).normal(6)[mask.numpy()]
    noise = _NoiseOfAll(mask, 7, 3)
    assert np.array_equal(np.concatenate([noise.normal(1), noise.normal(0), noise.normal(3)]), expected)
    seeds = [source.torch_seed() for source in (_NoiseOfAll(mask, 7, 3), SeededRandomness(7, 3))]
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"federation.local-steps": 2}, "local-steps"),
        ({"pretraining.measure": "energy"}, "measure"),
        ({"pretraining.ranking": "local"}, "ranking"),
        ({"federation.partition": "dirichlet"}, "only equal ones"),
        ({"adaptive-clipping.rule": "energy", "adaptive-clipping.owner": "client"}, "owner"),
    ],
)
def test_what_cannot_be_pooled_is_refused(settings, change, problem):
    with pytest.raises(ConfigurationError, match=problem):
        run(parse({**settings, **change}))


def test_the_command(settings, tmp_path):
    arguments = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    done = CliRunner().invoke(app, ["explore", *arguments, "--rates", "0.1,0.2", "--seeds", "2"])
    assert done.exit_code == 0, done.output
    assert done.output.count("area under curve") == 2
    refused = CliRunner().invoke(app, ["explore", *arguments, "-c", "federation.local-steps=3"])
    assert refused.exit_code != 0
    for wrong in ("0.1,x", "-1", "nan", "0", "0.1,,0.2,"):
        bad = CliRunner().invoke(app, ["explore", *arguments, "--rates", wrong, "--seeds", "1"])
        assert bad.exit_code == 2, wrong
        assert "--rates: " in bad.output
    compared = CliRunner().invoke(app, ["explore", *arguments, "--seeds", "2", "--against", "method=dp-fedsgd"])
    assert "method=dp-fedsgd: rate" in compared.output
    first, second, third = (re.search(r"accuracy ([+-]?[\d.]+)", line)[1] for line in compared.output.splitlines())
    assert float(third) == pytest.approx(float(first) - float(second), abs=0.011)
    assert "standard error" in compared.output
    same = CliRunner().invoke(app, ["explore", *arguments, "--seeds", "2", "--against", "seed=1"])
    assert "difference: accuracy +0.00 ± 0.00" in same.output
    oracle = CliRunner().invoke(app, ["explore", *arguments, "-c", "pretraining.ranking=oracle", "--seeds", "1"])
    assert "NOT PRIVATE" in oracle.output


def test_runs_that_went_astray_are_counted(settings, monkeypatch):
    arguments = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    assert "runs: " not in CliRunner().invoke(app, ["explore", *arguments, "--seeds", "2"]).output
    monkeypatch.setattr(outcome, "_LOSS_OF_ACCURACY", -2.0)  # now everything is worse than what was before
    output = CliRunner().invoke(app, ["explore", *arguments, "--seeds", "2"]).output
    assert "2 of 2 runs: training has diverged" in output
    assert "lower optimiser.local-learning-rate" in output
