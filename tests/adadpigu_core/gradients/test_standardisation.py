"""Every kind of layer under every mask, mean, scale, clipping norm and batch size."""

import itertools
import math

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.gradients import clipped_sum


class Mean(nn.Module):
    def forward(self, x):
        return torch.tanh(x).flatten(1, -2).mean(1)


class Tokens(nn.Module):
    def forward(self, x):
        return x.long()


class Several(nn.Module):
    """A layer that is called twice, a parameter of its own, a normalisation, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.token, self.spare = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(3, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.layer(x)], 1)
        return self.head(torch.tanh(self.layer(self.norm(x))).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x + self.body(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x)[0].mean(1))


MODELS = {
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3), Mean()), (5, 4)),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Tanh(), nn.Linear(48, 3)),
        (2, 6, 5),
    ),
    "words": (lambda: nn.Sequential(Tokens(), nn.Embedding(9, 4), Mean(), nn.Linear(4, 3)), (5,)),
    "attention": (Attention, (5, 4)),
    "recurrent": (Recurrent, (5, 4)),
    "several": (Several, (5, 4)),
}


def records_for(name, records_of, count):
    return records_of(MODELS[name][1], count, tokens=9 if name == "words" else None)


@pytest.mark.parametrize("name", MODELS)
def test_every_mean_and_scale(agree, built, records_of, all_settings, name, every_mask):
    settings = tuple(chosen for chosen in all_settings if chosen[0] == every_mask)
    assert len(settings) == 20
    agree(built(MODELS[name][0]), records_for(name, records_of, 3), settings=settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_batch_size(agree, built, records_of, name, count):
    agree(built(MODELS[name][0]), records_for(name, records_of, count), seed=count)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
def test_no_records_give_zero(built, records_of, reference_of, standardisation_of, cross_entropy, name, clipping_norm):
    """Nothing else either: the mean belongs to a record."""
    model, records = built(MODELS[name][0]), records_for(name, records_of, 0)
    given = standardisation_of(reference_of(model, records), "full", "far", "unit")
    result = clipped_sum(model, cross_entropy, records, given, clipping_norm)
    assert torch.equal(result.total, torch.zeros(len(given.mask)))
    assert result.norms.shape == (0,)
    assert result.norms.dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_mask_gives_zero(built, records_of, reference_of, standardisation_of, cross_entropy, name):
    model, records = built(MODELS[name][0]), records_for(name, records_of, 3)
    given = standardisation_of(reference_of(model, records), "empty", "far", "tiny")
    result = clipped_sum(model, cross_entropy, records, given, 1.0)
    assert not result.total.any()
    assert result.norms.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_is_never_looked_at(built, records_of, reference_of, standardisation_of, cross_entropy, name):
    """A mean or a scale that is not finite, or zero, on coordinates that are not retained."""
    model, records = built(MODELS[name][0]), records_for(name, records_of, 3)
    given = standardisation_of(reference_of(model, records), "most", "random", "unit")
    expected = clipped_sum(model, cross_entropy, records, given, 0.1)
    for mean, scale in ((math.nan, 1.0), (math.inf, 1.0), (1e38, 1e-38), (0.0, 0.0), (0.0, math.nan)):
        other = Standardisation(  # a new one: what is prepared for one is kept
            given.mask, given.mean.masked_fill(~given.mask, mean), given.scale.masked_fill(~given.mask, scale)
        )
        result = clipped_sum(model, cross_entropy, records, other, 0.1)
        assert torch.equal(result.total, expected.total), (mean, scale)
        assert torch.equal(result.norms, expected.norms), (mean, scale)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
def test_losses_of_other_sizes(agree, built, records_of, cross_entropy, name, size):
    def loss(outputs, labels):
        return size * cross_entropy(outputs, labels)

    settings = (("full", "zero", "unit", "typical"), ("most", "zero", "unit", "small"))
    agree(built(MODELS[name][0]), records_for(name, records_of, 3), loss, settings=settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("mean", "sizes"), [("zero", (1e-36, 1e-22, 1e-18, 1e18, 1e30)), ("near", (1e-36, 1e-26, 1e-18))]
)
def test_gradients_whose_squares_leave_the_range_of_float32_stay_within_the_bound(
    built, records_of, reference_of, standardisation_of, exact_norm, cross_entropy, name, mean, sizes
):
    """A record that is classified well has a tiny gradient, and a server may choose a tiny scale and clipping norm.

    A norm that vanishes because squares do must not let a record pass unclipped; one that overflows may clip it to
    nothing.
    """
    model, records = built(MODELS[name][0]), records_for(name, records_of, 1)
    for size, scale in itertools.product(sizes, (1e-12, 1.0, 1e12)):

        def loss(outputs, labels, size=size):
            return size * cross_entropy(outputs, labels)

        reference = reference_of(model, records, loss)
        given = standardisation_of(reference, "full", mean, "unit")
        given.scale[:] = scale
        clipping_norm = 1e-3 * float(reference.gradients[0].norm()) / scale
        total = clipped_sum(model, loss, records, given, clipping_norm).total
        assert exact_norm(total) <= clipping_norm, (size, scale)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clipping_norm", [1e-12, 1e-6, 1e6, 1e30])
def test_extreme_clipping_norms(
    built, records_of, reference_of, standardisation_of, expected_of, compare, cross_entropy, name, clipping_norm
):
    model, records = built(MODELS[name][0]), records_for(name, records_of, 3)
    reference = reference_of(model, records)
    given = standardisation_of(reference, "full", "zero", "layer")
    result = clipped_sum(model, cross_entropy, records, given, clipping_norm)
    compare(result, expected_of(reference, given, clipping_norm), given)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clipping_norm", [1e-45, 1e-38, 1e-30])
def test_beside_tiny_clipping_norms_a_record_contributes_nothing(
    built, records_of, reference_of, standardisation_of, cross_entropy, name, clipping_norm
):
    model, records = built(MODELS[name][0]), records_for(name, records_of, 3)
    given = standardisation_of(reference_of(model, records), "full", "zero", "tiny")
    result = clipped_sum(model, cross_entropy, records, given, clipping_norm)
    assert bool((result.norms > 1e19 * clipping_norm).all())
    assert not result.total.any(), "factors among the denormal numbers are not exact, and may be too large"
