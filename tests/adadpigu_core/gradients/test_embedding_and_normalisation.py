import pytest
import torch
from torch import nn

from adadpigu_core.models import StandardisedConv2d


class Tokens(nn.Module):
    """Records hold whole numbers as floats."""

    def forward(self, x):
        return x.long()


class Mean(nn.Module):
    def forward(self, x):
        return torch.tanh(x).flatten(1, -2).mean(1)


def reader(size=7, **options):
    return nn.Sequential(Tokens(), nn.Embedding(size, 4, **options), Mean(), nn.Linear(4, 3))


EMBEDDINGS = {"plain": {}, "padding": {"padding_idx": 2}, "padding from the end": {"padding_idx": -1}}


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("shape", [(1,), (9,), (3, 4)], ids=str)
def test_embedding(agree, built, records_of, name, shape):
    """Nine of seven words: some must be there twice, others not at all."""
    agree(built(lambda: reader(**EMBEDDINGS[name])), records_of(shape, 4, tokens=7))


def test_embedding_of_a_large_vocabulary(agree, built, records_of):
    agree(built(lambda: reader(500)), records_of((6,), 4, tokens=500))


def test_embedding_of_one_word(agree, built, records_of):
    records = records_of((5,), 3, tokens=7)
    records.features[0] = 3
    agree(built(reader), records)


def test_embedding_of_padding_alone(agree, built, records_of):
    records = records_of((5,), 3, tokens=7)
    records.features[1] = 2
    agree(built(lambda: reader(padding_idx=2)), records)


def test_embedding_with_a_loss_of_every_token(agree, built, records_of, per_token):
    def make():
        return nn.Sequential(Tokens(), nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 5))

    agree(built(make), records_of((6,), tokens=7), per_token)


def test_frozen_embedding(agree, built, records_of):
    def make():
        model = reader()
        model[1].weight.requires_grad_(False)
        return model

    agree(built(make), records_of((6,), tokens=7))


class Positions(nn.Module):
    """Words and positions, the same positions for all records: their embedding never sees the batch."""

    def __init__(self, expanded):
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)
        self.expanded = expanded

    def forward(self, x):
        places = torch.arange(x.shape[1])
        if self.expanded:
            places = places.expand(len(x), -1)
        return self.head(torch.tanh(self.words(x.long()) + self.positions(places)).mean(1))


def test_positions_for_every_record(agree, built, records_of):
    agree(built(lambda: Positions(expanded=True)), records_of((6,), tokens=7))


NORMALISATIONS = {
    "layer": lambda: nn.LayerNorm(6),
    "layer, two dimensions": lambda: nn.LayerNorm((4, 6)),
    "layer, without bias": lambda: nn.LayerNorm(6, bias=False),
    "layer, without weights": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer, large epsilon": lambda: nn.LayerNorm(6, eps=0.1),
    "root mean square": lambda: nn.RMSNorm(6),
    "root mean square, two dimensions": lambda: nn.RMSNorm((4, 6)),
    "root mean square, without weights": lambda: nn.RMSNorm(6, elementwise_affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "group, one": lambda: nn.GroupNorm(1, 4),
    "group, without weights": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "instance, without weights": lambda: nn.InstanceNorm1d(4),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_normalisation_of_sequences(agree, built, records_of, name, frozen):
    """[n, 4, 6]: positions and features, or channels and positions."""

    def make():
        layer = NORMALISATIONS[name]()
        if frozen and getattr(layer, frozen, None) is not None:
            getattr(layer, frozen).requires_grad_(False)
        return nn.Sequential(nn.Linear(6, 6), layer, nn.Tanh(), nn.Linear(6, 3), Mean())

    agree(built(make), records_of((4, 6)))


IMAGE_NORMALISATIONS = {
    "layer": lambda: nn.LayerNorm((6, 5, 4)),
    "group": lambda: nn.GroupNorm(3, 6),
    "group of every channel": lambda: nn.GroupNorm(6, 6),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
}


class Switched(nn.Module):
    def forward(self, x):
        return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", IMAGE_NORMALISATIONS)
@pytest.mark.parametrize("layout", [nn.Identity, Switched])
def test_normalisation_of_images(agree, built, records_of, name, layout):
    def make():
        layers = (layout(), nn.Conv2d(2, 6, 2), IMAGE_NORMALISATIONS[name](), nn.Tanh(), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(120, 3))

    agree(built(make), records_of((2, 6, 5)))


def test_standardised_filters(agree, built, records_of):
    def make():
        layers = (StandardisedConv2d(2, 6, 2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(120, 3))

    agree(built(make), records_of((2, 6, 5)))


def test_normalisation_of_volumes(agree, built, records_of):
    def make():
        first, second = nn.InstanceNorm3d(2, affine=True), nn.GroupNorm(1, 2)
        return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(48, 3))

    agree(built(make), records_of((2, 2, 3, 4)))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(3, 6), lambda: nn.RMSNorm(6)])
def test_normalisation_of_vectors(agree, built, records_of, make):
    agree(built(lambda: nn.Sequential(nn.Linear(5, 6), make(), nn.Tanh(), nn.Linear(6, 3))), records_of((5,)))


GENERIC = {
    "one slope": nn.PReLU,
    "a slope for every channel": lambda: nn.PReLU(4),
}


@pytest.mark.parametrize("name", GENERIC)
def test_learnt_slopes(agree, built, records_of, name):
    agree(built(lambda: nn.Sequential(nn.Linear(5, 6), GENERIC[name](), nn.Linear(6, 3), Mean())), records_of((4, 5)))


class Pairs(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.layer = nn.Bilinear(4, 3, 5, bias=bias)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x[..., :4], x[..., 4:])).flatten(1, -2).mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func has no rule for it
@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(agree, built, records_of, bias):
    agree(built(lambda: Pairs(bias)), records_of((2, 7)))
