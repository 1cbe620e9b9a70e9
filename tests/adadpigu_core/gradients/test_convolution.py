import pytest
import torch
from torch import nn

IMAGES = {1: (4, 9), 2: (4, 7, 6), 3: (4, 5, 4, 5)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Pooled(nn.Module):
    """Average over all positions: [n, C, ...] to [n, C], with a bent so that positions count differently."""

    def forward(self, x):
        return torch.tanh(x).flatten(2).mean(2)


class Switched(nn.Module):
    """Hand an image on in another layout of memory."""

    def forward(self, x):
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class Contiguous(nn.Module):
    def forward(self, x):
        return x.contiguous()


def network(layer, out=6):
    return nn.Sequential(layer, Pooled(), nn.Linear(out, 3))


OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "padding and stride": {"padding": 2, "stride": 3},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "same and dilation": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "pointwise with stride": {"kernel_size": 1, "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect", "stride": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch copies the input, no more
@pytest.mark.parametrize("dimensions", CONVOLUTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(agree, built, records_of, dimensions, name):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **OPTIONS[name]}

    def make():
        return network(CONVOLUTIONS[dimensions](**options), options["out_channels"])

    agree(built(make), records_of(IMAGES[dimensions]))


UNEVEN = {
    "kernel": {"kernel_size": (3, 2)},
    "stride": {"kernel_size": 3, "stride": (1, 2), "padding": (2, 0)},
    "dilation": {"kernel_size": 2, "dilation": (3, 1)},
    "same": {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)},
    "circular": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "circular"},
    "whole image": {"kernel_size": (7, 6)},
    "left over": {"kernel_size": 2, "stride": 4},
}


@pytest.mark.parametrize("name", UNEVEN)
def test_what_differs_between_the_dimensions(agree, built, records_of, name):
    agree(built(lambda: network(nn.Conv2d(4, 6, **UNEVEN[name]))), records_of(IMAGES[2]))


TRANSPOSED_OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "stride": {"stride": 2},
    "output padding": {"stride": 2, "output_padding": 1, "padding": 1},
    "groups": {"groups": 2, "stride": 2},
    "dilation": {"dilation": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8},
}


@pytest.mark.parametrize("dimensions", TRANSPOSED)
@pytest.mark.parametrize("name", TRANSPOSED_OPTIONS)
def test_transposed(agree, built, records_of, dimensions, name):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **TRANSPOSED_OPTIONS[name]}

    def make():
        return network(TRANSPOSED[dimensions](**options), options["out_channels"])

    agree(built(make), records_of(IMAGES[dimensions], 2))


class GrownTo(nn.Module):
    """Says how large the image is to be, so that the padding of the output is worked out in every call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ConvTranspose2d(4, 6, 3, stride=2)

    def forward(self, x):
        return self.layer(x, output_size=(16, 14))


def test_transposed_with_an_output_size(agree, built, records_of):
    agree(built(lambda: network(GrownTo())), records_of(IMAGES[2], 2))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_last_in_the_input(agree, built, records_of, dimensions, groups):
    def make():
        return nn.Sequential(
            Switched(),
            CONVOLUTIONS[dimensions](4, 6, 3, padding=1, groups=groups),
            nn.GroupNorm(2, 6),
            nn.Tanh(),
            CONVOLUTIONS[dimensions](6, 6, 2),
            Pooled(),
            nn.Linear(6, 3),
        )

    agree(built(make), records_of(IMAGES[dimensions]))


def test_channels_last_in_the_weights(agree, built, records_of):
    def make():
        return network(nn.Conv2d(4, 6, 3, padding=1)).to(memory_format=torch.channels_last)

    agree(built(make), records_of(IMAGES[2]))


def test_a_change_of_layout_between_two_layers(agree, built, records_of):
    def make():
        first, second = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        return nn.Sequential(first, Switched(), nn.Tanh(), second, Contiguous(), Pooled(), nn.Linear(6, 3))

    agree(built(make), records_of(IMAGES[2]))


SIZES = {
    "few channels, large image": (1, 4, 5, (28, 28)),
    "first layer": (3, 8, 3, (16, 16)),
    "many channels, small image": (40, 48, 3, (4, 4)),
    "one position": (6, 8, 3, (3, 3)),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("count", [1, 5])
def test_sizes_for_which_other_ways_of_computing_are_cheaper(agree, built, records_of, name, count):
    inputs, outputs, kernel, image = SIZES[name]

    def make():
        return network(nn.Conv2d(inputs, outputs, kernel), outputs)

    agree(built(make), records_of((inputs, *image), count))


def test_a_network(agree, built, records_of):
    def make():
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, stride=2, padding=2),
            nn.GroupNorm(3, 6),
            nn.SiLU(),
            nn.AvgPool2d(2, 1),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, 10),
            nn.Tanh(),
            nn.Linear(10, 3),
        )

    agree(built(make), records_of((1, 13, 13), 5))


def test_one_dimensional_with_a_loss_of_every_position(agree, built, records_of, per_token):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 5, 1))

        def forward(self, x):
            return self.layers(x.transpose(1, 2)).transpose(1, 2)

    agree(built(Tokens), records_of((9, 4)), per_token)
