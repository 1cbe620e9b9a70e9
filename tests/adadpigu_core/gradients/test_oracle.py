"""The oracle is right, and what compares with it would notice an engine that is not."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from adadpigu_core.gradients import ClippedSum, clipped_sum


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class WithSpare(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.network(x)


def test_the_gradients_are_those_of_finite_differences(built, records_of, reference_of, cross_entropy):
    model, records = built(network), records_of((4,), 2)
    gradients = reference_of(model, records).gradients
    double = model.double()
    with torch.no_grad():
        for coordinate, (row, column) in enumerate([(0, 0), (4, 3), (2, 1)]):
            weight, step = double[0].weight, 1e-5
            before = weight[row, column].clone()
            values = []
            for sign in (1, -1):
                weight[row, column] = before + sign * step
                values.append(cross_entropy(double(records.features.double()), records.labels))
            weight[row, column] = before
            slopes = (values[0] - values[1]) / (2 * step)
            assert torch.allclose(gradients[:, row * 4 + column], slopes, atol=1e-8), coordinate


def test_views_are_averaged_and_unused_parameters_have_gradient_zero(built, records_of, reference_of):
    model, records = built(WithSpare), records_of((4,), 2)
    once = reference_of(model, records).gradients
    assert once.shape == (2, 25 + 18 + 6)
    assert not once[:, -6:].any()
    twice = reference_of(model, records, augmentation=lambda x: torch.stack([x, x], 1)).gradients
    assert torch.allclose(once, twice, rtol=1e-14)
    shifted = reference_of(model, records, augmentation=lambda x: torch.stack([x, x + 1], 1)).gradients
    assert not torch.allclose(once, shifted, rtol=1e-2)


def wrong_norms(result, given, clipping_norm):
    return dataclasses.replace(result, norms=result.norms * (1 + 5e-5))


def wrong_total(result, given, clipping_norm):
    return dataclasses.replace(result, total=result.total * (1 + 5e-5))


def without_mean(result, given, clipping_norm):
    """As an engine would have it that forgets parameters without gradient: the last layer's bias is one."""
    count = len(result.norms)
    total = result.total.clone()
    total[-3:] += 1e-3 * count * (given.mask * given.mean / given.scale)[-3:]
    return ClippedSum(total, result.norms)


def outside_of_the_mask(result, given, clipping_norm):
    total = result.total.clone()
    total[~given.mask] = 1e-30
    return ClippedSum(total, result.norms)


def of_fewer_records(result, given, clipping_norm):
    return ClippedSum(result.total, result.norms[:-1])


def with_norms_of_single_precision(result, given, clipping_norm):
    return ClippedSum(result.total, result.norms.float())


WRONG = (wrong_norms, wrong_total, without_mean, outside_of_the_mask, of_fewer_records, with_norms_of_single_precision)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("clipping_norm", [0.1, math.inf])
def test_a_wrong_result_is_noticed(
    built, records_of, reference_of, standardisation_of, expected_of, compare, cross_entropy, wrong, clipping_norm
):
    model, records = built(network), records_of((4,), 5)
    reference = reference_of(model, records)
    given = standardisation_of(reference, "most", "random", "unit")
    expected = expected_of(reference, given, clipping_norm)
    result = clipped_sum(model, cross_entropy, records, given, clipping_norm)
    compare(result, expected, given)
    with pytest.raises((AssertionError, RuntimeError)):
        compare(wrong(result, given, clipping_norm), expected, given)


def test_what_is_allowed_for_rounding_is_small(built, records_of, reference_of, standardisation_of, expected_of):
    """Without cancellation, tolerances are the relative 1e-5 and little more; with it they grow in proportion."""
    model, records = built(network), records_of((4,), 5)
    reference = reference_of(model, records)
    for mean, scale, most in (
        ("zero", "unit", 2e-5),
        ("zero", "layer", 2e-5),
        ("random", "unit", 3e-5),
        ("near", "unit", 3e-3),
    ):
        expected = expected_of(reference, standardisation_of(reference, "full", mean, scale), math.inf)
        shares = expected.tolerances / expected.norms
        assert bool((shares >= 1e-5).all())
        assert bool((shares <= most).all()), (mean, scale, shares)
