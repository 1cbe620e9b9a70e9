"""Nothing comes out of a step but the release, after its event, and no record moves it too far."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.accounting import Event
from adadpigu_core.adaptive_clipping import AdaptiveClipping, FixedStatistics, RunningStatistics, Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import BudgetError
from adadpigu_core.parameters import ParameterLayout, flatten
from adadpigu_core.sampling import SeededRandomness

KINDS = ("linear", "mlp", "cnn")


def everything(model):
    return torch.ones(ParameterLayout.of(model).num_parameters, dtype=torch.bool)


# ---- nothing is released without its event


def test_the_charge_comes_before_the_noise_and_is_the_event_of_the_mechanism(
    step, mechanism, make_model, make_records, recording
):
    model, records = make_model("mlp"), make_records("mlp", 16)
    randomness = recording(5)
    charged = []

    def charge(event):
        charged.append(event)
        randomness.calls.append("charge")

    chosen = mechanism(16, phase="pretraining", noise_multiplier=1.7, sampling_probability=0.3)
    _, _, event = step(model, records, chosen, randomness, charge=charge)
    assert randomness.calls == ["uniform", "torch_seed", "charge", "normal"]
    assert charged == [event] == [chosen.event] == [Event("pretraining", 1.7, 0.3, 1)]


def test_a_refused_charge_lets_nothing_out(step, mechanism, make_model, make_records, recording):
    model, records = make_model("mlp"), make_records("mlp", 16)
    before = flatten(model)
    randomness = recording(5)

    class Spy(FixedStatistics):
        def updated(self, *_):
            raise AssertionError("must not learn from what was not released")

    def refuse(event):
        raise BudgetError("nothing is left")

    result = None
    with pytest.raises(BudgetError, match="nothing is left"):
        result = step(
            model, records, mechanism(16), randomness, statistics=Spy(torch.zeros(53), torch.ones(53)), charge=refuse
        )
    assert result is None
    assert "normal" not in randomness.calls
    assert torch.equal(flatten(model), before)


def test_a_step_without_noise_is_charged_too(step, plain, make_model, make_records):
    events = []
    step(make_model("linear"), make_records("linear", 4), plain(4), SeededRandomness(1), charge=events.append)
    assert events == [Event("training", 0.0, 0.5, 1)]


# ---- sensitivity


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 1e4, 1e25]),
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0, 2.0]),
)
def test_neighbours_with_the_same_randomness_are_released_at_most_the_sensitivity_apart(
    step, mechanism, make_model, make_records, make_standardisation, kind, seed, size, retained, spread
):
    """Sampling probability 1: the release, standardised again, moves by at most C / B. To float32 rounding."""
    model, most = make_model(kind, seed), make_records(kind, 7, seed)
    one = make_records(kind, 1, seed + 1, size)
    every = Records(torch.cat([most.features, one.features]), torch.cat([most.labels, one.labels]))
    given_ = make_standardisation(model, seed, retained=retained, spread=spread)
    chosen = mechanism(8, clipping_norm=0.5, noise_multiplier=0.01, sampling_probability=1.0)
    released = [
        step(
            model,
            records,
            chosen,
            Replay(len(given_.mask), seed),
            mask=given_.mask,
            statistics=FixedStatistics(given_.mean, given_.scale),
        )[0].gradient.double()
        for records in (most, every)
    ]
    moved = torch.where(given_.mask, (released[1] - released[0]) / given_.scale, 0.0)
    rounding = float((2.0**-23 * released[0].abs() / given_.scale).norm())
    assert float(moved.norm()) <= 0.5 / 8 * (1 + 1e-5) + 2 * rounding


class Replay:
    """The same noise however many records were sampled."""

    def __init__(self, d, seed):
        self.noise = SeededRandomness(seed).normal(d)

    def uniform(self, size):
        return np.zeros(size)

    def normal(self, size):
        return self.noise[:size]

    def torch_seed(self):
        return 0


# ---- statistics


def test_statistics_learn_from_the_release_and_from_nothing_else(
    step, mechanism, make_model, make_records, make_standardisation
):
    model, records = make_model("mlp"), make_records("mlp", 16)
    mask = make_standardisation(model, 1, retained=0.5).mask
    seen = []

    class Spy:
        learn = True

        def standardisation(self, wanted):
            assert wanted is mask
            return Standardisation(mask, torch.zeros(53), torch.full((53,), 2.0))

        def updated(self, *arguments):
            seen.extend(arguments)
            return "learnt"

    release, statistics, _ = step(model, records, mechanism(16), SeededRandomness(5), mask=mask, statistics=Spy())
    assert statistics == "learnt"
    assert len(seen) == 3
    assert seen[0] is release.gradient
    assert seen[1] is release.noise_stddev
    assert seen[2] is mask


@pytest.mark.parametrize("rule", ["energy", "paper"])
def test_the_next_step_uses_what_was_learnt(step, mechanism, make_model, make_records, rule):
    model, records = make_model("mlp"), make_records("mlp", 16)
    start = RunningStatistics.neutral(AdaptiveClipping(rule=rule), ParameterLayout.of(model))
    chosen = mechanism(16, noise_multiplier=0.1)
    first, learnt, _ = step(model, records, chosen, SeededRandomness(5), statistics=start)
    expected = start.updated(first.gradient, first.noise_stddev, everything(model))
    assert torch.equal(learnt.moment, expected.moment)
    again, _, _ = step(model, records, chosen, SeededRandomness(5), statistics=learnt)
    assert not torch.equal(first.gradient, again.gradient)
    scale = learnt.standardisation(everything(model)).scale
    assert torch.allclose(again.noise_stddev, scale * chosen.noise_stddev)
