"""Soft masks: factors from releases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.exceptions import ConfigurationError, MessageError
from adadpigu_core.parameters import ParameterLayout
from adadpigu_core.shrinkage import SHRINKAGE_GRANULARITIES, SHRINKAGE_RULES, Shrinkage

LAYOUT = ParameterLayout(("weight", "bias"), ((20, 30), (20,)))
D = LAYOUT.num_parameters
EVERYTHING = torch.ones(D, dtype=torch.bool)
NOISE = torch.full((D,), 0.5)


def learnt(rule, granularity, signal, rounds, seed=0, mask=EVERYTHING):
    generator = torch.Generator().manual_seed(seed)
    known = Shrinkage.neutral(rule, granularity, LAYOUT)
    for _ in range(rounds):
        known = known.updated(signal + NOISE * torch.randn(D, generator=generator), NOISE, mask)
    return known


def columns_with_signal(value):
    return torch.cat([torch.where(torch.arange(30) < 3, value, 0.0).repeat(20), torch.zeros(20)])


@pytest.mark.parametrize("granularity", SHRINKAGE_GRANULARITIES)
@pytest.mark.parametrize("rule", SHRINKAGE_RULES)
def test_nothing_known_changes_nothing(rule, granularity):
    assert torch.equal(Shrinkage.neutral(rule, granularity, LAYOUT).factors(EVERYTHING), torch.ones(D))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(SHRINKAGE_RULES), st.sampled_from(SHRINKAGE_GRANULARITIES), st.integers(0, 99))
def test_factors_keep_the_noise_of_a_step(rule, granularity, seed):
    mask = torch.rand(D, generator=torch.Generator().manual_seed(seed)) < 0.6
    factors = learnt(rule, granularity, columns_with_signal(0.3), 5, seed, mask).factors(mask)
    assert bool((factors >= 0).all())
    assert factors[mask].square().mean().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("rule", ["energy", "drift"])
def test_signal_moves_further_than_noise(rule):
    factors = learnt(rule, "column", columns_with_signal(0.4), 30).factors(EVERYTHING)
    signal = columns_with_signal(1.0) > 0
    assert factors[signal].min() > 3 * factors[:600][~signal[:600]].mean()


def test_pure_noise_is_treated_alike():
    """With no signal anywhere, factors that differ would be noise taken for knowledge."""
    factors = learnt("drift", "column", torch.zeros(D), 30).factors(EVERYTHING)
    weak = learnt("drift", "column", columns_with_signal(0.4), 30).factors(EVERYTHING)
    assert factors.max() < weak.max()


def test_drift_sees_what_energy_cannot():
    """A steady signal of a tenth of the noise: sixty rounds add it up, while its square drowns."""
    signal = columns_with_signal(1.0)[:600] > 0
    contrast = {}
    for rule in ("energy", "drift"):
        factors = learnt(rule, "coordinate", columns_with_signal(0.1), 60).factors(EVERYTHING)[:600]
        contrast[rule] = float(factors[signal].mean() - factors[~signal].mean())
    assert contrast["drift"] > contrast["energy"] + 0.1


def test_a_hard_mask_is_the_limit():
    """Without noise on half of the coordinates' signal, the others have none, and get a factor of 0."""
    signal = torch.where(torch.arange(D) % 2 == 0, 1.0, 0.0)
    known = Shrinkage.neutral("drift", "coordinate", LAYOUT).updated(signal, torch.zeros(D), EVERYTHING)
    factors = known.factors(EVERYTHING)
    assert torch.allclose(factors, signal * 2**0.5)


def test_frozen_coordinates_teach_nothing():
    mask = torch.arange(D) < 300
    known = learnt("drift", "coordinate", torch.ones(D), 3, mask=mask)
    assert known.drift.total[~mask].abs().sum() == 0
    assert known.drift.rounds[~mask].sum() == 0
    assert bool((known.drift.rounds[mask] == 3).all())


@pytest.mark.parametrize("rule", ["energy", "drift"])
def test_goes_on_where_it_stopped(rule):
    known = learnt(rule, "row", columns_with_signal(0.4), 4)
    restored = Shrinkage.neutral(rule, "row", LAYOUT).restored(known.state())
    assert torch.equal(restored.factors(EVERYTHING), known.factors(EVERYTHING))
    with pytest.raises(MessageError, match="shrinkage"):
        Shrinkage.neutral(rule, "row", ParameterLayout(("weight",), ((3, 3),))).restored(known.state())


def test_unknown_words_are_refused():
    with pytest.raises(ConfigurationError, match=r"shrinkage\.rule"):
        Shrinkage.neutral("wiener", "row", LAYOUT)
    with pytest.raises(ConfigurationError, match=r"shrinkage\.granularity"):
        Shrinkage.neutral("drift", "diagonal", LAYOUT)
