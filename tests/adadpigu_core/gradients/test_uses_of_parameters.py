"""Parameters outside of layers, in several layers, in layers that are called again, and in none."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from adadpigu_core.gradients import clipped_sum


class Own(nn.Module):
    """Parameters of a module that is not a layer, over [n, 5, 4]."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        shape = {"token": (1, 1, 4), "temperature": (), "matrix": (4, 4), "positions": (5, 4)}.get(use, (4,))
        self.own = nn.Parameter(torch.ones(shape))
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = {
            "scale": lambda: x * self.own,
            "shift": lambda: x + self.own,
            "positions": lambda: x + self.own,
            "temperature": lambda: x * self.own.exp(),
            "matrix": lambda: x @ self.own,
            "token": lambda: torch.cat([self.own.expand(len(x), -1, -1), x], 1),
            "both": lambda: self.own * x + self.own.square(),
            "branch": lambda: x + self.own * torch.tanh(x),
            "named": lambda: torch.add(input=torch.mul(input=x, other=self.own), other=self.own, alpha=-1),
            "share": lambda: torch.sub(x, self.own, alpha=0.5) + torch.sub(self.own, x, alpha=1) * x,
            "twice as much": lambda: torch.add(x, self.own, alpha=2),
        }[self.use]()
        return self.head(torch.tanh(x).mean(1))


USES = ["scale", "shift", "positions", "temperature", "matrix", "token", "both", "branch"]
CALLS = ["named", "share", "twice as much"]


@pytest.mark.parametrize("use", [*USES, *CALLS])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_parameters_of_their_own(agree, built, records_of, use, count):
    """Five records of five positions: nothing may take one for the other."""
    agree(built(lambda: Own(use)), records_of((5, 4), count))


class Halves(nn.Module):
    """Two models of as many coordinates, of which a mask leaves other parameters out."""

    def __init__(self, sizes):
        super().__init__()
        self.parts = nn.ParameterList([torch.ones(size) for size in sizes])

    def forward(self, x):
        return torch.cat([x[:, :1] * part for part in self.parts], 1)[:, :3]


def test_one_standardisation_for_two_models(
    built, records_of, reference_of, standardisation_of, expected_of, compare, cross_entropy
):
    """What is known of one is not taken for the other's."""
    records, given = records_of((4,)), None
    for sizes in ((1, 5), (4, 2)):
        model = built(lambda sizes=sizes: Halves(sizes))
        reference = reference_of(model, records)
        if given is None:
            given = standardisation_of(reference, "full", "zero", "unit")
            given.mask[0] = False
        result = clipped_sum(model, cross_entropy, records, given, 1.0)
        compare(result, expected_of(reference, given, 1.0), given)


class Deep(nn.Module):
    """A module with parameters of its own, and layers and such modules inside."""

    def __init__(self):
        super().__init__()
        self.gain, self.inner, self.list = nn.Parameter(torch.ones(4)), Own("scale"), nn.ParameterList()
        self.list.extend([torch.zeros(3), torch.ones(1)])

    def forward(self, x):
        return self.inner(x * self.gain) * self.list[1] + self.list[0]


def test_modules_inside_of_modules(agree, built, records_of):
    agree(built(Deep), records_of((5, 4)))


def test_only_a_parameter(agree, built, records_of):
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.offset

    agree(built(Offset), records_of((3,)))


PARAMETRISED = {
    "weight norm": lambda: weight_norm(nn.Linear(4, 5)),
    "weight norm of a convolution": lambda: nn.Sequential(weight_norm(nn.Conv1d(5, 6, 2)), nn.Linear(3, 5)),
    "orthogonal": lambda: orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_weights(agree, built, records_of, name):
    def make():
        first = PARAMETRISED[name]()
        size = 4 if name == "orthogonal" else 5
        return nn.Sequential(first, nn.Tanh(), nn.Linear(size, 3), nn.Flatten(), nn.LazyLinear(3))

    def materialised():
        model = make()
        model(torch.zeros(1, 5, 4))
        return model

    agree(built(materialised), records_of((5, 4)))


def layers():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "3", "3.weight", "5.bias", "0", "5"])
def test_frozen(agree, built, records_of, frozen):
    def make():
        model = layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        return model

    agree(built(make), records_of((4,)))


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "5.bias"])
def test_everything_is_frozen_but_one(agree, built, records_of, name):
    def make():
        model = layers()
        for other, parameter in model.named_parameters():
            parameter.requires_grad_(other == name)
        return model

    agree(built(make), records_of((4,)))


class Skipping(nn.Module):
    """A layer that is not called, one whose output is thrown away, one behind a detach, and a parameter for nothing."""

    def __init__(self):
        super().__init__()
        self.unused, self.thrown, self.behind = nn.Linear(4, 5), nn.Linear(4, 4), nn.Linear(4, 4)
        self.nothing, self.used = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)

    def forward(self, x):
        self.thrown(x)
        return self.used(torch.tanh(x + self.behind(x).detach()))


def test_unused(agree, built, records_of):
    """Their gradient is zero, and their u is -m a / b."""
    settings = tuple(
        ("full", mean, scale, norm)
        for mean, scale, norm in (
            ("random", "layer", "typical"),
            ("far", "unit", "small"),
            ("random", "coordinate", "infinite"),
        )
    )
    agree(built(Skipping), records_of((4,)), settings=settings)
    agree(built(Skipping), records_of((4,)))


class Again(nn.Module):
    """One layer, called three times at different depths."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.head = layer, nn.LazyLinear(3)
        self.size = size

    def forward(self, x):
        for factor in (1.0, 0.5, -2.0):
            x = torch.tanh(self.layer(x * factor))
        return self.head(x.flatten(1))


AGAIN = {
    "linear": (lambda: nn.Linear(4, 4), (4,)),
    "linear, positions": (lambda: nn.Linear(4, 4), (5, 4)),
    "linear, without bias": (lambda: nn.Linear(4, 4, bias=False), (5, 4)),
    "convolution": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 5, 4)),
    "shrinking convolution": (lambda: nn.Conv1d(2, 2, 2), (2, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 2, 2), (2, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "slopes": (lambda: nn.PReLU(4), (4, 5)),
}


@pytest.mark.parametrize("name", AGAIN)
def test_called_again(agree, built, records_of, name):
    layer, shape = AGAIN[name]

    def make():
        model = Again(layer(), shape)
        model(torch.zeros(1, *shape))
        return model

    agree(built(make), records_of(shape))


class WordsAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.words(x[:, :2].long()), self.words(x[:, 2:].long())
        return self.head(torch.tanh(left.sum(1) * right.sum(1)))


def test_words_read_twice(agree, built, records_of):
    agree(built(WordsAgain), records_of((6,), tokens=7))


class Tied(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "words":
            self.first, self.second = nn.Embedding(5, 4), nn.Linear(4, 5)
        elif kind == "transposed":
            self.first, self.second = nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1)
        else:
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=kind == "both")
        if kind == "transposed":
            self.second.weight = nn.Parameter(self.second.weight.detach())
            self.first.bias = self.second.bias
        else:
            self.second.weight = self.first.weight
        if kind == "both":
            self.second.bias = self.first.bias
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        y = torch.tanh(self.first(x.long() if self.kind == "words" else x))
        y = self.second(y.transpose(1, 2)).transpose(1, 2) if self.kind == "transposed" else self.second(y)
        return self.head(torch.tanh(y).mean(1))


@pytest.mark.parametrize("kind", ["words", "weights", "both", "transposed"])
def test_tied(agree, built, records_of, kind):
    records = records_of((6,), tokens=5) if kind == "words" else records_of((6, 4))

    def make():
        model = Tied(kind)
        model(records.features)
        return model

    agree(built(make), records)


class Residual(nn.Module):
    """Two branches and the input itself share one gradient."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.left(x) + self.right(x)
        x = x + torch.tanh(self.left(self.norm(x)))
        return self.head(x).mean(1)


def test_residual_branches(agree, built, records_of):
    agree(built(Residual), records_of((5, 4)))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.ELU])
def test_activations_that_overwrite(agree, built, records_of, activation):
    """With a gap around the kink: the largest feature decides the sign of what the first layer gives."""

    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Linear(4, 6), nn.Linear(6, 3), activation(inplace=True)
            self.convolution = nn.Conv1d(3, 3, 1)

        def forward(self, x):
            y = self.second(self.act(self.first(x)))
            y += 1
            y = self.act(self.convolution(y.unsqueeze(2)))
            return y.squeeze(2)

    agree(built(Overwriting), records_of((4,)))
