"""Models that mix records in large batches only, behind several gates, or by very little, and what else is refused."""

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import check_model, clipped_sum, cross_entropy
from adadpigu_core.parameters import ParameterLayout

CLASSES = 3


class Mixing(nn.Module):
    """Two layers, between which something is done to a batch."""

    def __init__(self, mix, *, training_only=False):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, CLASSES)
        self.mix, self.training_only = mix, training_only

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden if self.training_only and not self.training else self.mix(hidden))


def normalised_from(count):
    return lambda hidden: hidden - hidden.mean(0) if len(hidden) >= count else hidden


def carried_over(hidden):
    """By chunks of eight, each of which sees the last one's mean."""
    chunks = hidden.split(8)
    before = [torch.zeros_like(hidden[:1]), *[chunk.mean(0, keepdim=True) for chunk in chunks[:-1]]]
    return torch.cat([chunk + shift for chunk, shift in zip(chunks, before, strict=True)])


@pytest.mark.parametrize("training_only", [False, True])
@pytest.mark.parametrize("mix", [normalised_from(8), normalised_from(100), carried_over])
def test_mixing_that_begins_in_larger_batches(built, mix, training_only):
    with pytest.raises(ModelError, match="it mixes records"):
        check_model(built(lambda: Mixing(mix, training_only=training_only)), cross_entropy, (6,), CLASSES)


def test_larger_batches_of_honest_models_are_taken(built):
    check_model(built(lambda: Mixing(lambda hidden: hidden)), cross_entropy, (6,), CLASSES)
    check_model(built(lambda: Mixing(nn.Dropout())), cross_entropy, (6,), CLASSES)


def test_mixing_far_below_what_batches_of_other_sizes_differ_by(built):
    """A hundred thousandth of the mean, which is a lot if one record is a million times as large."""
    with pytest.raises(ModelError, match="it mixes records"):
        check_model(built(lambda: Mixing(lambda hidden: hidden + 1e-5 * hidden.mean(0))), cross_entropy, (6,), CLASSES)


class Gated(nn.Module):
    """Shows what it mixes where two numbers have the same sign, both positive or both negative."""

    def __init__(self, sign):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.sign = sign

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        whole = torch.ones_like(hidden)
        gate = torch.relu(self.sign * self.one * whole) * torch.relu(self.sign * self.other * whole)
        return self.last(x + gate * (hidden - hidden.detach().mean(0)))


@pytest.mark.parametrize("sign", [1, -1])
def test_two_gates_at_once(built, sign):
    with pytest.raises(ModelError):
        check_model(built(lambda: Gated(sign)), cross_entropy, (6,), CLASSES)


class SetByTheFirstBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.last, self.is_set = nn.Parameter(torch.zeros(6)), nn.Linear(6, CLASSES), False

    def forward(self, x):
        if not self.is_set:
            self.is_set = True
            with torch.no_grad():
                self.shift.copy_(x.mean(0))
        return self.last(x + self.shift)


def test_models_that_write_into_their_parameters_are_refused(built):
    with pytest.raises(ModelError, match="SetByTheFirstBatch writes into its parameters"):
        check_model(built(SetByTheFirstBatch), cross_entropy, (6,), CLASSES)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_the_gradients_of_parameters_are_refused(built, register):
    model = built(lambda: nn.Linear(6, CLASSES))
    getattr(model.weight, register)(lambda gradient: None)
    with pytest.raises(ModelError, match="parameter weight has hooks on its gradient"):
        check_model(model, cross_entropy, (6,), CLASSES)
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    with pytest.raises(ModelError, match="parameter weight has hooks on its gradient"):
        clipped_sum(model, cross_entropy, Records(torch.rand(2, 6), torch.zeros(2).long()), given, 1.0)
