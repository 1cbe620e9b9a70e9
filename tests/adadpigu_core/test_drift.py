"""Energy of the signal in each coordinate, from sums of releases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.drift import Drift
from adadpigu_core.exceptions import MessageError


def by_hand(rounds, coordinate):
    """Energy of one coordinate, from its own releases alone."""
    seen = [(value[coordinate], noise[coordinate]) for value, noise, mask in rounds if mask[coordinate]]
    if not seen:
        return 0.0
    total = sum(value for value, _ in seen)
    return (total * total - sum(noise * noise for _, noise in seen)) / len(seen) ** 2


def learnt(rounds, num_parameters):
    known = Drift.neutral(num_parameters)
    for value, noise, mask in rounds:
        known = known.updated(torch.tensor(value), torch.tensor(noise), torch.tensor(mask))
    return known


def histories():
    def rounds(d):
        row = st.tuples(
            st.lists(st.floats(-5, 5, width=32), min_size=d, max_size=d),
            st.lists(st.floats(0, 3, width=32), min_size=d, max_size=d),
            st.lists(st.booleans(), min_size=d, max_size=d),
        )
        return st.tuples(st.just(d), st.lists(row, max_size=6))

    return st.integers(1, 5).flatmap(rounds)


@given(histories())
def test_every_coordinate_is_judged_by_the_rounds_that_released_it(history):
    d, rounds = history
    known = learnt(rounds, d)
    assert known.energy.tolist() == pytest.approx([by_hand(rounds, j) for j in range(d)], rel=1e-6, abs=1e-9)
    assert known.known.tolist() == [any(mask[j] for _, _, mask in rounds) for j in range(d)]


@given(histories(), st.integers(1, 5))
def test_what_is_left_out_keeps_what_was_known_of_it(history, more):
    d, rounds = history
    nobody = [([9.0] * d, [9.0] * d, [False] * d)] * more
    one, other = learnt(rounds, d).state(), learnt(rounds + nobody, d).state()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("assumed", "unbiased"), [(0.5, True), (0.5 / 1.5, False), (0.75, False)])
def test_energy_is_the_squared_signal_and_doubt_its_variance(assumed, unbiased):
    """The mean of many estimates from six rounds each; wrong noise would show."""
    copies, rounds, signal = 20_000, 6, 0.1
    generator = torch.Generator().manual_seed(5)
    known, everything = Drift.neutral(copies), torch.ones(copies, dtype=torch.bool)
    for _ in range(rounds):
        release = signal + 0.5 * torch.randn(copies, generator=generator, dtype=torch.float64)
        known = known.updated(release, torch.full((copies,), assumed), everything)
    error = abs(float(known.energy.mean()) - signal**2)
    assert (error < 4 * float(known.energy.std()) / copies**0.5) == unbiased
    # the signal itself adds to the variance: 4 signal^2 noise / rounds
    expected = float(known.doubt[0]) + 4 * signal**2 * float(known.release_noise[0]) / rounds
    assert (abs(float(known.energy.var()) / expected - 1) < 0.1) == unbiased


def test_what_is_known_less_well_comes_first():
    """Two coordinates that released nothing but zeros: the one with fewer rounds is still worth a try."""
    rounds = [([0.0, 0.0], [0.5, 0.5], [True, number < 2]) for number in range(6)]
    known = learnt(rounds, 2)
    assert known.energy[0] > known.energy[1]
    assert known.upper_bound()[0] < known.upper_bound()[1]
    assert known.upper_bound()[1] == pytest.approx((2**0.5 - 1) * 2 * 0.25 / 2**2)


@given(histories(), st.integers(0, 99))
def test_groups_are_bounded_by_their_mean(history, seed):
    d, rounds = history
    known, generator = learnt(rounds, d), np.random.default_rng(seed)
    group = np.unique(generator.integers(0, 3, size=d), return_inverse=True)[1]
    found = known.upper_bound(torch.from_numpy(group)).tolist()
    for j in range(d):
        own = np.flatnonzero(group == group[j])
        energy = np.mean([by_hand(rounds, i) for i in own])
        variance = np.mean([float(known.doubt[i]) for i in own]) / len(own)
        assert found[j] == pytest.approx(energy + variance**0.5, rel=1e-6, abs=1e-6)
    assert torch.allclose(known.upper_bound(), known.upper_bound(torch.arange(d)))


def test_goes_on_where_it_stopped():
    generator = np.random.default_rng(0)
    rounds = [(generator.normal(size=3).tolist(), [0.5] * 3, [True, False, True]) for _ in range(4)]
    stopped = Drift.neutral(3).restored(learnt(rounds[:2], 3).state())
    for value, noise, mask in rounds[2:]:
        stopped = stopped.updated(torch.tensor(value), torch.tensor(noise), torch.tensor(mask))
    assert torch.equal(stopped.energy, learnt(rounds, 3).energy)


def test_that_of_another_model_is_refused():
    with pytest.raises(MessageError, match="drift"):
        Drift.neutral(3).restored(Drift.neutral(4).state())
    with pytest.raises(MessageError, match="drift"):
        Drift.neutral(3).restored({})
