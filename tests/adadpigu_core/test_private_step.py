import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adadpigu_core.accounting import Event
from adadpigu_core.adaptive_clipping import AdaptiveClipping, FixedStatistics, RunningStatistics
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError, ModelError
from adadpigu_core.gradients import cross_entropy
from adadpigu_core.parameters import ParameterLayout, assign, flatten
from adadpigu_core.private_step import private_step
from adadpigu_core.sampling import SeededRandomness

KINDS = ("linear", "mlp", "cnn")


def dimension(model):
    return ParameterLayout.of(model).num_parameters


# ---- the mechanism


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"phase": "testing"}, "phase"),
        ({"clipping_norm": 0.0}, "clipping_norm"),
        ({"clipping_norm": -1.0}, "clipping_norm"),
        ({"clipping_norm": math.nan}, "clipping_norm"),
        ({"clipping_norm": math.inf}, "clipping_norm"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": 1.1}, "sampling_probability"),
        ({"sampling_probability": math.nan}, "sampling_probability"),
        ({"num_records": 0}, "num_records"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(mechanism, changes, name):
    with pytest.raises(ConfigurationError, match=name):
        mechanism(10, **changes)


def test_the_numbers_that_follow(mechanism, plain):
    chosen = mechanism(40, clipping_norm=3.0, noise_multiplier=2.0, sampling_probability=0.25)
    assert chosen.expected_batch_size == 10
    assert chosen.sum_noise_stddev == 6
    assert chosen.noise_stddev == 0.6
    assert chosen.event == Event("training", 2.0, 0.25, 1)
    assert (plain(40).sum_noise_stddev, plain(40).noise_stddev) == (0, 0)


# ---- limits of DESIGN.md, section 3


def textbook_dp_sgd(model, records, chosen, randomness, record_gradients):
    """Abadi et al. 2016, algorithm 1 with Poisson sampling, in float64 and with plain autograd."""
    drawn = np.flatnonzero(randomness.uniform(len(records)) < chosen.sampling_probability)
    randomness.torch_seed()
    total = torch.zeros(dimension(model), dtype=torch.float64)
    for gradient in record_gradients(model, records.select(drawn)):
        total += gradient / max(1.0, float(gradient.norm()) / chosen.clipping_norm)
    total += chosen.noise_multiplier * chosen.clipping_norm * torch.from_numpy(randomness.normal(len(total)))
    return total / (chosen.sampling_probability * chosen.num_records)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clipping_norm", [0.05, 1.0])
@pytest.mark.parametrize("noise_multiplier", [0.3, 2.0])
def test_neutral_steps_are_textbook_dp_sgd(
    step, mechanism, make_model, make_records, record_gradients, kind, clipping_norm, noise_multiplier
):
    """To float32 rounding: 1e-5 of the clipping norm after four steps."""
    model, other, records = make_model(kind), make_model(kind), make_records(kind, 16)
    chosen = mechanism(16, clipping_norm=clipping_norm, noise_multiplier=noise_multiplier)
    ours, theirs = SeededRandomness(5), SeededRandomness(5)
    for _ in range(4):
        release, _, _ = step(model, records, chosen, ours)
        expected = textbook_dp_sgd(other, records, chosen, theirs, record_gradients)
        assert torch.allclose(release.gradient.double(), expected, rtol=1e-5, atol=1e-5 * clipping_norm)
        assign(model, flatten(model) - 0.5 * release.gradient)
        assign(other, flatten(other) - 0.5 * expected.float())


@pytest.mark.parametrize("rule", ["none", "energy", "paper"])
def test_statistics_before_anything_was_released_change_no_bit(step, mechanism, make_model, make_records, rule):
    model, records = make_model("mlp"), make_records("mlp", 16)
    running = RunningStatistics.neutral(AdaptiveClipping(rule=rule, centre=True), ParameterLayout.of(model))
    one, _, _ = step(model, records, mechanism(16), SeededRandomness(5))
    other, _, _ = step(model, records, mechanism(16), SeededRandomness(5), statistics=running)
    assert torch.equal(one.gradient, other.gradient)
    assert torch.equal(one.noise_stddev, other.noise_stddev)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probability", [1.0, 0.4])
@pytest.mark.parametrize("scaled", [False, True])
def test_without_noise_and_clipping_it_is_sgd(step, plain, make_model, make_records, kind, probability, scaled):
    """To float32 rounding, for any scale; with probability 1 it is full-batch SGD on the mean loss."""
    model, other, records = make_model(kind), make_model(kind), make_records(kind, 12)
    d = dimension(model)
    statistics = FixedStatistics(torch.zeros(d), torch.linspace(0.1, 10, d) if scaled else torch.ones(d))
    optimiser = torch.optim.SGD(other.parameters(), lr=0.3)
    ours, theirs = SeededRandomness(5), SeededRandomness(5)
    for _ in range(5):
        release, _, _ = step(model, records, plain(12, sampling_probability=probability), ours, statistics=statistics)
        assign(model, flatten(model) - 0.3 * release.gradient)
        drawn = records.select(np.flatnonzero(theirs.uniform(12) < probability))
        theirs.torch_seed()
        optimiser.zero_grad()
        if probability == 1:
            loss = F.cross_entropy(other(drawn.features), drawn.labels)
        else:
            loss = F.cross_entropy(other(drawn.features), drawn.labels, reduction="sum") / (12 * probability)
        loss.backward()
        optimiser.step()
        assert torch.allclose(flatten(model), flatten(other), rtol=1e-5, atol=1e-6)


def test_the_mean_is_given_back_whole(step, plain, make_model, make_records, record_gradients):
    """With every record drawn, without noise and clipping, centring cancels."""
    model, records = make_model("mlp"), make_records("mlp", 12)
    d = dimension(model)
    statistics = FixedStatistics(torch.linspace(-1, 1, d), torch.linspace(0.1, 10, d))
    release, _, _ = step(
        model, records, plain(12, sampling_probability=1.0), SeededRandomness(5), statistics=statistics
    )
    expected = torch.stack(record_gradients(model, records)).mean(0)
    assert torch.allclose(release.gradient.double(), expected, atol=1e-5)


# ---- the formula


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([0.0, 1.0, 3.0]))
def test_the_release_is_the_formula(
    step, mechanism, make_model, make_records, make_standardisation, contributions_of, kind, seed, retained, spread
):
    """ghat = m (a + b (S + noise) / B) with S from the oracle."""
    model, records = make_model(kind, seed), make_records(kind, 6, seed)
    given_ = make_standardisation(model, seed, retained=retained, spread=spread)
    chosen = mechanism(9, clipping_norm=0.7, noise_multiplier=0.4)  # declared 9, has 6
    randomness = SeededRandomness(seed)
    release, _, _ = step(
        model, records, chosen, randomness, mask=given_.mask, statistics=FixedStatistics(given_.mean, given_.scale)
    )
    replay = SeededRandomness(seed)
    drawn = records.select(np.flatnonzero(replay.uniform(6) < 0.5))
    replay.torch_seed()
    total = sum(contributions_of(model, drawn, given_, 0.7), torch.zeros(len(given_.mean), dtype=torch.float64))
    total[given_.mask] += 0.28 * torch.from_numpy(replay.normal(int(given_.mask.sum())))
    expected = given_.mask * (given_.mean + given_.scale.double() * total / 4.5)
    size = given_.scale.double() + given_.mean.abs()
    assert bool(((release.gradient - expected).abs() <= 1e-5 * size).all())
    assert torch.allclose(release.noise_stddev, given_.mask * given_.scale * 0.28 / 4.5)
    assert release.gradient.dtype == release.noise_stddev.dtype == torch.float32


@pytest.mark.parametrize("retained", [0.0, 0.5])
def test_frozen_coordinates_get_neither_gradient_nor_noise(
    step, mechanism, make_model, make_records, make_standardisation, recording, retained
):
    model, records = make_model("mlp"), make_records("mlp", 16)
    given_ = make_standardisation(model, 1, retained=retained, spread=1.0)  # with a mean that must not show either
    randomness = recording(5)
    release, _, _ = step(
        model,
        records,
        mechanism(16),
        randomness,
        mask=given_.mask,
        statistics=FixedStatistics(given_.mean, given_.scale),
    )
    assert torch.equal(release.gradient != 0, given_.mask)
    assert torch.equal(release.noise_stddev != 0, given_.mask)
    assert randomness.sizes["normal"] == [int(given_.mask.sum())]


def test_the_sum_is_divided_by_the_expected_and_never_by_the_drawn_number(
    step, plain, make_model, make_records, record_gradients
):
    model, records = make_model("linear"), make_records("linear", 20)
    sizes = set()
    for seed in range(20):
        drawn = np.flatnonzero(SeededRandomness(seed).uniform(20) < 0.25)
        sizes.add(len(drawn))
        release, _, _ = step(model, records, plain(20, sampling_probability=0.25), SeededRandomness(seed))
        total = sum(record_gradients(model, records.select(drawn)), torch.zeros(21, dtype=torch.float64))
        assert torch.allclose(release.gradient.double(), total / 5, atol=1e-6)
        if len(drawn) != 5:
            assert not torch.allclose(release.gradient.double(), total / max(1, len(drawn)), atol=1e-3)
    assert len(sizes - {5}) > 2, "the test must have seen samples of other sizes"


def test_the_declared_number_of_records_counts_and_not_the_true_one(step, plain, make_model, make_records):
    model, records = make_model("linear"), make_records("linear", 20)
    one, _, _ = step(model, records, plain(20), SeededRandomness(5))
    other, _, _ = step(model, records, plain(10), SeededRandomness(5))
    assert torch.allclose(other.gradient, 2 * one.gradient)


@pytest.mark.parametrize("count", [0, 8])
def test_an_empty_sample_is_released_like_any_other(step, mechanism, plain, make_model, make_records, recording, count):
    model = make_model("linear")
    events = []
    randomness = recording(5)
    chosen = mechanism(8, sampling_probability=1e-9)
    release, _, _ = step(model, make_records("linear", count), chosen, randomness, charge=events.append)
    assert events == [chosen.event]
    assert bool((release.gradient != 0).all())
    assert randomness.calls == ["uniform", "torch_seed", "normal"]
    quiet, _, _ = step(model, make_records("linear", count), plain(8, sampling_probability=1e-9), recording(5))
    assert torch.equal(quiet.gradient, torch.zeros(21))


def test_every_step_draws_a_new_sample_and_new_noise(step, mechanism, plain, make_model, make_records):
    model, records = make_model("linear"), make_records("linear", 16)
    randomness = SeededRandomness(5)
    first, second = (step(model, records, mechanism(16), randomness)[0].gradient for _ in range(2))
    assert bool((first != second).all())
    quiet = SeededRandomness(5)
    first, second = (step(model, records, plain(16), quiet)[0].gradient for _ in range(2))
    assert not torch.equal(first, second)


# ---- side effects


def test_a_step_changes_neither_the_model_nor_the_global_generator(step, mechanism, make_model, make_records):
    model, records = make_model("mlp").train(), make_records("mlp", 16)  # dropout on
    weights, state, numpy_state = flatten(model), torch.get_rng_state(), np.random.get_state()[1].tolist()
    step(model, records, mechanism(16), SeededRandomness(5))
    assert torch.equal(flatten(model), weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_dropout_follows_the_given_randomness_and_not_the_global_one(step, plain):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(30, 2)).train()
    records = Records(torch.ones(4, 30), torch.zeros(4, dtype=torch.int64))
    chosen = plain(4, sampling_probability=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = step(model, records, chosen, SeededRandomness(5))[0].gradient
        torch.manual_seed(2)
        same = step(model, records, chosen, SeededRandomness(5))[0].gradient
        other = step(model, records, chosen, SeededRandomness(6))[0].gradient
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class _Words(nn.Module):
    """Fails on words beyond its table."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.table(x.long()).mean(1))


@pytest.mark.parametrize("where", [0, 7, 20])
def test_a_record_on_which_the_model_fails_takes_no_other_with_it(mechanism, where):
    """One record moves the sum by C at most, so that the others have to stay when it fails."""
    torch.manual_seed(0)
    model, features = _Words(), torch.randint(10, (20, 6)).float()
    labels, broken = torch.randint(3, (20,)), torch.full((1, 6), 10.0)
    with_broken = Records(torch.cat([features[:where], broken, features[where:]]), torch.cat([labels, labels[:1]]))
    order = [number for number in range(21) if number != where]
    whole = Records(features, with_broken.labels[order])
    statistics, mask = FixedStatistics.neutral(dimension(model)), torch.ones(dimension(model), dtype=torch.bool)
    chosen = mechanism(20, clipping_norm=0.01, noise_multiplier=0.0, sampling_probability=1.0)
    reports, events = [], []

    def release(records, failed):
        found, _, _ = private_step(
            model, cross_entropy, records, chosen, mask, statistics, SeededRandomness(0), events.append, failed=failed
        )
        return found.gradient

    expected, found = release(whole, None), release(with_broken, reports.append)
    assert len(reports) == 1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert bool(expected.any())
    with pytest.raises(IndexError):
        release(with_broken, None)
    assert len(events) == 2, "nothing was released, and nothing charged"


def test_what_fails_without_any_record_is_no_secret(plain):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    statistics, mask = FixedStatistics.neutral(dimension(model)), torch.ones(dimension(model), dtype=torch.bool)
    records = Records(torch.rand(5, 4), torch.zeros(5, dtype=torch.long))
    reports, events = [], []
    with pytest.raises(ModelError, match="replace it"):
        private_step(
            model,
            cross_entropy,
            records,
            plain(5),
            mask,
            statistics,
            SeededRandomness(0),
            events.append,
            failed=reports.append,
        )
    assert reports == events == []
