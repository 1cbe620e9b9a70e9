"""Are the samples Poisson samples, and the variates uniform and normal?

Every test that draws from the operating system has a significance of at most 1e-8, so that a run of the whole file
raises a false alarm less than once in a million times. Each test is also shown something that it must reject.
"""

import math

import numpy as np
import pytest
from scipy import stats

from adadpigu_core.sampling import SeededRandomness, SystemRandomness, poisson_sample

SIGNIFICANCE = 1e-8
SOURCES = {"system": SystemRandomness, "seeded": lambda: SeededRandomness(20)}
DRAWS, RECORDS, PROBABILITY = 4000, 40, 0.3

sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


def is_distributed_as(sample, cdf):
    return stats.kstest(sample, cdf).pvalue > SIGNIFICANCE


def looks_normal(sample):
    """Kolmogorov and Smirnov's test for the middle, and a count of the tails, to which it is blind."""
    for threshold in (2.0, 3.0, 4.0):
        beyond = int((np.abs(sample) > threshold).sum())
        if stats.binomtest(beyond, len(sample), 2 * stats.norm.sf(threshold)).pvalue < SIGNIFICANCE:
            return False
    return is_distributed_as(sample, "norm")


def looks_binomial(sizes, records=RECORDS, probability=PROBABILITY):
    """Pearson's test of sample sizes; bins that expect fewer than 50 are put together."""
    probabilities, bins, collected = [], [], 0.0
    for size in range(records + 1):
        collected += stats.binom.pmf(size, records, probability)
        if collected * len(sizes) >= 50:
            probabilities.append(collected)
            bins.append(size)
            collected = 0.0
    probabilities[-1] += collected
    bins[-1] = records
    observed = np.bincount(np.searchsorted(bins, sizes), minlength=len(bins))
    expected = len(sizes) * np.array(probabilities) / sum(probabilities)
    return stats.chisquare(observed, expected).pvalue > SIGNIFICANCE


def includes_every_record_alike(samples, records=RECORDS, probability=PROBABILITY):
    counts = np.bincount(np.concatenate(samples), minlength=records)
    smallest = min(stats.binomtest(int(count), len(samples), probability).pvalue for count in counts)
    return smallest * records > SIGNIFICANCE


def includes_records_independently(samples, records=RECORDS):
    """No pair of records is drawn together more or less often than by chance."""
    indicator = np.zeros((len(samples), records))
    for row, sample in zip(indicator, samples, strict=True):
        row[sample] = 1
    correlation = np.corrcoef(indicator.T)[np.triu_indices(records, 1)]
    return 2 * stats.norm.sf(np.abs(correlation).max() * math.sqrt(len(samples))) * len(correlation) > SIGNIFICANCE


def fixed_size_samples():
    generator, size = np.random.default_rng(1), round(RECORDS * PROBABILITY)
    return [generator.permutation(RECORDS)[:size] for _ in range(DRAWS)]


# ---- variates


@sources
def test_uniform_variates_are_uniform(source):
    sample = source().uniform(100_000)
    assert is_distributed_as(sample, "uniform")
    assert not is_distributed_as(sample**1.05, "uniform"), "negative control"


@sources
def test_normal_variates_are_normal(source):
    sample = source().normal(100_000)
    assert looks_normal(sample)


@pytest.mark.parametrize(
    "sample",
    [
        1.05 * np.random.default_rng(1).standard_normal(100_000),
        0.05 + np.random.default_rng(1).standard_normal(100_000),
        np.random.default_rng(1).laplace(scale=math.sqrt(0.5), size=100_000),
        np.random.default_rng(1).uniform(-math.sqrt(3), math.sqrt(3), 100_000),
        np.clip(np.random.default_rng(1).standard_normal(100_000), -3, 3),
        np.random.default_rng(1).standard_t(8, 100_000) * math.sqrt(6 / 8),
    ],
    ids=["wide", "shifted", "Laplace", "uniform", "cut at 3", "heavy tails"],
)
def test_what_is_not_standard_normal_is_found_out(sample):
    """Negative controls; all but the first two have the right mean and variance, more or less."""
    assert not looks_normal(sample)


@sources
@pytest.mark.parametrize("apart", [1, 2, 50_000])
def test_normal_variates_are_independent(source, apart):
    """Neighbours, and the two halves: Box and Muller make the second half of the same radii as the first."""
    sample = source().normal(100_000)
    for transform in (np.asarray, np.square, np.abs):
        values = transform(sample)
        first, second = values[:-apart], values[apart:]
        correlation = stats.pearsonr(first, second).statistic
        assert abs(correlation) * math.sqrt(len(first)) < stats.norm.isf(SIGNIFICANCE / 2)


@sources
def test_successive_calls_are_independent(source):
    randomness = source()
    rows = np.array([randomness.normal(9) for _ in range(20_000)])
    following = stats.pearsonr(rows[:-1].ravel(), rows[1:].ravel()).statistic
    assert abs(following) * math.sqrt(rows[1:].size) < stats.norm.isf(SIGNIFICANCE / 2)
    assert looks_normal(rows.ravel())
    for column in (0, 4, 5, 8):  # an odd number: the last of the radii is used once only
        assert looks_normal(rows[:, column])


def test_streams_of_neighbouring_keys_are_independent():
    rows = np.array([SeededRandomness(1, client, 0).normal(20) for client in range(3000)])
    assert looks_normal(rows.ravel())
    assert looks_normal(rows[:, 0]), "across clients"
    following = stats.pearsonr(rows[:-1].ravel(), rows[1:].ravel()).statistic
    assert abs(following) * math.sqrt(rows[1:].size) < stats.norm.isf(SIGNIFICANCE / 2)


# ---- samples


@sources
def test_sample_sizes_are_binomial_and_inclusions_independent(source):
    randomness = source()
    samples = [poisson_sample(RECORDS, PROBABILITY, randomness) for _ in range(DRAWS)]
    assert looks_binomial([len(sample) for sample in samples])
    assert includes_every_record_alike(samples)
    assert includes_records_independently(samples)


def test_shuffled_batches_of_fixed_size_are_found_out():
    """Negative control: what the published code does."""
    samples = fixed_size_samples()
    assert includes_every_record_alike(samples), "each record alone looks right"
    assert not looks_binomial([len(sample) for sample in samples])


def test_another_probability_is_found_out():
    randomness = SeededRandomness(1)
    samples = [poisson_sample(RECORDS, 1.25 * PROBABILITY, randomness) for _ in range(DRAWS)]
    assert not looks_binomial([len(sample) for sample in samples])
    assert not includes_every_record_alike(samples)


def test_records_that_come_in_pairs_are_found_out():
    randomness = SeededRandomness(1)
    samples = []
    for _ in range(DRAWS):
        half = poisson_sample(RECORDS // 2, PROBABILITY, randomness)
        samples.append(np.concatenate([half, half + RECORDS // 2]))
    assert includes_every_record_alike(samples)
    assert not includes_records_independently(samples)
