import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from adadpigu_core import privacy_loss
from adadpigu_core.accounting import PRETRAINING, TRAINING, Event, PlanShape, calibrate, epsilon, fits, merge
from adadpigu_core.exceptions import ConfigurationError

DELTA = 1e-5
# What an over-statement may be: the grid's, with some room.
SLACK = 2e-3


def event(noise_multiplier, sampling_probability, count=1, phase=TRAINING):
    return Event(phase, noise_multiplier, sampling_probability, count)


# --- oracles, none of which uses dp_accounting ---------------------------------------------------------------------


def loss_and_density(noise_multiplier, sampling_probability, direction):
    """Privacy loss of an output x, and the density of x, when the record is there (remove) or not (add)."""

    def mixture(x):
        ratio = np.exp((2 * x - 1) / (2 * noise_multiplier**2))
        return 1 - sampling_probability + sampling_probability * ratio

    def without(x):
        return stats.norm.pdf(x, scale=noise_multiplier)

    if direction == "remove":
        return (lambda x: np.log(mixture(x))), (lambda x: mixture(x) * without(x))
    return (lambda x: -np.log(mixture(x))), without


def one_step_delta(value, noise_multiplier, sampling_probability, direction):
    """Hockey-stick divergence of one subsampled Gaussian step at epsilon ``value``, by numerical integration."""
    loss, density = loss_and_density(noise_multiplier, sampling_probability, direction)

    def integrand(x):
        return np.maximum(-np.expm1(value - loss(x)), 0) * density(x)

    nodes = np.linspace(-12 * noise_multiplier, 1 + 12 * noise_multiplier, 60_001)
    return integrate.simpson(integrand(nodes), x=nodes)


def two_steps_delta(value, first, second, direction):
    """The same for two different steps: the mean of the second's divergence over the losses of the first."""
    loss, density = loss_and_density(*first, direction)
    loss_2, density_2 = loss_and_density(*second, direction)
    x = np.linspace(-10 * first[0], 1 + 10 * first[0], 1201)[:, None]
    y = np.linspace(-10 * second[0], 1 + 10 * second[0], 1201)[None, :]
    integrand = np.maximum(-np.expm1(value - loss(x) - loss_2(y)), 0) * density(x) * density_2(y)
    return integrate.simpson(integrate.simpson(integrand, x=y[0]), x=x[:, 0])


def solve(delta_of, delta):
    """Smallest epsilon with which both directions stay within delta."""
    return max(
        optimize.brentq(lambda value, direction=direction: delta_of(value, direction) - delta, 0, 60, xtol=1e-9)
        if delta_of(0, direction) > delta
        else 0.0
        for direction in ("remove", "add")
    )


# --- epsilon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(("noise_multiplier", "count"), [(0.3, 1), (1, 10), (10, 1), (30, 10_000), (3000, 10_000)])
def test_without_sampling_it_is_the_analytic_gaussian_mechanism(gaussian_epsilon, noise_multiplier, count, delta):
    exact = gaussian_epsilon(noise_multiplier / math.sqrt(count), delta)
    assert exact <= epsilon([event(noise_multiplier, 1.0, count)], delta) <= exact * (1 + SLACK)


@pytest.mark.parametrize("noise_multiplier", [0.7, 2.0])
@pytest.mark.parametrize("sampling_probability", [0.01, 0.3, 1.0])
def test_one_step_agrees_with_numerical_integration_in_both_directions(noise_multiplier, sampling_probability):
    delta = 1e-5
    exact = solve(lambda e, way: one_step_delta(e, noise_multiplier, sampling_probability, way), delta)
    assert exact * (1 - 1e-6) <= epsilon([event(noise_multiplier, sampling_probability)], delta) <= exact * (1 + SLACK)


def test_two_different_steps_agree_with_numerical_integration():
    first, second, delta = (0.8, 0.1), (1.5, 0.4), 1e-4
    exact = solve(lambda e, way: two_steps_delta(e, first, second, way), delta)
    assert exact * (1 - 1e-5) <= epsilon([event(*first), event(*second)], delta) <= exact * (1 + SLACK)


@pytest.mark.parametrize(
    ("events", "delta", "published"),
    [
        # Koskela, Jaelkoe, Honkela: Computing Tight DP Guarantees Using FFT; two examples of their Fourier accountant
        ([event(4.0, 0.01, 10_000)], 4.243484012034273e-06, 1.0),
        ([event(2.0, 0.01, 500), event(1.0, 0.01, 500)], 0.0003151995621652058, 1.0),
    ],
)
def test_it_agrees_with_published_values(events, delta, published):
    assert published <= epsilon(events, delta) <= published * (1 + SLACK)


def test_it_improves_on_the_moments_accountant():
    # Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, 10,000 steps have epsilon 1.26 at delta 1e-5
    assert 0.9 < epsilon([event(4.0, 0.01, 10_000)], 1e-5) < 1.26


@pytest.mark.parametrize(
    "kind", [(0.6, 0.01, 100), (1.1, 0.05, 1000), (40.0, 0.01, 10_000), (5.0, 0.001, 10_000), (20.0, 1.0, 50)]
)
def test_it_is_at_most_the_renyi_bound(kind):
    renyi = rdp.RdpAccountant().compose(event(*kind).dp_event()).get_epsilon(DELTA)
    assert 0 < epsilon([event(*kind)], DELTA) <= renyi


@pytest.mark.parametrize(
    "kinds",
    [
        [(1.0, 0.01, 1000)],
        [(4.0, 0.05, 10_000)],
        [(40.0, 0.01, 10_000)],  # a fixed grid of 1e-3 would say 0.14 instead of 0.075
        [(200.0, 0.01, 10_000)],
        [(5.0, 0.001, 10_000)],
        [(0.5, 0.05, 10), (0.7, 0.05, 90)],
        [(0.3, 0.02, 3), (30.0, 0.02, 3000)],
    ],
)
def test_the_grid_overstates_epsilon_by_little_and_never_understates_it(kinds, monkeypatch):
    events = [event(*kind) for kind in kinds]
    coarse = epsilon(events, DELTA)
    grid = privacy_loss._grid(events)
    privacy_loss._pld_epsilon.cache_clear()
    monkeypatch.setattr(privacy_loss, "_grid", lambda _: grid / 6)
    fine = epsilon(events, DELTA)
    privacy_loss._pld_epsilon.cache_clear()
    assert fine <= coarse <= fine * (1 + SLACK)


def test_no_events_cost_nothing_and_no_noise_costs_everything():
    assert epsilon([], DELTA) == 0
    assert epsilon([event(1.0, 0.1, 0), event(0.0, 0.1, 0)], DELTA) == 0
    assert epsilon([event(0.0, 0.01), event(5.0, 0.01, 10)], DELTA) == math.inf
    assert epsilon([event(0.2999, 1.0)], DELTA) == math.inf
    assert math.isfinite(epsilon([event(0.3, 1.0)], DELTA))


def test_extreme_events_are_accounted_in_bounded_time_and_never_understated(gaussian_epsilon):
    exact = gaussian_epsilon(1 / math.sqrt(1000), DELTA)
    assert exact <= epsilon([event(1.0, 1.0, 1000)], DELTA) <= exact * (1 + SLACK)
    assert epsilon([event(0.2, 1.0, 1000)], DELTA) == math.inf
    assert epsilon([event(0.1313, 1.0, 21)], 7e-4) > gaussian_epsilon(0.1313 / math.sqrt(21), 7e-4)
    assert epsilon([event(0.1, 1.0, 10**6)], DELTA) == math.inf
    assert epsilon([event(1e9, 0.1, 10**12)], DELTA) == math.inf
    assert epsilon([event(1e12, 1e-6, 10**6)], DELTA) < 1e-4


def test_a_delta_below_the_rounding_errors_certifies_nothing():
    assert math.isfinite(epsilon([event(100.0, 0.01, 1000)], 1e-12))
    assert epsilon([event(100.0, 0.01, 10**6)], 1e-10) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_out_of_range_is_refused(delta):
    for call in (lambda: epsilon([event(1.0, 0.1)], delta), lambda: fits([event(1.0, 0.1)], 1.0, delta)):
        with pytest.raises(ConfigurationError, match="delta"):
            call()


kinds = st.builds(
    event,
    st.floats(0.5, 20).map(lambda noise_multiplier: round(noise_multiplier, 2)),
    st.sampled_from([0.02, 0.2, 1.0]),
    st.integers(1, 50),
    st.sampled_from([PRETRAINING, TRAINING]),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(kinds, min_size=1, max_size=3), kinds)
def test_more_releases_cost_more_and_more_noise_costs_less(events, extra):
    before = epsilon(events, DELTA)
    assert epsilon([*events, extra], DELTA) >= before * (1 - SLACK)
    quieter = [replace(one, noise_multiplier=one.noise_multiplier * 1.1) for one in events]
    assert epsilon(quieter, DELTA) < before
    longer = [replace(one, count=one.count * 2) for one in events]
    assert epsilon(longer, DELTA) > before


@settings(max_examples=15, deadline=None)
@given(st.lists(kinds, min_size=2, max_size=4), st.randoms())
def test_neither_order_nor_grouping_nor_phase_matters(events, random):
    shuffled = [part for one in events for part in (replace(one, count=1), replace(one, count=one.count - 1))]
    random.shuffle(shuffled)
    assert merge(shuffled) == merge(events)
    swapped = [replace(one, phase=PRETRAINING) for one in shuffled]
    assert epsilon(swapped, DELTA) == epsilon(events, DELTA)


# --- defects 7 and 8 of the published code ---------------------------------------------------------------------------


def test_shuffled_batches_accounted_as_poisson_would_understate_epsilon_tenfold():
    epochs, sampling_probability = 500, 1 / 60
    steps = round(epochs / sampling_probability)
    plan = calibrate(PlanShape(sampling_probability, 0, steps, 0.5), 4.0, DELTA)
    claimed = epsilon(plan.events, DELTA)
    # an epoch of fixed or shuffled batches contains every record exactly once: one release without amplification
    shuffled = event(plan.training.noise_multiplier, 1.0, epochs)
    assert claimed <= 4.0
    assert epsilon([shuffled], DELTA) > 10 * claimed


@pytest.mark.parametrize("noise_multiplier", [1.0, 3.0])
@pytest.mark.parametrize("batches", [10, 100])
def test_batches_without_poisson_sampling_cost_more_at_any_size(noise_multiplier, batches):
    poisson = epsilon([event(noise_multiplier, 1 / batches, 5 * batches)], DELTA)
    assert epsilon([event(noise_multiplier, 1.0, 5)], DELTA) > 1.1 * poisson


@pytest.mark.parametrize("sampling_probability", [0.0, -0.01, 1.0000001, 2.0, 64.0, math.nan, math.inf])
def test_what_is_no_probability_is_not_accounted_as_one(sampling_probability):
    with pytest.raises(ConfigurationError, match="sampling_probability"):
        event(1.0, sampling_probability)
    with pytest.raises(ConfigurationError, match="sampling_probability"):
        calibrate(PlanShape(sampling_probability, 1, 1, 0.5), 1.0, DELTA)


def test_runs_that_search_hyper_parameters_are_composed():
    run = event(4.0, 0.02, 100)
    one, many = epsilon([run], DELTA), epsilon([run] * 792, DELTA)
    assert many == epsilon([replace(run, count=79_200)], DELTA)
    assert many > 20 * one


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"phase": "validation"}, "phase"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"count": -1}, "count"),
        ({"count": 1.5}, "count"),
    ],
)
def test_events_that_make_no_sense_are_refused(changes, field):
    with pytest.raises(ConfigurationError, match=field):
        replace(event(1.0, 0.1), **changes)


def test_merge_adds_equal_events_up_and_drops_empty_ones():
    assert merge([event(1.0, 0.1, 2), event(2.0, 0.1, 0), event(1.0, 0.1, 3)]) == (event(1.0, 0.1, 5),)
    assert merge([event(1.0, 0.1), event(1.0, 0.1, phase=PRETRAINING)]) == (
        event(1.0, 0.1, phase=PRETRAINING),
        event(1.0, 0.1),
    )


# --- fits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(kinds, max_size=3), st.sampled_from([0.5, 2.0, 8.0]))
def test_fits_is_epsilon_compared(events, target):
    assert fits(events, target, DELTA) == (epsilon(events, DELTA) <= target)


def test_fits_at_the_very_target():
    events = [event(2.0, 0.1, 30)]
    spent = epsilon(events, DELTA)
    assert fits(events, spent, DELTA)
    assert not fits(events, math.nextafter(spent, 0), DELTA)


def test_what_fits_one_target_is_not_taken_to_fit_another():
    events = [event(1.5, 0.1, 40)]
    spent = epsilon(events, DELTA)
    assert fits(events, spent * 1.01, DELTA)
    assert not fits(events, spent * 0.99, DELTA)
    assert not fits(events, spent * 1.01, DELTA / 100)
    assert not fits([*events, event(1.5, 0.1, 40)], spent * 1.01, DELTA)
    assert not fits([event(1.4, 0.1, 40)], spent * 1.01, DELTA)


def test_rounds_of_a_plan_that_fits_need_no_accounting(monkeypatch):
    plan = calibrate(PlanShape(0.1, 5, 20, 0.4), 3.0, DELTA, [event(4.0, 0.1, 7)])
    monkeypatch.setattr(privacy_loss, "_pld_epsilon", None)
    assert fits([event(4.0, 0.1, 7), replace(plan.pretraining, count=5), replace(plan.training, count=3)], 3.0, DELTA)
    with pytest.raises(TypeError):  # one step more is accounted
        fits([event(4.0, 0.1, 7), replace(plan.training, count=21)], 3.0, DELTA)


@pytest.mark.parametrize("target", [math.nan, 0.0, -1.0, -math.inf])
def test_a_target_that_is_no_target_fits_nothing(target):
    with pytest.raises(ConfigurationError, match="target_epsilon"):
        fits([event(0.0, 1.0)], target, DELTA)


def test_an_infinite_target_is_no_limit():
    assert fits([event(0.0, 1.0, 1000)], math.inf, DELTA)
