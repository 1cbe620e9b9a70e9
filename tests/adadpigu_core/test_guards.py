from functools import partial

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import FixedStatistics, Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError, MessageError
from adadpigu_core.gradients import (
    GradientOptions,
    check_model,
    check_precision,
    check_rounding,
    clipped_sum,
    cross_entropy,
    engine,
)
from adadpigu_core.local_training import train_round
from adadpigu_core.parameters import ParameterLayout, flatten
from adadpigu_core.private_step import Mechanism
from adadpigu_core.sampling import SeededRandomness

KINDS = ("linear", "mlp", "cnn")


def _chaotic(size: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for _ in range(30) for layer in (nn.Linear(32, 32), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(32, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    return model


def test_rounding_in_a_chaotic_model_breaks_the_bound_and_is_refused(monkeypatch):
    """A server that sends huge weights can make other records move when one is added.

    Matrix products round differently for one and for two rows, and a deep network with huge weights amplifies the last
    bit of a record's gradient to quite another direction: every contribution is clipped, but that of the *other* record
    is no longer the same. The sum has been seen to move by 2.3 C; that is why ``check_rounding`` is there, and why
    small batches are filled up.
    """
    model = _chaotic(20.0)
    standardisation = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 2, 32, generator=generator)
    labels = torch.randint(0, 5, (20, 2), generator=generator)

    def largest_move():
        moves = []
        for x, y in zip(features, labels, strict=True):
            one, two = (
                clipped_sum(model, cross_entropy, Records(x[:n], y[:n]), standardisation, 1.0).total for n in (1, 2)
            )
            moves.append(float((two - one).norm()))
        return max(moves)

    assert largest_move() <= 1.0001
    monkeypatch.setattr(engine, "_FEWEST", 1)
    assert largest_move() > 1.1  # without this the guard would have nothing to guard against
    with pytest.raises(MessageError, match="rounding"):
        check_rounding(model, cross_entropy, (32,), 5, 1.0, 100, standardisation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_ordinary_models_pass_the_check_of_rounding(make_model, make_records, kind, size):
    model = make_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    d = ParameterLayout.of(model).num_parameters
    half = Standardisation(torch.arange(d) % 2 == 0, torch.zeros(d), torch.ones(d))
    shape = tuple(make_records(kind, 1).features.shape[1:])
    for standardisation in (Standardisation.identity(d), half):
        check_rounding(model, cross_entropy, shape, 3, 1.0, 100, standardisation)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_a_mean_far_longer_than_the_clipping_norm_is_refused(scale):
    """Records that are all but the mean are not clipped, and each is rounded by a share of it, alike records alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.uniform_(0.5, 1.5)  # the label alone decides on a gradient
    layout = ParameterLayout.of(model)
    last = torch.arange(layout.num_parameters) >= 64 * 32 + 32
    count = 300
    records = Records(torch.rand(count + 1, 64), torch.full((count + 1,), 3))
    gradient = clipped_sum(model, cross_entropy, records.select([0]), _given(last, scale), float("inf")).total * scale

    def moved(length):
        given = Standardisation(last, gradient, torch.full_like(gradient, float(gradient.norm()) / (length * scale)))
        some = records.select(list(range(count)))
        many, fewer = (clipped_sum(model, cross_entropy, part, given, scale).total for part in (records, some))
        return float((many - fewer).norm()) / scale, given

    far, too_long = moved(1e5)
    assert far > 0.5  # without this there would be nothing to refuse
    with pytest.raises(MessageError, match=r"gradient-mean: .* 1e\+05 times as long .* 300 records 333 is the most"):
        check_rounding(model, cross_entropy, (64,), 10, scale, count, too_long)
    near, allowed = moved(300.0)
    assert near < 0.01
    check_rounding(model, cross_entropy, (64,), 10, scale, count, allowed)
    check_rounding(model, cross_entropy, (64,), 10, 1000 * scale, count, too_long)


def _given(mask, scale):
    return Standardisation(mask, torch.zeros(len(mask)), torch.full((len(mask),), scale))


def test_the_check_of_rounding_changes_neither_the_model_nor_the_generator(make_model, make_records):
    model = make_model("mlp")
    before, state = flatten(model), torch.random.get_rng_state()
    shape = tuple(make_records("mlp", 1).features.shape[1:])
    check_rounding(model, cross_entropy, shape, 3, 1.0, 100, Standardisation.identity(len(before)))
    assert torch.equal(flatten(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)


class _Crowded(nn.Module):
    """Depends on the size of the batch in half precision alone, as the kernels of a device might."""

    def __init__(self, size):
        super().__init__()
        self.layer, self.size = nn.Linear(6, 3), size

    def forward(self, x):
        return self.layer(x) * (1 + self.size * (len(x) % 3) * torch.is_autocast_enabled("cpu"))


HALF = GradientOptions(precision="bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_the_records_of_ordinary_models_apart(make_model, make_records, kind):
    check_precision(make_model(kind), cross_entropy, tuple(make_records(kind, 1).features.shape[1:]), 3, HALF)


def test_half_precision_that_mixes_records_by_a_bit_is_refused():
    """One bit of bfloat16 in what all others contribute: 1e-3 of C for each of them, which adds up."""
    check_precision(_Crowded(0.0), cross_entropy, (6,), 3, HALF)
    check_model(_Crowded(2**-8), cross_entropy, (6,), 3)  # in float32 there is nothing to refuse
    check_precision(_Crowded(2**-8), cross_entropy, (6,), 3, GradientOptions())
    with pytest.raises(ConfigurationError, match="use float32") as refused:
        check_precision(_Crowded(2**-8), cross_entropy, (6,), 3, HALF)
    assert "use float32" in refused.value.public_message


def test_a_step_into_chaos_is_the_last():
    """A huge learning rate leads from ordinary weights to chaotic ones; the next step must not be taken there."""
    model, charged = _chaotic(1.0), []
    generator = torch.Generator().manual_seed(0)
    records = Records(torch.randn(8, 32, generator=generator), torch.randint(0, 5, (8,), generator=generator))
    d = ParameterLayout.of(model).num_parameters

    def train(learning_rate):
        return train_round(
            model,
            cross_entropy,
            records,
            Mechanism("training", 1.0, 1.0, 1.0, len(records)),
            torch.ones(d, dtype=torch.bool),
            FixedStatistics.neutral(d),
            SeededRandomness(1),
            charged.append,
            steps=2,
            learning_rate=learning_rate,
            guard=partial(check_rounding, model, cross_entropy, (32,), 5, 1.0, 100),
        )

    train(1e-3)
    assert len(charged) == 2
    with pytest.raises(MessageError, match="rounding"):
        train(20.0)
    assert len(charged) == 3
