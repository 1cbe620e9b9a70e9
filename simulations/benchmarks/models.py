"""The networks that benchmarks run on, and made-up records for them.

Three come from the library. A larger perceptron, a small transformer encoder and a wide residual network are here only
to be measured: they stand for networks whose cost lies in dense layers, in sequences and in convolutions. Every layer
is one that Opacus knows too, so that all methods train the same network.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadpigu_core.datasets import Records
from adadpigu_core.models import ModelSpec, StandardisedConv2d, build

_SHAPES = {
    "mnist-cnn": (1, 28, 28),
    "cifar-cnn": (3, 32, 32),
    "mlp": (784,),
    "transformer": (64,),
    "wrn-16-4": (3, 32, 32),
}
_CLASSES = 10
_VOCABULARY = 1000


def make_model(name: str, seed: int = 0) -> nn.Module:
    """Build a network of ``plan.MODELS``: features [n, *shape] to logits [n, 10]."""
    if name in {"mnist-cnn", "cifar-cnn"}:
        return build(ModelSpec(name, "relu", "group", _SHAPES[name], _CLASSES), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == "mlp":
            return wide_mlp((784,), _CLASSES)
        return Transformer() if name == "transformer" else WideResNet()


def wide_mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two hidden layers of 1,024: also a factory, ``task.model = "simulations.benchmarks.models:wide_mlp"``."""
    first = nn.Linear(math.prod(input_shape), 1024)
    layers = (first, nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, num_classes))
    return nn.Sequential(*layers) if len(input_shape) == 1 else nn.Sequential(nn.Flatten(), *layers)


def wide_resnet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Wide residual network with standardised filters: a factory, as ``wide_mlp`` is one."""
    return WideResNet(StandardisedConv2d, input_shape[0], num_classes)


def slim_resnet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Residual network of 15 narrow convolutions for small images: a factory, as ``wide_mlp`` is one."""
    return WideResNet(nn.Conv2d, input_shape[0], num_classes, stages=((16, 2), (32, 2), (32, 1)), groups=4)


def make_records(name: str, count: int, seed: int = 0) -> Records:
    """Draw records with random features and labels; a transformer's features are token numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *_SHAPES[name])
    if name == "transformer":
        features = torch.randint(_VOCABULARY, shape, generator=generator).float()
    else:
        features = torch.rand(shape, generator=generator)
    return Records(features, torch.randint(_CLASSES, (count,), generator=generator))


class Transformer(nn.Module):
    """Pre-norm encoder: tokens and learned positions, mean pooling, one linear head.

    Args:
        width: Of the residual stream.
        length: Tokens a record.
        depth: Number of encoder layers.
        heads: Attention heads a layer.
    """

    def __init__(self, width: int = 128, length: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(_EncoderLayer(width, heads) for _ in range(depth)))
        self.normalisation = nn.LayerNorm(width)
        self.output = nn.Linear(width, _CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """Map token numbers, float32 [n, length], to logits [n, 10]."""
        tokens = features.long()
        # a position index for every record: per-record gradients need the batch in every layer's input
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        hidden = self.layers(self.tokens(tokens) + self.positions(positions))
        logits: Tensor = self.output(self.normalisation(hidden).mean(1))
        return logits


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_normalisation = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mixed(self._attention(self.projections(self.attention_normalisation(hidden))))
        changed: Tensor = self.feed_forward(hidden)
        return hidden + changed

    def _attention(self, projected: Tensor) -> Tensor:
        """Attend: [n, T, 3 width] to [n, T, width]; written out because torch.func cannot vectorise the fused one."""
        n, length, _ = projected.shape
        query, key, value = projected.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
        mixed: Tensor = weights @ value
        return mixed.transpose(1, 2).reshape(n, length, -1)


class WideResNet(nn.Module):
    """Wide residual network, by default 16-4: pre-activation, with group instead of batch normalisation.

    Args:
        convolution: Class of the convolutions.
        channels: Of the images.
        num_classes: Number of outputs.
        stages: Width and first stride of each stage of two blocks.
        groups: Of each normalisation.
    """

    def __init__(
        self,
        convolution: type[nn.Conv2d] = nn.Conv2d,
        channels: int = 3,
        num_classes: int = _CLASSES,
        *,
        stages: tuple[tuple[int, int], ...] = ((64, 1), (128, 2), (256, 2)),
        groups: int = 16,
    ) -> None:
        super().__init__()
        self.convolution = convolution(channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for width, stride in stages:
            blocks.append(_ResidualBlock(convolution, channels, width, stride, groups))
            blocks.append(_ResidualBlock(convolution, width, width, 1, groups))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.normalisation = nn.GroupNorm(groups, channels)
        self.output = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, height, width] to logits [n, num_classes]."""
        hidden = F.silu(self.normalisation(self.blocks(self.convolution(images))))
        logits: Tensor = self.output(hidden.mean((2, 3)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, convolution: type[nn.Conv2d], channels: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.normalisation1 = nn.GroupNorm(groups, channels)
        self.convolution1 = convolution(channels, width, 3, stride, 1, bias=False)
        self.normalisation2 = nn.GroupNorm(groups, width)
        self.convolution2 = convolution(width, width, 3, 1, 1, bias=False)
        unchanged = (channels, stride) == (width, 1)
        self.shortcut = None if unchanged else convolution(channels, width, 1, stride, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        active = F.silu(self.normalisation1(hidden))
        kept = hidden if self.shortcut is None else self.shortcut(active)
        changed: Tensor = self.convolution2(F.silu(self.normalisation2(self.convolution1(active))))
        return kept + changed
