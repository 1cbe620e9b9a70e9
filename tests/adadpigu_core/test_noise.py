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


def test_noise_is_added_where_the_mask_is_true():
    total = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    randomness = KnownNormals()
    assert add_gaussian_noise(total, 0.5, mask, randomness).tolist() == [10.5, 0, 31, 0]
    assert randomness.asked == [2], "no noise may be drawn for frozen coordinates"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(1e-6, 1e6), st.integers(0, 10**6))
def test_noise_is_zero_on_frozen_coordinates_and_only_there(flags, stddev, seed):
    mask = torch.tensor(flags)
    noisy = add_gaussian_noise(torch.zeros(len(flags)), stddev, mask, SeededRandomness(seed))
    assert torch.equal(noisy != 0, mask)


def test_no_noise_leaves_the_sum_as_it_is_and_draws_nothing():
    total = torch.randn(5, dtype=torch.float64)
    randomness = KnownNormals()
    noisy = add_gaussian_noise(total, 0.0, torch.ones(5, dtype=torch.bool), randomness)
    assert torch.equal(noisy, total)
    assert randomness.asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_stays_in_float64(dtype):
    total = torch.ones(3, dtype=dtype)
    noisy = add_gaussian_noise(total, 1e-12, torch.ones(3, dtype=torch.bool), KnownNormals())
    assert noisy.dtype == torch.float64
    assert noisy.tolist() == [1 + 1e-12, 1 + 2e-12, 1 + 3e-12]
    assert total.tolist() == [1, 1, 1], "the argument must not change"


def test_the_same_randomness_gives_the_same_noise():
    total, mask = torch.zeros(8), torch.ones(8, dtype=torch.bool)
    first, second = (add_gaussian_noise(total, 1.0, mask, SeededRandomness(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, add_gaussian_noise(total, 1.0, mask, SeededRandomness(4)))


def test_an_empty_mask_gives_zeros():
    noisy = add_gaussian_noise(torch.ones(3), 1.0, torch.zeros(3, dtype=torch.bool), SeededRandomness(1))
    assert noisy.tolist() == [0, 0, 0]
