"""Modules without a rule that are called with constants, whatever the number of records happens to be."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import clipped_sum, cross_entropy
from adadpigu_core.parameters import ParameterLayout


class Shifted(nn.Module):
    """No rule knows this use of a matrix."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, positions, factor=None):
        return torch.tanh((x + positions) @ self.matrix.exp().cos()) * (1.0 if factor is None else factor.mean())


class WithTable(nn.Module):
    """Calls it with data, a table of T rows, and a keyword of T numbers."""

    def __init__(self, length):
        super().__init__()
        self.inner, self.head = Shifted(), nn.Linear(4, 3)
        self.register_buffer("positions", torch.randn(length, 4))
        self.register_buffer("factor", torch.rand(length))

    def forward(self, x):
        return self.head(self.inner(x, self.positions, factor=self.factor).mean(1))


# two and three records are what the engine looks at beforehand
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_a_constant_as_long_as_the_batch_is_not_dealt_out(agree, built, records_of, length, count):
    agree(built(lambda: WithTable(length)), records_of((length, 4), count))


@pytest.mark.parametrize("length", [2, 4, 6])
def test_with_as_many_views_and_records_as_positions(agree, built, records_of, length):
    def two(features):
        return torch.stack([features, features.flip(1)], 1)

    for count in (1, 2, 3):
        agree(built(lambda: WithTable(length)), records_of((length, 4), count), augmentation=two)


class Causal(nn.Module):
    """Attention that no rule knows, with a mask [T, T]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), nn.Linear(8, 3)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.body(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_attention_with_as_many_records_as_positions(agree, built, records_of, length, count):
    agree(built(Causal), records_of((length, 8), count))


def test_adding_a_record_moves_the_sum_by_the_clipping_norm_at_most(built, records_of):
    model, clipping_norm, length = built(lambda: WithTable(32)), 0.1, 32
    records = records_of((length, 4), length + 1)
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    sums = [
        clipped_sum(model, cross_entropy, records.select(range(count)), given, clipping_norm).total.double()
        for count in (length - 1, length, length + 1)
    ]
    for before, after in pairwise(sums):
        assert float((after - before).norm()) <= clipping_norm * (1 + 1e-4)


class Growing(nn.Module):
    """Calls a module once for every record."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Shifted(), nn.Linear(4, 3)

    def forward(self, x):
        for _ in x:
            x = self.inner(x, torch.zeros(4))
        return self.head(x.mean(1))


def test_a_module_that_is_called_as_often_as_there_are_records_is_refused(built, records_of):
    model = built(Growing)
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    with pytest.raises(ModelError, match="inner is called in another way for another batch"):
        clipped_sum(model, cross_entropy, records_of((5, 4), 3), given, 1.0)


class Shared(nn.Module):
    """Calls one module several times, with data in another place each time."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Shifted(), nn.Linear(4, 3)
        self.register_buffer("table", torch.randn(5, 4))

    def forward(self, x):
        once = self.inner(x, self.table)
        return self.head(self.inner(self.table, once).mean(1))


@pytest.mark.parametrize("count", [4, 5])
def test_each_call_is_looked_at_by_itself(agree, built, records_of, count):
    agree(built(Shared), records_of((5, 4), count))


def test_what_was_found_serves_every_number_of_records(built):
    model = built(lambda: WithTable(5))
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    features = torch.randn(7, 5, 4)
    together = Records(features, torch.arange(7) % 3)
    whole = clipped_sum(model, cross_entropy, together, given, math.inf)
    for number in range(7):
        alone = clipped_sum(model, cross_entropy, together.select([number]), given, math.inf)
        torch.testing.assert_close(alone.norms[0], whole.norms[number], rtol=1e-5, atol=1e-7)


class Positions(nn.Module):
    """Looks up embeddings of positions, which are no data of records."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.tokens(x.long()) + self.positions(torch.arange(x.shape[1]))
        return self.head(torch.tanh(self.inner(hidden)).mean(1))


class Flattened(nn.Module):
    """Puts records and positions into one dimension for a part, whose first dimension is longer than the batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x.flatten(0, 1)))
        return self.head(hidden.view(*x.shape[:2], -1).mean(1))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_where_a_part_cannot_be_copied_by_record_a_larger_one_is(agree, built, records_of, count):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (count, 5), generator=generator).float()
    agree(built(Positions), Records(tokens, torch.arange(count) % 3))
    agree(built(Flattened), records_of((5, 4), count))
