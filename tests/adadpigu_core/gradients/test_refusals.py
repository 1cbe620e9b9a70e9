"""What the engine cannot do it refuses, with the name of the module or parameter and what to do instead."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import clipped_sum
from adadpigu_core.parameters import ParameterLayout

REMEDY = re.compile(
    r"\b(replace|use|set|pass|give|return|call|write|make|move|wrap|rewrite|freeze|leave|must|without)\b", re.I
)


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


def refusal_of(run, *arguments):
    """The text of a refusal, or None."""
    try:
        run(*arguments)
    except ModelError as error:
        return str(error)
    return None


def says(error, *names):
    """Whether a message has one of the names, and says what to do."""
    text = str(error.value)
    assert any(name in text for name in names), text
    assert REMEDY.search(text), text


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
def test_layers_that_mix_or_remember_records(built, records_of, run, name, count):
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
def test_the_replacement_of_batch_norm_is_named(built, records_of, run, name):
    def make():
        model = ALWAYS[name]()
        model.eval()(torch.zeros(2, 5, 4))
        return model.train()

    with pytest.raises(ModelError, match="GroupNorm"):
        run(built(make), records_of((5, 4)))


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_embeddings(built, records_of, run, options):
    """The one changes weights in the forward pass, the other divides by how often the *batch* has a word."""
    model = built(lambda: ByWords(**options))
    before = model.culprit.weight.clone()
    with pytest.raises(ModelError, match=next(iter(options))) as error:
        run(model, records_of((5,), tokens=7))
    says(error, "culprit")
    assert torch.equal(model.culprit.weight, before)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_are_reduced(built, records_of, run, reduction, count):
    def reduced(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction=reduction)

    with pytest.raises(ModelError) as error:
        run(built(lambda: nn.Linear(4, 3)), records_of((4,), count), reduced)
    says(error, "loss")


def test_losses_of_every_token(built, records_of, run, per_token):
    def of_every_token(outputs, labels):
        return outputs.square().sum(2)

    with pytest.raises(ModelError) as error:
        run(built(lambda: nn.Linear(4, 3)), records_of((5, 4)), of_every_token)
    says(error, "loss")


# ---- refused, or as right as if every record were alone


class Mixing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.head, self.how = nn.Linear(4, 4), nn.Linear(4, 3), how

    def forward(self, x):
        return self.head(self.how(torch.tanh(self.first(x))))


MIXING = {
    "mean": lambda x: x - 0.5 * x.mean(0),
    "softmax": lambda x: x * torch.softmax(x, 0),
    "shift": lambda x: x + 0.5 * x.roll(1, 0),
    "attention": lambda x: torch.softmax(x @ x.transpose(-1, -2), -1) @ x,
    "first": lambda x: x + x[:1],
    "sum of all": lambda x: x * (1 + x.sum()),
    "order": lambda x: x.sort(0).values,
}


class TimeFirst(nn.Module):
    """Positions come first inside; nothing is mixed, but the first dimension is not the records."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.head = kind, nn.Linear(4, 4), nn.Linear(4, 3)
        self.body = {
            "linear": lambda: nn.Linear(4, 4),
            "attention": lambda: nn.MultiheadAttention(4, 2),
            "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu"),
            "lstm": lambda: nn.LSTM(4, 4),
            "norm": lambda: nn.LayerNorm(4),
            "flat": lambda: nn.Linear(4, 4),
            "scale": lambda: nn.ParameterList([torch.ones(4)]),
        }[kind]()

    def forward(self, x):
        shape = x.shape
        x = torch.tanh(self.first(x)).transpose(0, 1)
        if self.kind == "flat":
            x = self.body(x.reshape(-1, 4)).view(shape[1], shape[0], 4)
        elif self.kind == "attention":
            x = self.body(x, x, x, need_weights=False)[0]
        elif self.kind == "lstm":
            x = self.body(x)[0]
        elif self.kind == "scale":
            x = x * self.body[0]
        else:
            x = self.body(x)
        return self.head(torch.tanh(x).mean(0))


class ByFunction(nn.Module):
    """The weights of a layer are used where no call of the layer shows it."""

    def __init__(self, use):
        super().__init__()
        self.use, self.culprit, self.head = use, nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.scripted = torch.jit.trace(nn.Linear(4, 4), torch.zeros(2, 5, 4)) if use == "traced" else None

    def forward(self, x):
        weight = self.culprit.weight
        x = {
            "function": lambda: F.linear(x, weight),
            "product": lambda: x @ weight.t(),
            "call and function": lambda: self.culprit(x) + F.linear(x, weight),
            "penalty": lambda: self.culprit(x) + weight.square().mean(),
            "data": lambda: F.linear(x, weight.data),
            "call and data": lambda: self.culprit(x) + F.linear(x, weight.data),
            "detached": lambda: self.culprit(x) + F.linear(x, weight.detach()),
            "copy": lambda: F.linear(x, torch.cat([weight[:2], weight[2:]])),
            "checkpoint": lambda: checkpoint(self.culprit, x, use_reentrant=False),
            "traced": lambda: self.scripted(self.culprit(x)),
            "within no_grad": lambda: self.culprit(x) + without_gradient(self.culprit, x),
        }[self.use]()
        return self.head(torch.tanh(x).mean(1))


def without_gradient(layer, x):
    with torch.no_grad():
        return layer(x)


class Doubled(nn.Linear):
    """A layer that is not what its class says."""

    def forward(self, x):
        return 2 * super().forward(x) + x


class Replaced(nn.Linear):
    def forward(self, x):
        return torch.tanh(x @ self.weight.square().t())


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first.register_forward_hook(_double)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)).mean(1))


def _double(module, arguments, output):
    return output * 2


UNUSUAL = {
    **{f"mixing: {name}": (lambda how=how: Mixing(how), (4,)) for name, how in MIXING.items()},
    **{
        f"time first: {kind}": (lambda kind=kind: TimeFirst(kind), (5, 4))
        for kind in ("linear", "attention", "encoder", "lstm", "norm", "flat", "scale")
    },
    **{
        f"use: {use}": (lambda use=use: ByFunction(use), (5, 4))
        for use in (
            *("function", "product", "call and function", "penalty", "data", "call and data", "detached", "copy"),
            *("checkpoint", "traced", "within no_grad"),
        )
    },
    "subclass: doubled": (lambda: nn.Sequential(Doubled(4, 4), nn.Tanh(), nn.Linear(4, 3)), (4,)),
    "subclass: replaced": (lambda: nn.Sequential(Replaced(4, 4), nn.Tanh(), nn.Linear(4, 3)), (4,)),
    "hook": (Hooked, (5, 4)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch copies a trace so
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_refused_or_right(agree, built, records_of, run, name, count):
    """Never silently wrong. Five records of five positions are where one is easily taken for the other."""
    make, shape = UNUSUAL[name]
    model, records = built(make), records_of(shape, count)
    refusal = refusal_of(run, model, records)
    if refusal is None:
        agree(model, records)
    else:
        assert REMEDY.search(refusal), refusal
        assert re.search(r"first|head|body|culprit|scripted|\b0\b|Mixing|ByFunction|output", refusal), refusal


@pytest.mark.parametrize("count", [2, 5])
def test_losses_that_mix_records(agree, built, records_of, run, cross_entropy, count):
    def centred(outputs, labels):
        losses = cross_entropy(outputs, labels)
        return losses - 0.5 * losses.mean()

    model, records = built(lambda: nn.Linear(4, 3)), records_of((4,), count)
    refusal = refusal_of(run, model, records, centred)
    if refusal is None:
        agree(model, records, centred)
    else:
        assert "loss" in refusal
        assert REMEDY.search(refusal), refusal
