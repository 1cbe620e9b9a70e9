"""A limit for a physical batch holds for all that a model makes, and not only for its layers with parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.gradients import GradientOptions, clipped_sum, cross_entropy
from adadpigu_core.parameters import ParameterLayout
from simulations.benchmarks.memory import peak_of

RECORDS = 24


class Attention(nn.Module):
    """Weights of attention are [heads, T, T], and no layer has them for input or output."""

    def __init__(self, **options):
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(32, 8, batch_first=True, **options), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.body(x, x, x)[0].mean(1))


class Activations(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters, self.head = nn.Conv2d(1, 32, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x):
        x = self.filters(x)
        for _ in range(8):
            x = F.silu(x)
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """A table that is looked up and multiplied by, so that its gradients are made as a whole."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3000, 32)

    def forward(self, x):
        return F.linear(torch.tanh(self.words(x.abs().long()).mean(1)), self.words.weight)[:, :3]


MODELS = {
    "attention": (Attention, (128, 32)),
    "tied": (Tied, (4,)),
    "without a rule": (lambda: Attention(add_bias_kv=True), (96, 32)),
    "activations": (Activations, (1, 40, 40)),
}


# without the limit they take 20 to 80 MB
@pytest.mark.parametrize("name", MODELS)
def test_no_more_is_in_use_at_any_time(built, records_of, name):
    make, shape = MODELS[name]
    model, records = built(make), records_of(shape, RECORDS)
    identity = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    options = GradientOptions(memory_limit=8 * 2**20)
    clipped_sum(model, cross_entropy, records.select([0]), identity, 1.0, options=options)  # looks at the model
    _, peak_mb = peak_of(lambda: clipped_sum(model, cross_entropy, records, identity, 1.0, options=options), "cpu")
    assert peak_mb * 1e6 <= options.memory_limit


def test_a_limit_changes_nothing_but_rounding(built, records_of):
    make, shape = MODELS["attention"]
    model, records = built(make), records_of(shape, 6)
    identity = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    wide, tight = (
        clipped_sum(model, cross_entropy, records, identity, 1.0, options=GradientOptions(memory_limit=limit * 2**20))
        for limit in (512, 1)
    )
    torch.testing.assert_close(tight.norms, wide.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(tight.total, wide.total, rtol=1e-4, atol=1e-6)
