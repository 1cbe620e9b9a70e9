"""Is the noise of real releases as large as claimed, and independent?

After JAX Privacy's noise test: accept the claimed noise multiplier, reject two thirds and three halves of it. Every
test that draws from the operating system has a significance of at most 1e-8.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from adadpigu_core.adaptive_clipping import FixedStatistics
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import cross_entropy
from adadpigu_core.private_step import Mechanism, private_step
from adadpigu_core.sampling import SeededRandomness, SystemRandomness

SIGNIFICANCE = 1e-8
NOISE_MULTIPLIER, CLIPPING_NORM, COUNT = 1.3, 0.8, 4
D = 8
MASK = torch.tensor([True, True, False, True, True, True, False, True])
STATISTICS = FixedStatistics(torch.linspace(-1, 1, D), 10 ** torch.linspace(-1, 1, D))
SOURCES = {"system": SystemRandomness, "seeded": lambda: SeededRandomness(20)}
RELEASES = 500


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only stand in each other's way in models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2)


@pytest.fixture(scope="module")
def records():
    generator = torch.Generator().manual_seed(0)
    return Records(torch.randn(COUNT, 3, generator=generator), torch.tensor([0, 1, 1, 0]))


def release(model, records, noise_multiplier, randomness):
    mechanism = Mechanism("training", CLIPPING_NORM, noise_multiplier, 1.0, COUNT)
    arguments = (cross_entropy, records, mechanism, MASK, STATISTICS, randomness, lambda _: None)
    return private_step(model, *arguments)[0]


def noise_of(model, records, noise_multiplier, randomness):
    """Noise on the clipped sum in units of the clipping norm, [releases, retained], taken from real releases."""
    clean = release(model, records, 0.0, randomness).gradient
    noisy = torch.stack([release(model, records, noise_multiplier, randomness).gradient for _ in range(RELEASES)])
    noise = (noisy - clean).double() * COUNT / CLIPPING_NORM / STATISTICS.scale
    assert not noise[:, ~MASK].any()
    return noise[:, MASK].numpy()


def has_stddev(noise, stddev):
    """Two-sided test of the variance of normal variates."""
    statistic, count = float(np.square(noise / stddev).sum()), noise.size
    return 2 * min(stats.chi2.cdf(statistic, count), stats.chi2.sf(statistic, count)) > SIGNIFICANCE


def are_independent(noise):
    """No two columns are correlated, and no row with the next."""
    pairs = np.triu_indices(noise.shape[1], 1)
    correlations = [*np.corrcoef(noise.T)[pairs], *(np.corrcoef(c[:-1], c[1:])[0, 1] for c in noise.T)]
    largest = np.abs(correlations).max() * math.sqrt(len(noise))
    return 2 * stats.norm.sf(largest) * len(correlations) > SIGNIFICANCE


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_the_noise_is_as_large_as_claimed_and_independent(model, records, source):
    noise = noise_of(model, records, NOISE_MULTIPLIER, source())
    assert noise.shape == (RELEASES, 6)
    assert has_stddev(noise, NOISE_MULTIPLIER)
    for column in noise.T:
        assert has_stddev(column, NOISE_MULTIPLIER), "each coordinate, whatever its scale"
    assert are_independent(noise)
    assert stats.kstest(noise.ravel() / NOISE_MULTIPLIER, "norm").pvalue > SIGNIFICANCE


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_two_thirds_and_three_halves_of_the_noise_are_found_out(model, records, factor):
    """Negative controls: the mechanism really adds another noise than the claimed one."""
    noise = noise_of(model, records, factor * NOISE_MULTIPLIER, SeededRandomness(20))
    assert not has_stddev(noise, NOISE_MULTIPLIER)
    assert not any(has_stddev(column, NOISE_MULTIPLIER) for column in noise.T), "one coordinate is enough"


class OneVariateForAll(SeededRandomness):
    def normal(self, size):
        return np.full(size, super().normal(1))


class TheSameTwice(SeededRandomness):
    previous = None

    def normal(self, size):
        drawn = super().normal(size) if self.previous is None else self.previous
        self.previous = drawn if self.previous is None else None
        return drawn


@pytest.mark.parametrize("source", [OneVariateForAll, TheSameTwice])
def test_noise_that_is_used_twice_is_found_out(model, records, source):
    """Negative controls: right in size, but shared by coordinates or by steps."""
    noise = noise_of(model, records, NOISE_MULTIPLIER, source(20))
    assert not are_independent(noise)


def test_the_stated_standard_deviation_is_that_of_the_release(model, records):
    randomness = SeededRandomness(20)
    clean = release(model, records, 0.0, randomness).gradient
    releases = [release(model, records, NOISE_MULTIPLIER, randomness) for _ in range(RELEASES)]
    stated = releases[0].noise_stddev
    assert torch.equal(stated != 0, MASK)
    assert all(torch.equal(other.noise_stddev, stated) for other in releases)
    noise = torch.stack([r.gradient - clean for r in releases]).double()
    for column in torch.nonzero(MASK).flatten():
        assert has_stddev(noise[:, column].numpy(), float(stated[column]))
