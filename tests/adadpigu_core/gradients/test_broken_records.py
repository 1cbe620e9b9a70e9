"""Records whose gradient is not finite contribute zero, and nobody else notices."""

import math

import pytest
import torch
from torch import nn

from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import MessageError
from adadpigu_core.gradients import clipped_sum

BROKEN = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf, "overflow": 1e38}


class Mean(nn.Module):
    def forward(self, x):
        return torch.tanh(x).flatten(1, -2).mean(1)


class Squares(nn.Module):
    """Overflows for large features."""

    def forward(self, x):
        return x * x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.square, self.body, self.norm = Squares(), nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.square(x)], 1)
        return self.head((x + self.body(self.norm(x), x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x * x)[0].mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head, self.spare = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer(x * x)))


def words():
    """The features of a record do more than name words: an index that is not finite would be an error."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            y = self.words(x.nan_to_num(0, 0, 0).clamp(0, 4).long())
            return self.head((y * (x * x).unsqueeze(-1)).mean(1))

    return Words()


MODELS = {
    "vectors": (lambda: nn.Sequential(Squares(), nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)), (4,)),
    "sequences": (lambda: nn.Sequential(Squares(), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), Mean()), (5, 4)),
    "images": (
        lambda: nn.Sequential(Squares(), nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(48, 3)),
        (2, 6, 5),
    ),
    "transposed": (lambda: nn.Sequential(Squares(), nn.ConvTranspose1d(2, 3, 2), Mean(), nn.Linear(6, 3)), (2, 5)),
    "slopes": (lambda: nn.Sequential(Squares(), nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)), (4,)),
    "words": (words, (5,)),
    "attention": (Attention, (5, 4)),
    "recurrent": (Recurrent, (5, 4)),
    "twice": (Twice, (4,)),
}


@pytest.fixture(scope="module")
def case(built, records_of, reference_of, standardisation_of, clipping_norm_of):
    def make(name):
        model, records = built(MODELS[name][0]), records_of(MODELS[name][1], 6)
        reference = reference_of(model, records)
        given = standardisation_of(reference, "most", "random", "layer")
        return model, records, given, clipping_norm_of(reference, given, "typical")

    return make


def broken(records, where, value):
    features = records.features.clone()
    features.flatten(1)[where, 1] = value
    return Records(features, records.labels)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("clipped", [True, False])
def test_they_contribute_zero_and_change_nobody_else(case, cross_entropy, name, kind, clipped):
    """To the rounding of kernels of another shape."""
    model, records, given, norm = case(name)
    norm = norm if clipped else math.inf
    mixed = clipped_sum(model, cross_entropy, broken(records, [0, 3], BROKEN[kind]), given, norm)
    others = clipped_sum(model, cross_entropy, records.select([1, 2, 4, 5]), given, norm)
    if kind != "overflow" or name != "recurrent":  # gates that are full give a finite gradient
        assert not torch.isfinite(mixed.norms[[0, 3]]).any()
        assert float((mixed.total - others.total).norm()) <= 1e-5 * float(others.norms.clamp(max=norm).sum())
    assert bool(torch.isfinite(mixed.total).all())
    assert torch.allclose(mixed.norms[[1, 2, 4, 5]], others.norms, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_nobody_can_see_in_what_way_they_are_broken(case, cross_entropy, name):
    """In kernels of the same shape not a bit of the others changes, nor with how many places are broken."""
    model, records, given, norm = case(name)
    results = [
        clipped_sum(model, cross_entropy, broken(records, [2], value), given, norm) for value in (math.nan, math.inf)
    ]
    everywhere = records.features.clone()
    everywhere[2] = math.nan
    results.append(clipped_sum(model, cross_entropy, Records(everywhere, records.labels), given, norm))
    for result in results[1:]:
        assert torch.equal(result.total, results[0].total)
        assert torch.equal(result.norms[[0, 1, 3, 4, 5]], results[0].norms[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("name", MODELS)
def test_a_record_does_not_know_who_is_broken(case, cross_entropy, name):
    """Norms of the others are bit for bit those of a batch without broken records."""
    model, records, given, norm = case(name)
    whole = clipped_sum(model, cross_entropy, records, given, norm)
    mixed = clipped_sum(model, cross_entropy, broken(records, [0, 3], math.nan), given, norm)
    assert torch.equal(mixed.norms[[1, 2, 4, 5]], whole.norms[[1, 2, 4, 5]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
def test_nothing_but_broken_records_gives_zero(case, cross_entropy, name, clipping_norm):
    model, records, given, _ = case(name)
    for some in (records.select([0]), records):
        everyone = broken(some, list(range(len(some))), math.nan)
        result = clipped_sum(model, cross_entropy, everyone, given, clipping_norm)
        assert torch.equal(result.total, torch.zeros_like(result.total))


def test_a_gradient_that_overflows_on_its_way_back(built, records_of, reference_of, standardisation_of):
    """Losses are finite; the slope of a root at zero is not."""

    def root(outputs, labels):
        return outputs.abs().sqrt().sum(1)

    model, records = built(lambda: nn.Linear(4, 3, bias=False)), records_of((4,), 4)
    given = standardisation_of(reference_of(model, records, root), "full", "random", "unit")
    records.features[1] = 0
    mixed = clipped_sum(model, root, records, given, 0.1)
    others = clipped_sum(model, root, records.select([0, 2, 3]), given, 0.1)
    assert not torch.isfinite(mixed.norms[1])
    assert float((mixed.total - others.total).norm()) <= 0.3e-5


def test_a_loss_that_is_broken_for_one_record(built, records_of, reference_of, standardisation_of, cross_entropy):
    def loss(outputs, labels):
        return cross_entropy(outputs, labels) * torch.where(labels == 2, math.nan, 1.0)

    model, records = built(lambda: nn.Linear(4, 3)), records_of((4,), 4)
    records.labels[:] = torch.tensor([0, 2, 1, 2])
    given = standardisation_of(reference_of(model, records), "full", "random", "unit")
    mixed = clipped_sum(model, loss, records, given, 0.1)
    others = clipped_sum(model, loss, records.select([0, 2]), given, 0.1)
    assert float((mixed.total - others.total).norm()) <= 0.2e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_broken_weights_gives_zero(case, cross_entropy, name):
    model, records, given, _ = case(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    assert not clipped_sum(model, cross_entropy, records, given, 1.0).total.any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("mean", "scale"), [(math.nan, 1.0), (math.inf, 1.0), (0.0, 0.0), (1e38, 1e-38), (0.0, 1e-45)])
def test_statistics_that_are_broken_cannot_break_the_bound(case, exact_norm, cross_entropy, name, mean, scale):
    model, records, given, _ = case(name)
    """They may be refused, as no honest server sends them."""
    given.mean[::3], given.scale[::2] = mean, scale
    for number in range(2):
        try:
            total = clipped_sum(model, cross_entropy, records.select([number]), given, 1.0).total
        except MessageError as error:
            text = str(error)
        else:
            text = "mean scale"
            assert exact_norm(total) <= 1.0  # which nan would fail
        assert "mean" in text or "scale" in text
