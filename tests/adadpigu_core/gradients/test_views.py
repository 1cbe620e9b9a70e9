"""A record's gradient is the mean over its augmented views, and is clipped once."""

import math

import pytest
import torch
from torch import nn

from adadpigu_core.gradients import clipped_sum


def three_views(features):
    """[n, *shape] to [n, 3, *shape], the same every time."""
    return torch.stack([features, features.flip(-1), 0.5 * features + 0.1], 1)


def one_view(features):
    return features.unsqueeze(1)


class Mean(nn.Module):
    def forward(self, x):
        return torch.tanh(x).flatten(2).mean(2)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x.long())).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0])[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.network(x)[0].mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head, self.spare = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)), (6, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), Mean(), nn.Linear(4, 3)), (2, 6, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3, stride=2), Mean(), nn.Linear(4, 3)), (2, 6)),
    "embedding": (Reader, (6,)),
    "attention": (Attention, (5, 4)),
    "recurrent": (Recurrent, (5, 4)),
    "slopes": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)), (4,)),
    "twice": (Twice, (4,)),
}


def records_for(name, records_of, count=3):
    return records_of(MODELS[name][1], count, tokens=7 if name == "embedding" else None)


def words_of(features):
    """Views of whole numbers are whole numbers."""
    return torch.stack([features, features.flip(-1), 6 - features], 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_over_views_is_clipped(agree, built, records_of, name):
    views = words_of if name == "embedding" else three_views
    agree(built(MODELS[name][0]), records_for(name, records_of), augmentation=views)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 4])
def test_one_view_that_is_the_record_changes_nothing(
    built, records_of, reference_of, standardisation_of, clipping_norm_of, cross_entropy, name, count
):
    model, records = built(MODELS[name][0]), records_for(name, records_of, count)
    reference = reference_of(model, records)
    given = standardisation_of(reference, "most", "random", "layer")
    norm = clipping_norm_of(reference, given, "typical")
    without = clipped_sum(model, cross_entropy, records, given, norm)
    with_one = clipped_sum(model, cross_entropy, records, given, norm, augmentation=one_view)
    size = float(without.norms.clamp(max=norm).sum())
    assert torch.allclose(with_one.norms, without.norms, rtol=1e-5)
    assert float((with_one.total - without.total).norm()) <= 1e-5 * size


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_records(agree, built, records_of, count):
    agree(built(MODELS["positions"][0]), records_of((6, 4), count), augmentation=three_views)


def test_as_many_views_as_records(agree, built, records_of):
    agree(built(MODELS["attention"][0]), records_of((3, 4), 3), augmentation=three_views)


def test_views_of_another_shape(agree, built, records_of):
    """Crops: the network takes smaller images than the records are."""

    def crops(features):
        return torch.stack([features[..., :5, :4], features[..., 1:, 1:], features[..., 1:, :4]], 1)

    agree(built(MODELS["convolution"][0]), records_of((2, 6, 5)), augmentation=crops)


def test_views_are_random_and_fresh(built, records_of, reference_of, standardisation_of, cross_entropy):
    """Equal records get different views, and one record all of its own."""
    model, records = built(MODELS["linear"][0]), records_of((4,), 8)
    records.features[:], records.labels[:] = records.features[0].clone(), 1
    given = standardisation_of(reference_of(model, records), "full", "zero", "unit")
    seen = []

    def noisy(features):
        views = features.unsqueeze(1) + torch.randn(len(features), 4, *features.shape[1:])
        seen.append(views)
        return views

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = clipped_sum(model, cross_entropy, records, given, math.inf, augmentation=noisy).norms
        assert len(set(norms.tolist())) == 8
        views = torch.cat(seen)
        assert len(views.flatten(0, 1).unique(dim=0)) >= 32
        torch.manual_seed(0)
        again = clipped_sum(model, cross_entropy, records, given, math.inf, augmentation=noisy).norms
    assert torch.equal(norms, again)


def test_a_record_is_clipped_as_a_whole(built, records_of, reference_of, standardisation_of, exact_norm, cross_entropy):
    """Its bound is C, not K C, and not C of every view: opposite views may cancel."""

    def opposite(outputs, labels):
        return outputs.sum(1)

    model, records = built(lambda: nn.Linear(4, 3, bias=False)), records_of((4,), 1)
    given = standardisation_of(reference_of(model, records), "full", "zero", "unit")
    cancelling = clipped_sum(model, opposite, records, given, 1e-3, augmentation=lambda x: torch.stack([x, -x], 1))
    assert float(cancelling.total.norm()) <= 1e-6
    repeated = clipped_sum(
        model, opposite, records, given, 1e-3, augmentation=lambda x: torch.stack([x, x, x], 1)
    ).total
    assert 0.999e-3 <= exact_norm(repeated) <= 1e-3


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_one_broken_view_breaks_its_record_alone(
    built, records_of, reference_of, standardisation_of, cross_entropy, broken
):
    model, records = built(MODELS["positions"][0]), records_of((6, 4), 4)
    given = standardisation_of(reference_of(model, records), "full", "random", "unit")

    def breaking(features):
        views = three_views(features)
        marked = (features == records.features[2]).flatten(1).all(1)
        views[marked, 1, 0, 0] = broken
        return views

    result = clipped_sum(model, cross_entropy, records, given, 0.1, augmentation=breaking)
    others = clipped_sum(model, cross_entropy, records.select([0, 1, 3]), given, 0.1, augmentation=three_views)
    assert float((result.total - others.total).norm()) <= 1e-5 * 0.3
    assert torch.allclose(result.norms[[0, 1, 3]], others.norms, rtol=1e-5)
    assert not torch.isfinite(result.norms[2])
