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


def test_noise_is_added_to_every_value():
    values = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    randomness = KnownNormals()
    assert add_gaussian_noise(values, 0.5, randomness).tolist() == [10.5, 21, 31.5]
    assert randomness.asked == [3]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 10**6))
def test_no_value_stays_without_noise(size, stddev, seed):
    noisy = add_gaussian_noise(torch.zeros(size), stddev, SeededRandomness(seed))
    assert bool((noisy != 0).all())


def test_no_noise_leaves_the_sum_as_it_is_and_draws_nothing():
    total = torch.randn(5, dtype=torch.float64)
    randomness = KnownNormals()
    assert torch.equal(add_gaussian_noise(total, 0.0, randomness), total)
    assert randomness.asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_stays_in_float64(dtype):
    total = torch.ones(3, dtype=dtype)
    noisy = add_gaussian_noise(total, 1e-12, KnownNormals())
    assert noisy.dtype == torch.float64
    assert noisy.tolist() == [1 + 1e-12, 1 + 2e-12, 1 + 3e-12]
    assert total.tolist() == [1, 1, 1], "the argument must not change"


def test_the_same_randomness_gives_the_same_noise():
    total = torch.zeros(8)
    first, second = (add_gaussian_noise(total, 1.0, SeededRandomness(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, add_gaussian_noise(total, 1.0, SeededRandomness(4)))


def test_nothing_retained_gives_nothing():
    assert add_gaussian_noise(torch.ones(0), 1.0, SeededRandomness(1)).shape == (0,)
