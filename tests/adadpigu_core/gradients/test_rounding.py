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


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 10)

    def forward(self, x):
        return self.table(x.long()).mean(1)


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


@pytest.mark.parametrize(("size", "scale"), [(1e28, 1e-12), (1e32, 1e-12), (1e33, 1e-11), (1e35, 1e-9)])
def test_small_factors_beside_small_output_gradients_and_huge_inputs(built, exact_norm, size, scale):
    """Each product is an ordinary number, and factors are; but a factor times an output gradient is not."""
    layers = (nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, CLASSES, bias=False))
    model = built(lambda: nn.Sequential(*layers))
    given = uniform(scale, model)
    given = Standardisation((torch.arange(len(given.mask)) // 64) == 1, given.mean, given.scale)
    generator, norms = torch.Generator().manual_seed(0), []
    for _ in range(40):
        with torch.no_grad():
            for layer, by in zip(model, (size, 1.0, 1 / size), strict=True):
                layer.weight.copy_(by * torch.randn(layer.weight.shape, generator=generator))
        record = Records(torch.randn(1, 8, generator=generator), torch.ones(1).long())
        found = clipped_sum(model, cross_entropy, record, given, 1.0)
        norms.append(float(found.norms[0]))
        assert exact_norm(found.total) <= 1.0
    assert 1e8 < sorted(norms)[20] < 1e16


@pytest.mark.parametrize("kind", ["matrix", "table"])
def test_of_many_gradients_and_as_many_means_what_is_left_is_right(built, kind):
    """Gradients that are all but the mean, a thousand times as long as what is left of them."""
    model = built(lambda: nn.Linear(64, 10, bias=False) if kind == "matrix" else Table())
    features = torch.rand(1, 64) if kind == "matrix" else torch.tensor([[7.0, 2.0]])
    count = 301
    records = Records(features.expand(count, -1).contiguous(), torch.full((count,), 3))
    identity = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    gradient = clipped_sum(model, cross_entropy, records.select([0]), identity, float("inf")).total
    away = torch.randn(len(gradient), generator=torch.Generator().manual_seed(1)) * gradient.abs() * 1e-3
    mean = gradient - away
    given = Standardisation(identity.mask, mean, torch.full_like(mean, float(gradient.norm()) * 1e-3))
    total = clipped_sum(model, cross_entropy, records, given, 2.0).total.double()
    left = (gradient.double() - mean.double()) / given.scale.double()
    assert 0.5 < left.norm() < 2
    assert (total - count * left).norm() < 2e-4 * count * left.norm()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_gradients_of_last_bits_do_not_tell_how_many_records_there_are(built, exact_norm, count):
    """Hidden units whose outputs are all alike have gradients that would be zero, if numbers were exact."""
    model = built(lambda: nn.Sequential(nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 10)))
    generator = torch.Generator().manual_seed(0)
    given = uniform(1.0, model)
    given = Standardisation((torch.arange(len(given.mask)) // 17) == 20, given.mean, given.scale)  # first biases
    for _ in range(10):
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.fill_(1.0)
            model[2].weight.copy_(torch.rand(17, generator=generator).expand(10, 17))
        records = Records(torch.rand(count + 1, 20, generator=generator), torch.arange(count + 1) % 10)
        some = records.select(list(range(count)))
        many, fewer = (clipped_sum(model, cross_entropy, part, given, 1e-12).total for part in (records, some))
        assert exact_norm(many) > 0
        assert exact_norm(many.double() - fewer.double()) <= 1e-12 * (1 + 1e-6)
