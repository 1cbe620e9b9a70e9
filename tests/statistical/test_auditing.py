"""Can an adversary tell neighbouring data sets apart better than epsilon allows?

The adversary sees one release, knows everything but whether a canary is among the records, and guesses that it is when
the release points far enough in the canary's direction. How often that is right, with a confidence interval, bounds
epsilon from below (Jagielski et al. 2020; Nasr et al. 2021). A sound mechanism stays above the bound, a mechanism with
less noise than it claims does not. Intervals have a confidence of 1 - 1e-8.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from adadpigu_core.accounting import Event, epsilon
from adadpigu_core.adaptive_clipping import FixedStatistics
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import clipped_sum, cross_entropy
from adadpigu_core.noise import add_gaussian_noise
from adadpigu_core.private_step import Mechanism, private_step
from adadpigu_core.sampling import SeededRandomness, SystemRandomness, poisson_sample

SIGNIFICANCE = 1e-8
DRAWS = 100_000
D = 4
CLIPPING_NORM = 0.7
NOISE_MULTIPLIER = 1.0
MASK = torch.ones(D, dtype=torch.bool)
STATISTICS = FixedStatistics(torch.linspace(-0.2, 0.2, D), torch.linspace(0.5, 2, D))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only stand in each other's way in models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    return model


@pytest.fixture(scope="module")
def ordinary():
    return Records(torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]), torch.tensor([0, 1, 0]))


@pytest.fixture(scope="module")
def with_canary(ordinary):
    """One record more, whose gradient is far larger than the clipping norm."""
    return Records(
        torch.cat([ordinary.features, torch.tensor([[300.0, 400.0]])]), torch.cat([ordinary.labels, torch.tensor([1])])
    )


def total_of(model, records):
    return clipped_sum(model, cross_entropy, records, STATISTICS.standardisation(MASK), CLIPPING_NORM).total.double()


def noisy_totals(total, noise_multiplier, randomness, draws=DRAWS):
    """Many releases at once: the noise is independent across coordinates, so that many vectors are one long one."""
    long = total.repeat(draws)
    retained = MASK.repeat(draws).nonzero().flatten()
    return add_gaussian_noise(long, retained, noise_multiplier * CLIPPING_NORM, randomness).view(draws, D)


def score(noisy, ordinary_total, canary_total):
    """How far a release points in the canary's direction: about 0 without it, about 1 with it."""
    direction = canary_total - ordinary_total
    return ((noisy - ordinary_total) @ direction / direction.square().sum()).numpy()


def epsilon_lower_bound(scores_with, scores_without, threshold, delta):
    """Smallest epsilon that the guesses do not contradict: P(guess | with) <= e^epsilon P(guess | without) + delta."""
    right, wrong = int((scores_with > threshold).sum()), int((scores_without > threshold).sum())
    at_least = stats.beta.ppf(SIGNIFICANCE / 2, right, len(scores_with) - right + 1) if right else 0.0
    at_most = stats.beta.isf(SIGNIFICANCE / 2, wrong + 1, len(scores_without) - wrong)
    return math.log(max(at_least - delta, 1e-300) / at_most)


def scores_of(model, without, with_one, noise_multiplier, randomness):
    totals = [total_of(model, records) for records in (without, with_one)]
    return [score(noisy_totals(total, noise_multiplier, randomness), *totals) for total in totals]


def audit(model, without, with_one, noise_multiplier, threshold, delta, randomness):
    scores = scores_of(model, without, with_one, noise_multiplier, randomness)
    return epsilon_lower_bound(scores[1], scores[0], threshold, delta)


def best_threshold(claimed, noise_multiplier=NOISE_MULTIPLIER):
    """Where one likelihood is e^epsilon times the other."""
    return claimed * noise_multiplier**2 + 0.5


def test_a_private_step_is_the_clipped_sum_with_noise(model, with_canary):
    """Bit by bit, so that what is audited below is what clients release."""
    mechanism = Mechanism("training", CLIPPING_NORM, NOISE_MULTIPLIER, 1.0, 4)
    arguments = (cross_entropy, with_canary, mechanism, MASK, STATISTICS)
    for seed in range(5):
        released, _, _ = private_step(model, *arguments, SeededRandomness(seed), lambda _: None)
        randomness = SeededRandomness(seed)
        assert len(poisson_sample(4, 1.0, randomness)) == 4
        randomness.torch_seed()
        noisy = noisy_totals(total_of(model, with_canary), NOISE_MULTIPLIER, randomness, draws=1)[0]
        expected = STATISTICS.mean.double() + STATISTICS.scale.double() * noisy / 4
        assert torch.equal(released.gradient, expected.float())


def test_the_canary_is_as_bad_as_a_record_can_be(model, ordinary, with_canary):
    moved = total_of(model, with_canary) - total_of(model, ordinary)
    assert float(moved.norm()) == pytest.approx(CLIPPING_NORM, rel=1e-5)
    assert float(moved.norm()) <= CLIPPING_NORM


@pytest.mark.parametrize("source", [SystemRandomness, lambda: SeededRandomness(1)], ids=["system", "seeded"])
def test_releases_are_not_told_apart_better_than_epsilon_allows(model, ordinary, with_canary, source):
    randomness = source()
    scores_without, scores_with = scores_of(model, ordinary, with_canary, NOISE_MULTIPLIER, randomness)
    for delta in (1e-5, 0.05):
        claimed = epsilon([Event("training", NOISE_MULTIPLIER, 1.0)], delta)
        for threshold in (0.5, 1.2, 2.0, best_threshold(claimed)):
            assert epsilon_lower_bound(scores_with, scores_without, threshold, delta) <= claimed
            # nor by guessing that the record is absent
            assert epsilon_lower_bound(-scores_without, -scores_with, threshold - 1, delta) <= claimed


def test_the_audit_is_sharp(model, ordinary, with_canary):
    """At a large delta the bound comes close to what is claimed: an audit that never finds anything proves nothing."""
    claimed = epsilon([Event("training", NOISE_MULTIPLIER, 1.0)], 0.05)
    bound = audit(model, ordinary, with_canary, NOISE_MULTIPLIER, best_threshold(claimed), 0.05, SeededRandomness(1))
    assert 0.85 * claimed < bound <= claimed


@pytest.mark.parametrize(("share", "delta", "threshold"), [(1 / 3, 1e-5, 1.2), (1 / 3, 0.05, 1.0), (0.8, 0.05, None)])
def test_less_noise_than_claimed_is_found_out(model, ordinary, with_canary, share, delta, threshold):
    """Negative control."""
    claimed = epsilon([Event("training", NOISE_MULTIPLIER, 1.0)], delta)
    threshold = best_threshold(claimed, share * NOISE_MULTIPLIER) if threshold is None else threshold
    bound = audit(model, ordinary, with_canary, share * NOISE_MULTIPLIER, threshold, delta, SeededRandomness(1))
    assert bound > claimed


def test_a_record_that_is_not_clipped_is_found_out(model, ordinary, with_canary):
    """Negative control: the noise is right, the sensitivity is not."""
    claimed = epsilon([Event("training", NOISE_MULTIPLIER, 1.0)], 1e-5)
    totals = [total_of(model, records) for records in (ordinary, with_canary)]
    totals[1] = totals[0] + 3 * (totals[1] - totals[0])
    scores = [
        score(noisy_totals(total, NOISE_MULTIPLIER, SeededRandomness(i)), *totals) for i, total in enumerate(totals)
    ]
    assert epsilon_lower_bound(scores[1], scores[0], 1.2, 1e-5) > claimed


# ---- with sampling

PROBABILITY = 0.2


def sampled_scores(model, ordinary, with_canary, probability, randomness):
    """Scores with and without the canary, which is in a step's sample with some probability."""
    without, present = (total_of(model, records) for records in (ordinary, with_canary))
    base = score(noisy_totals(without, NOISE_MULTIPLIER, randomness), without, present)
    drawn = np.zeros(DRAWS)
    drawn[poisson_sample(DRAWS, probability, randomness)] = 1
    return score(noisy_totals(without, NOISE_MULTIPLIER, randomness), without, present) + drawn, base


def test_sampled_releases_are_not_told_apart_better_than_epsilon_allows(model, ordinary, with_canary):
    scores = sampled_scores(model, ordinary, with_canary, PROBABILITY, SystemRandomness())
    for delta in (1e-5, 0.05):
        claimed = epsilon([Event("training", NOISE_MULTIPLIER, PROBABILITY)], delta)
        for threshold in (0.5, 1.0, 1.5, 2.5):
            assert epsilon_lower_bound(*scores, threshold, delta) <= claimed


def test_claiming_amplification_without_sampling_is_found_out(model, ordinary, with_canary):
    """Negative control: accounted as a Poisson sample, but the record is in every step."""
    claimed = epsilon([Event("training", NOISE_MULTIPLIER, PROBABILITY)], 0.01)
    scores = sampled_scores(model, ordinary, with_canary, 1.0, SeededRandomness(1))
    assert epsilon_lower_bound(*scores, 2.0, 0.01) > claimed
