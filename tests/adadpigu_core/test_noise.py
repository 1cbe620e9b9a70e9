import numpy as np
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
    assert values.tolist() == [10.5, 21, 30, 41.5]
    assert randomness.asked == [3]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 10**6))
def test_no_retained_value_stays_without_noise(size, stddev, seed):
    noisy = add_gaussian_noise(zeros(2 * size), torch.arange(size), stddev, SeededRandomness(seed))
    assert torch.equal(noisy != 0, torch.arange(2 * size) < size)


def test_no_noise_leaves_the_sum_as_it_is_and_draws_nothing():
    total = torch.randn(5, dtype=torch.float64)
    randomness = KnownNormals()
    assert torch.equal(add_gaussian_noise(total.clone(), torch.arange(5), 0.0, randomness), total)
    assert randomness.asked == []


def test_the_sum_stays_in_float64():
    noisy = add_gaussian_noise(zeros(3) + 1, torch.arange(3), 1e-12, KnownNormals())
    assert noisy.dtype == torch.float64
    assert noisy.tolist() == [1 + 1e-12, 1 + 2e-12, 1 + 3e-12]


def test_the_same_randomness_gives_the_same_noise():
    first, second, other = (
        add_gaussian_noise(zeros(8), torch.arange(8), 1.0, SeededRandomness(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert bool((first != other).all())


def test_nothing_retained_gets_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert add_gaussian_noise(zeros(3), nothing, 1.0, SeededRandomness(1)).tolist() == [0, 0, 0]
