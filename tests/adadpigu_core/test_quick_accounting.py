"""The quick bounds, against dp_accounting on a fine grid and against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core import privacy_loss, quick_accounting
from adadpigu_core.accounting import NoiseSchedule, PlanShape
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.noise_levels import epsilons_after
from adadpigu_core.privacy_loss import TRAINING, Event, epsilon
from adadpigu_core.quick_accounting import quick_epsilon, quick_epsilons

DELTA = 1e-5


def event(noise_multiplier, sampling_probability, count=1):
    return Event(TRAINING, noise_multiplier, sampling_probability, count)


def fine_epsilon(events, delta):
    """dp_accounting's, on a grid so fine that it is over-stated by less than 1e-4."""
    with pytest.MonkeyPatch.context() as patch:
        grid = privacy_loss._grid(events)
        patch.setattr(privacy_loss, "_grid", lambda _: grid / 3)
        privacy_loss._pld_epsilon.cache_clear()
        found = epsilon(events, delta)
    privacy_loss._pld_epsilon.cache_clear()
    return found


CASES = [
    [(1.0, 0.01, 1000)],
    [(40.0, 0.01, 10_000)],
    [(5.0, 0.001, 10_000)],
    [(0.5, 0.05, 10), (0.7, 0.05, 90)],
    [(0.3, 0.02, 3), (30.0, 0.02, 3000)],
    [(0.7, 0.3, 1)],
    [(0.2, 0.001, 10)],
    [(0.5, 0.001, 10)],
    [(200.0, 0.5, 10)],
    [(0.6, 0.9, 3)],
]


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(("noise_multiplier", "count"), [(0.3, 1), (1, 10), (10, 1), (30, 10_000), (3000, 10_000)])
def test_without_sampling_it_is_the_analytic_gaussian_mechanism(gaussian_epsilon, noise_multiplier, count, delta):
    exact = gaussian_epsilon(noise_multiplier / math.sqrt(count), delta)
    assert exact <= quick_epsilon([event(noise_multiplier, 1.0, count)], delta) <= exact * 1.004


@pytest.mark.parametrize("kinds", CASES)
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_it_is_above_the_exact_accountant_and_close(kinds, delta):
    events = [event(*kind) for kind in kinds]
    exact = fine_epsilon(events, delta)
    # the exact one is over-stated itself, by a ninth of a thousandth
    assert exact * (1 - 2e-4) <= quick_epsilon(events, delta) <= exact * 1.006


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.builds(event, st.floats(0.3, 50), st.floats(0.002, 1.0), st.integers(1, 200)), min_size=1, max_size=3),
    st.sampled_from([1e-3, 1e-5, 1e-7]),
)
def test_any_composition_is_bounded(events, delta):
    exact, quick = epsilon(events, delta), quick_epsilon(events, delta)
    if quick == math.inf:
        assert exact > 300
    else:
        # both are bounds; the exact one is over-stated by up to 2e-3, more only where next to nothing is spent
        assert exact * (1 - 2e-3) - 1e-6 <= quick <= exact * 1.02 + 1e-3


def test_losses_that_are_rounded_down_are_noticed(gaussian_epsilon, monkeypatch):
    rounded = quick_accounting._rounded

    def down(upper, lower, losses, grid):
        masses, above = rounded(upper, lower, losses, grid)
        return np.concatenate((masses[1:], [0.0])), above

    monkeypatch.setattr(quick_accounting, "_rounded", down)
    assert quick_epsilon([event(30, 1.0, 10_000)], DELTA) < 0.99 * gaussian_epsilon(0.3, DELTA)


def test_tails_that_run_over_the_top_are_not_lost(gaussian_epsilon, monkeypatch):
    windows = quick_accounting._windows
    monkeypatch.setattr(quick_accounting, "_windows", lambda *args: [(low, high / 4) for low, high in windows(*args)])
    # half of the window is missing, and what runs over its top comes out below
    assert quick_epsilon([event(1.0, 1.0, 1)], DELTA) < 0.9 * gaussian_epsilon(1.0, DELTA)


def test_rounds_on_the_way_are_what_they_would_be_alone():
    plan = PlanShape(0.1, 12, 120, 0.2, NoiseSchedule("cosine", 0.4), 2).plan(4.0)
    points = [1, 5, 6, 7, 30, 66]
    found = epsilons_after(plan, points, DELTA)
    for point, bound in zip(points, found, strict=True):
        exact = epsilon(plan.rounds[:point], DELTA)
        assert exact * (1 - 2e-3) <= bound <= exact * 1.02 + 1e-3
    assert found == sorted(found)
    assert found[-1] == pytest.approx(quick_epsilon(plan.events, DELTA), rel=1e-4)


def test_nothing_costs_nothing_and_the_void_is_infinite():
    assert quick_epsilon([], DELTA) == 0
    assert quick_epsilon([event(1.0, 0.1, 0)], DELTA) == 0
    assert quick_epsilon([event(0.0999, 1.0)], DELTA) == math.inf
    assert quick_epsilon([event(0.2, 1.0, 1000)], DELTA) == math.inf
    assert quick_epsilon([event(1.0, 1.0, 5000)], DELTA) == math.inf
    assert quick_epsilon([event(100.0, 0.01, 10**6)], 1e-10) == math.inf
    counts = np.array([[0], [0], [3]])
    assert quick_epsilons([event(1.0, 0.1)], counts, DELTA)[:2] == [0, 0]
    with pytest.raises(ConfigurationError, match="delta"):
        quick_epsilon([event(1.0, 0.1)], 0.0)
