"""What the engine cannot do it refuses, with the name of the module or parameter and what to do instead."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import clipped_sum
from adadpigu_core.parameters import ParameterLayout


class Named(nn.Module):
    """A model whose interesting part has a name of its own that messages can be searched for."""

    def __init__(self, culprit, head=None):
        super().__init__()
        self.body, self.culprit, self.head = nn.Linear(4, 4), culprit, head or nn.LazyLinear(3)

    def forward(self, x):
        return self.head(torch.tanh(self.culprit(self.body(x))).flatten(1))


class ByWords(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.culprit, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.culprit(x.long())).flatten(1, -2).mean(1))


class Images(nn.Module):
    def __init__(self, culprit, shape):
        super().__init__()
        self.body, self.culprit, self.head = nn.Linear(4, 24), culprit, nn.Linear(24, 3)
        self.shape = shape

    def forward(self, x):
        x = self.body(x.flatten(1)[:, :4]).view(-1, *self.shape)
        return self.head(torch.tanh(self.culprit(x)).flatten(1))


@pytest.fixture
def run(cross_entropy):
    def call(model, records, loss=None):
        given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
        return clipped_sum(model, loss or cross_entropy, records, given, 1.0)

    return call


@pytest.fixture(scope="module")
def says(remedy):
    """Check that a message has one of the names, and says what to do."""

    def check(error, *names):
        text = str(error.value)
        assert any(name in text for name in names), text
        assert remedy.search(text), text

    return check


ALWAYS = {
    "batch norm 1d": lambda: Named(nn.BatchNorm1d(5)),
    "batch norm 2d": lambda: Images(nn.BatchNorm2d(4), (4, 3, 2)),
    "batch norm 3d": lambda: Images(nn.BatchNorm3d(4), (4, 3, 2, 1)),
    "batch norm without weights": lambda: Named(nn.BatchNorm1d(5, affine=False)),
    "batch norm without statistics": lambda: Named(nn.BatchNorm1d(5, track_running_stats=False)),
    "synchronised batch norm": lambda: Named(nn.SyncBatchNorm(5)),
    "running statistics": lambda: Named(nn.InstanceNorm1d(5, track_running_stats=True)),
    "running statistics and weights": lambda: Images(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 2)
    ),
}


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_layers_that_mix_or_remember_records(built, records_of, run, says, name, count):
    """Before anything is computed: whether it is refused must not depend on how many records there are."""

    def make():
        model = ALWAYS[name]()
        model.eval()(torch.zeros(2, 5, 4))
        return model.train()

    model, records = built(make), records_of((5, 4), count)
    buffers = [b.clone() for b in model.buffers()]
    with pytest.raises(ModelError) as error:
        run(model, records)
    says(error, "culprit")
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


@pytest.mark.parametrize("name", ["batch norm 1d", "batch norm 2d"])
def test_the_replacement_of_batch_norm_is_named(built, records_of, run, says, name):
    def make():
        model = ALWAYS[name]()
        model.eval()(torch.zeros(2, 5, 4))
        return model.train()

    with pytest.raises(ModelError, match="GroupNorm"):
        run(built(make), records_of((5, 4)))


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_embeddings(built, records_of, run, says, options):
    """The one changes weights in the forward pass, the other divides by how often the *batch* has a word."""
    model = built(lambda: ByWords(**options))
    before = model.culprit.weight.clone()
    with pytest.raises(ModelError, match=next(iter(options))) as error:
        run(model, records_of((5,), tokens=7))
    says(error, "culprit")
    assert torch.equal(model.culprit.weight, before)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_are_reduced(built, records_of, run, says, reduction, count):
    def reduced(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction=reduction)

    with pytest.raises(ModelError) as error:
        run(built(lambda: nn.Linear(4, 3)), records_of((4,), count), reduced)
    says(error, "loss")


def test_losses_of_every_token(built, records_of, run, says, per_token):
    def of_every_token(outputs, labels):
        return outputs.square().sum(2)

    with pytest.raises(ModelError) as error:
        run(built(lambda: nn.Linear(4, 3)), records_of((5, 4)), of_every_token)
    says(error, "loss")
