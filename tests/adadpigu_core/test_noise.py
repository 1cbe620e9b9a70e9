import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.noise import add_gaussian_noise
from adadpigu_core.sampling import SeededRandomness


class KnownNormals:
    """Hands out 1, 2, 3, ..."""

    def __init__(self):
        self.asked = []

    def normal(self, size):
        self.asked.append(size)
        return np.arange(1.0, size + 1)


def zeros(size):
    return torch.zeros(size, dtype=torch.float64)


def test_noise_is_added_to_the_retained_values_in_place():
    values = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    randomness = KnownNormals()
    noisy = add_gaussian_noise(values, torch.tensor([0, 1, 3]), 0.5, randomness)
    assert noisy is values
    assert values.tolist() == [10.5, 21, 30, 41.5]  # on the grid, which is one of powers of two
    assert randomness.asked == [3]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 10**6))
def test_no_retained_value_stays_without_noise(size, stddev, seed):
    noisy = add_gaussian_noise(zeros(2 * size), torch.arange(size), stddev, SeededRandomness(seed))
    assert int((noisy != 0).sum()) in (size - 1, size)  # on a grid, one in a hundred thousand is
    assert torch.equal(noisy[size:], zeros(size))


def test_no_noise_leaves_the_sum_as_it_is_and_draws_nothing():
    total = torch.randn(5, dtype=torch.float64)
    randomness = KnownNormals()
    assert torch.equal(add_gaussian_noise(total.clone(), torch.arange(5), 0.0, randomness), total)
    assert randomness.asked == []


def test_the_sum_stays_in_float64():
    noisy = add_gaussian_noise(zeros(3) + 1, torch.arange(3), 1e-6, KnownNormals())
    assert noisy.dtype == torch.float64
    assert noisy.tolist() == pytest.approx([1 + 1e-6, 1 + 2e-6, 1 + 3e-6], abs=1e-11, rel=0)


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-30, 1e30), st.floats(-1e6, 1e6), st.integers(0, 10**6))
def test_whatever_the_sum_is_the_release_lies_on_one_grid(stddev, size, seed):
    """Powers of two apart, by 2^-17 to 2^-16 of the noise, and by no more than half of that from what was added."""
    generator = torch.Generator().manual_seed(seed)
    total = size * stddev * torch.randn(200, dtype=torch.float64, generator=generator)
    noise = torch.from_numpy(SeededRandomness(seed).normal(200)) * stddev
    noisy = add_gaussian_noise(total.clone(), torch.arange(200), stddev, SeededRandomness(seed))
    step = 2.0 ** math.floor(math.log2(stddev * 2**-16))
    assert torch.equal(torch.round(noisy / step), noisy / step)
    assert bool((noisy - (total + noise)).abs().le(0.5001 * step).all())


def test_values_that_are_not_retained_stay_zero():
    noisy = add_gaussian_noise(zeros(1000), torch.arange(0, 1000, 7), 0.3, SeededRandomness(0))
    assert noisy.ne(0).sum() == 143


class Nearby:
    """Variates that are all but those of a crossing of zero, as the transform gives them."""

    def normal(self, size):
        radius = np.sqrt(-2 * np.log(np.random.default_rng(0).random(size)))
        return radius * np.random.default_rng(1).integers(-(10**6), 10**6, size) * 2 * math.pi * 2.0**-52


@pytest.mark.parametrize("total", [0.0, 0.3])
def test_low_bits_of_variates_near_zero_do_not_survive(total):
    """Added to zero they would be multiples of the radius over 2^52, added to anything else they would not."""
    noisy = add_gaussian_noise(zeros(100) + total, torch.arange(100), 1.0, Nearby())
    assert len(set(noisy.tolist())) == 1
    assert noisy[0] == round(total * 2**16) / 2**16


def test_the_same_randomness_gives_the_same_noise():
    first, second, other = (
        add_gaussian_noise(zeros(8), torch.arange(8), 1.0, SeededRandomness(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert bool((first != other).all())


def test_nothing_retained_gets_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert add_gaussian_noise(zeros(3), nothing, 1.0, SeededRandomness(1)).tolist() == [0, 0, 0]
