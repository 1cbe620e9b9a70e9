import pytest
import torch
from torch import nn

from adadpigu_core.gradients import GradientOptions
from adadpigu_core.gradients.uses import Product


class Mean(nn.Module):
    """Average over everything between the first and the last dimension."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class Reshaped(nn.Module):
    """View the features of a record in another shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.reshape(len(x), *self.shape)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class OfSlices(nn.Module):
    """The layer sees views that are not contiguous, and an output that is used in pieces."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x):
        left, right = torch.tanh(self.first(x[:, ::2])).chunk(2, dim=-1)
        return self.second(left * right)


class Expanded(nn.Module):
    """The gradient of the output has stride 0."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).expand(-1, 5) + 0)


MODELS = {
    "only": lambda: nn.Linear(6, 3),
    "without bias": lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "one input": lambda: nn.Sequential(nn.Linear(6, 1), nn.SiLU(), nn.Linear(1, 3)),
    "deep": lambda: nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3)),
    "wide": lambda: nn.Sequential(nn.Linear(6, 300), nn.SiLU(), nn.Linear(300, 200), nn.SiLU(), nn.Linear(200, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_on_vectors(agree, built, records_of, name):
    agree(built(MODELS[name]), records_of((6,), 4))


@pytest.mark.parametrize("name", MODELS)
def test_on_vectors_as_on_an_accelerator(agree, built, records_of, monkeypatch, name):
    """There no record is corrected after the short cut, which is left where a mean takes part."""
    short = Product.squared_norms
    monkeypatch.setattr(Product, "squared_norms", lambda use, block: short(use, block) if block.mean is None else None)
    agree(built(MODELS[name]), records_of((6,), 4), options=GradientOptions(memory_limit=2**14))


# input [n, ...], positions first, features last; more positions than weights, and fewer
SHAPES = [(1, 4), (2, 4), (5, 4), (40, 4), (2, 3, 4), (1, 1, 4), (3, 1, 2, 4), (2, 30), (3, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_on_more_dimensions(agree, built, records_of, shape, bias):
    def make():
        return nn.Sequential(nn.Linear(shape[-1], 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias), Mean())

    agree(built(make), records_of(shape))


def test_on_hundreds_of_positions(agree, built, records_of):
    def make():
        return nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 40), nn.SiLU(), Mean(), nn.Linear(40, 3))

    agree(built(make), records_of((257, 8), 2))


def test_on_a_transposed_input(agree, built, records_of):
    def make():
        return nn.Sequential(Transposed(), nn.Linear(5, 4), nn.Tanh(), Transposed(), nn.Linear(4, 3), Mean())

    agree(built(make), records_of((5, 4)))


def test_after_a_change_of_shape(agree, built, records_of):
    def make():
        return nn.Sequential(Reshaped(3, 4), nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))

    agree(built(make), records_of((12,)))


def test_of_slices(agree, built, records_of):
    agree(built(OfSlices), records_of((8,)))


def test_with_an_expanded_output(agree, built, records_of):
    agree(built(Expanded), records_of((4,)))


@pytest.mark.parametrize("positions", [1, 3, 17])
def test_with_a_loss_of_every_token(agree, built, records_of, per_token, positions):
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))

    agree(built(make), records_of((positions, 4)), per_token)


def test_with_another_loss(agree, built, records_of):
    def squared(outputs, labels):
        return (outputs.squeeze(1) - labels).square()

    agree(built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))), records_of((4,)), squared)


def test_where_no_gradient_arrives(agree, built, records_of):
    """u is -m a / b for every record."""
    agree(built(lambda: nn.Linear(4, 3)), records_of((4,)), lambda outputs, labels: 0.0 * outputs.sum(1))


def test_where_the_features_are_zero(agree, built, records_of):
    records = records_of((4,), 4)
    records.features[1:3] = 0
    agree(built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))), records)
