"""Rounding that could let a record contribute more than the clipping norm: where terms cancel, or factors are tiny."""

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import GradientOptions, clipped_sum, cross_entropy
from adadpigu_core.parameters import ParameterLayout

CLASSES = 3


class Difference(nn.Module):
    def forward(self, x):
        return (x[:, 0] - x[:, 1])[:, :CLASSES] * 1e3


CANCELLING = [(0, 1, 1e-4), (0, 1e-8, 1), (1e-7, 1, 1e-4), (1e-5, 1, 1e-2), (1e-4, 1, 0.1)]


def uniform(scale, model):
    d = ParameterLayout.of(model).num_parameters
    return Standardisation(torch.ones(d, dtype=torch.bool), torch.zeros(d), torch.full((d,), float(scale)))


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(("apart", "scale", "norm"), CANCELLING)
def test_where_positions_cancel_a_record_contributes_no_more(built, exact_norm, apart, scale, norm, limit):
    model = built(lambda: nn.Sequential(nn.Linear(50, 60, bias=False), Difference()))
    generator, label = torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.long)
    options = GradientOptions(memory_limit=limit)
    for _ in range(20):
        token = torch.randn(1, 1, 50, generator=generator)
        record = Records(torch.cat([token, token * (1 + apart)], 1), label)
        total = clipped_sum(model, cross_entropy, record, uniform(scale, model), norm, options=options).total
        assert exact_norm(total) <= norm


@pytest.mark.parametrize(("scale", "norm"), [(1.0, 7e-8), (1e-6, 7e-2)])
def test_huge_activations_beside_a_small_clipping_norm(built, exact_norm, scale, norm):
    """Clipping factors so small that output gradients times them are denormal, and rounded by a third."""
    model, label = built(lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False))), torch.ones(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with torch.no_grad():
            model[0].weight.copy_(3e36 * torch.randn(8, 8, generator=generator))
            model[1].weight.copy_(1e-37 * torch.randn(3, 8, generator=generator))
        record = Records(torch.randn(1, 8, generator=generator), label.long())
        total = clipped_sum(model, cross_entropy, record, uniform(scale, model), norm).total
        assert exact_norm(total) <= norm
