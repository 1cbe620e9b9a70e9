"""Random sequences of compatible layers, under random standardisations."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Repeated(nn.Module):
    """Another call of the same layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


class Scaled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * self.scale + self.shift


class SelfAttention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layer = nn.MultiheadAttention(size, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[0]


class Sequence(nn.Module):
    """[n, C, ...] to [n, positions, C]."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return torch.tanh(x).mean(1)


class Tokens(nn.Module):
    def forward(self, x):
        return x.long()


# by the number of features, which they keep
OF_SEQUENCES = {
    "norm": nn.LayerNorm,
    "attention": SelfAttention,
    "scaled": Scaled,
    "again": lambda size: Repeated(nn.Linear(size, size)),
    "residual": lambda size: Residual(nn.RMSNorm(size), nn.Linear(size, size), nn.SiLU()),
    "encoder": lambda size: nn.TransformerEncoderLayer(size, 2, 6, dropout=0.0, activation="gelu", batch_first=True),
}
OF_VECTORS = {
    "norm": lambda size: nn.LayerNorm(size, eps=0.1),
    "scaled": Scaled,
    "again": lambda size: Repeated(nn.Linear(size, size)),
    "slopes": lambda size: nn.PReLU(),
}


@st.composite
def image_layers(draw, channels):
    """Some layers over images of ``channels``, and how many channels there are then."""
    layers = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(("convolution", "transposed", "norm", "pool", "slopes", "again")))
        if kind == "convolution":
            groups = draw(st.sampled_from((1, 2)))
            options = {
                "kernel_size": draw(st.sampled_from((1, 3, (3, 1)))),
                "padding": draw(st.sampled_from(("same", "same", "valid"))),
                "groups": groups,
                "bias": draw(st.booleans()),
                "padding_mode": draw(st.sampled_from(("zeros", "circular"))),
            }
            out = draw(st.sampled_from((2, 4, 6)))
            layers += [nn.Conv2d(channels, out, **options), nn.Tanh()]
            channels = out
        elif kind == "transposed":
            out = draw(st.sampled_from((2, 4)))
            stride = draw(st.sampled_from((1, 2)))
            layers += [nn.ConvTranspose2d(channels, out, 2, stride=stride, bias=draw(st.booleans())), nn.SiLU()]
            channels = out
        elif kind == "norm":
            affine = draw(st.booleans())
            choice = st.sampled_from((nn.GroupNorm(2, channels, affine=affine), nn.GroupNorm(1, channels)))
            layers.append(draw(choice))
        elif kind == "pool":
            layers.append(nn.AvgPool2d(2, 1, padding=1))
        elif kind == "slopes":
            layers.append(nn.PReLU(channels))
        else:
            layers.append(Repeated(nn.Conv2d(channels, channels, 3, padding=1)))
    return layers, channels


@st.composite
def sequence_layers(draw, size):
    layers = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(("linear", "gru", *OF_SEQUENCES)))
        if kind == "linear":
            out = draw(st.sampled_from((2, 4, 8)))
            layers += [nn.Linear(size, out, bias=draw(st.booleans())), nn.Tanh()]
            size = out
        elif kind == "gru":
            out = draw(st.sampled_from((2, 4)))
            layers.append(Network(nn.GRU(size, out, batch_first=True)))
            size = out
        else:
            layers.append(OF_SEQUENCES[kind](size))
    return layers, size


@st.composite
def vector_layers(draw, size):
    layers = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(("linear", "linear", *OF_VECTORS)))
        if kind == "linear":
            out = draw(st.sampled_from((1, 3, 9)))
            layers += [nn.Linear(size, out, bias=draw(st.booleans())), nn.Tanh()]
            size = out
        else:
            layers.append(OF_VECTORS[kind](size))
    return layers, size


@st.composite
def models(draw):
    """A model with random layers frozen, the shape of its records, and the number of words if they are words."""
    seed = draw(st.integers(0, 10**6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = draw(st.sampled_from(("images", "sequences", "words", "vectors")))
        shape, words, layers = {
            "images": ((2, 4, 5), None, []),
            "sequences": ((3, 4), None, []),
            "words": ((4,), 6, [Tokens(), nn.Embedding(6, 4)]),
            "vectors": ((5,), None, []),
        }[kind]
        size = 5
        if kind == "images":
            more, size = draw(image_layers(2))
            layers = [*more, Sequence()]
        if kind != "vectors":
            more, size = draw(sequence_layers(size if kind == "images" else 4))
            layers += [*more, Mean()]
        more, size = draw(vector_layers(size))
        model = nn.Sequential(*layers, *more, nn.Linear(size, 3))
        parameters = list(model.parameters())
        for parameter in parameters[:-1]:
            parameter.requires_grad_(draw(st.integers(0, 6)) > 0)
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, shape, words


@settings(deadline=None, max_examples=70)
@given(
    models(),
    st.sampled_from([1, 2, 3]),
    st.data(),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_random_models(agree, records_of, setting_names, model, count, data, seed, twice):
    """With one view of a record, or two."""
    model, shape, words = model
    views = {"augmentation": lambda x: torch.stack([x, x.flip(1)], 1)} if twice else {}
    records = records_of(shape, count, seed=seed, tokens=words)
    setting = st.tuples(*map(st.sampled_from, setting_names))
    agree(model, records, settings=(data.draw(setting), data.draw(setting)), seed=seed, **views)
