"""Weighted means of updates, by hand-computed numbers and by the variance that they have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.exceptions import ConfigurationError
from server.aggregation import Contribution, aggregate, public_weight

FACTS = {"num_records": 100, "noise_multiplier": 2.0, "sampling_probability": 0.5}


def contribution(values, retained, weight=1.0, noise=1.0):
    mask = torch.zeros(4, dtype=torch.bool)
    mask[retained] = True
    return Contribution(torch.tensor(values), mask, weight, noise)


class TestWeights:
    def test_by_hand(self):
        assert public_weight("precision", **FACTS) == 25.0**2  # (q n / sigma)^2
        assert public_weight("records", **FACTS) == 100.0
        assert public_weight("uniform", **FACTS) == 1.0

    def test_precision_without_noise_is_by_records(self):
        assert public_weight("precision", **{**FACTS, "noise_multiplier": 0.0}) == 100.0

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(ConfigurationError, match=r"federation\.aggregation"):
            public_weight("median", **FACTS)

    @given(st.integers(1, 10**12), st.floats(0.1, 1e12), st.floats(1e-9, 1), st.sampled_from(["precision", "records"]))
    def test_are_positive_and_finite_for_all_that_a_client_may_declare(self, records, noise, sampling, kind):
        weight = public_weight(kind, num_records=records, noise_multiplier=noise, sampling_probability=sampling)
        assert 0 < weight < float("inf")


class TestMeans:
    def test_by_hand_with_overlapping_masks(self):
        combined = aggregate(
            [contribution([1.0, 3.0], [0, 1], weight=1.0), contribution([7.0, 5.0], [1, 2], weight=3.0, noise=2.0)]
        )
        assert combined.update.tolist() == [1.0, (1 * 3 + 3 * 7) / 4, 5.0, 0.0]
        assert combined.mask.tolist() == [True, True, True, False]
        np.testing.assert_allclose(combined.noise_stddev, [1.0, np.hypot(1.0, 3 * 2.0) / 4, 2.0, 0.0], rtol=1e-6)

    def test_one_client_is_itself(self):
        combined = aggregate([contribution([1.5, -2.5], [0, 3], weight=1e26, noise=0.25)])
        assert combined.update.tolist() == [1.5, 0.0, 0.0, -2.5]
        assert combined.noise_stddev.tolist() == [0.25, 0.0, 0.0, 0.25]

    @settings(max_examples=50, deadline=None)
    @given(st.permutations(range(5)), st.floats(1e-3, 1e3))
    def test_neither_order_nor_unit_of_the_weights_matters(self, order, unit):
        generator = np.random.default_rng(1)
        items = [
            contribution(generator.normal(size=2).astype(np.float32).tolist(), [i % 4, 3 - i % 2], 1.0 + i)
            for i in range(5)
            if i % 4 != 3 - i % 2
        ]
        scaled = [
            contribution(i.update.tolist(), torch.nonzero(i.mask).ravel().tolist(), unit * i.weight) for i in items
        ]
        shuffled = [scaled[i] for i in order if i < len(scaled)]
        one, other = aggregate(items), aggregate(shuffled)
        torch.testing.assert_close(one.update, other.update)
        torch.testing.assert_close(one.noise_stddev, other.noise_stddev)


class TestInverseVariance:
    """Clients whose releases differ in noise by a factor of 20, ten thousand coordinates, the true update zero."""

    CLIENTS = ((400, 1.0), (50, 1.0), (100, 4.0), (20, 1.0))
    SAMPLING, D = 0.5, 10_000

    def combined(self, weigh):
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(self.D, dtype=torch.bool)
        contributions = []
        for records, noise in self.CLIENTS:
            stddev = noise / (self.SAMPLING * records)
            update = stddev * torch.randn(self.D, generator=generator)
            contributions.append(Contribution(update, mask, weigh(records, noise), stddev))
        return aggregate(contributions)

    def by_kind(self, kind):
        return self.combined(
            lambda records, noise: public_weight(
                kind, num_records=records, noise_multiplier=noise, sampling_probability=self.SAMPLING
            )
        )

    @pytest.mark.parametrize("kind", ["precision", "records", "uniform"])
    def test_the_stated_noise_is_the_noise_that_is_there(self, kind):
        combined = self.by_kind(kind)
        stated, seen = float(combined.noise_stddev[0]), float(combined.update.std())
        assert abs(seen / stated - 1) < 4 / np.sqrt(2 * self.D)
        for wrong in (2 / 3, 3 / 2):  # the test can tell
            assert abs(seen / (stated * wrong) - 1) > 4 / np.sqrt(2 * self.D)

    def test_has_the_smallest_variance_of_all_weights(self):
        variance = {kind: float(self.by_kind(kind).update.var()) for kind in ("precision", "records", "uniform")}
        assert variance["precision"] < 0.9 * variance["records"]
        assert variance["precision"] < 0.1 * variance["uniform"]
        optimum = 1 / sum((self.SAMPLING * records / noise) ** 2 for records, noise in self.CLIENTS)
        assert abs(variance["precision"] / optimum - 1) < 4 * np.sqrt(2 / self.D)
        best = float(self.by_kind("precision").noise_stddev[0])
        generator = np.random.default_rng(0)
        for _ in range(30):
            factors = iter(generator.lognormal(sigma=0.3, size=len(self.CLIENTS)))
            other = self.combined(lambda records, noise, factors=factors: next(factors) * (records / noise) ** 2)
            assert float(other.noise_stddev[0]) >= best * (1 - 1e-6)
