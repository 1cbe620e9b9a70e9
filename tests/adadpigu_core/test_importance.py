import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.importance import MEASURES, importance_of, rank


def test_magnitude_is_the_absolute_value():
    assert importance_of(torch.tensor([-2.0, 0.0, 3.0]), 0.5, "magnitude").tolist() == [2, 0, 3]


def test_energy_takes_the_known_noise_off_the_square():
    assert importance_of(torch.tensor([-2.0, 0.0, 3.0]), 0.5, "energy").tolist() == [3.75, -0.25, 8.75]


@pytest.mark.parametrize("measure", MEASURES)
def test_the_release_is_left_as_it_is(measure):
    released = torch.tensor([-2.0, 1.0])
    importance_of(released, 0.5, measure)
    assert released.tolist() == [-2, 1]


def test_an_unknown_measure_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"importance\.measure.*'loudness'.*magnitude, energy"):
        importance_of(torch.zeros(2), 1.0, "loudness")


def test_energy_is_unbiased_and_magnitude_is_not():
    generator = torch.Generator().manual_seed(0)
    signal = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    noise_stddev = 1.5
    released = signal + noise_stddev * torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    energy = torch.stack([importance_of(row, noise_stddev, "energy") for row in released.split(50_000)]).mean((0, 1))
    # the standard deviation of a square is at most sqrt(2 nu^4 + 4 s^2 nu^2) = 6.8, so this is 5 of that of the mean
    assert torch.allclose(energy, signal.square(), atol=0.08)
    magnitude = importance_of(released, noise_stddev, "magnitude").mean(0)
    assert magnitude[0] > 1, "noise alone looks important to the paper's measure"


def test_a_ranking_starts_with_the_most_important():
    assert rank(torch.tensor([0.1, 3.0, -1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_ties_keep_index_order():
    assert rank(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2, 4]
    assert rank(torch.zeros(5000)).tolist() == list(range(5000))
    assert rank(torch.tensor([-0.0, 0.0, -0.0])).tolist() == [0, 1, 2]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60))
def test_a_ranking_is_a_stable_permutation(scores):
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    assert rank(torch.tensor(scores, dtype=torch.float32)).tolist() == expected
