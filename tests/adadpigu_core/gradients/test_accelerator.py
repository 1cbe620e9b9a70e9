"""The way of a step on an accelerator, without one: tensors that have a device and a shape, and no values.

Whatever asks for a value stops with an error there, and on a device would make the host wait for it; whatever mixes
devices stops, too. What kernels compute is not tested here.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import clipped_sum, cross_entropy, engine
from adadpigu_core.gradients.clipping import DEFAULTS, Augmentation, Loss
from adadpigu_core.gradients.survey import survey
from adadpigu_core.gradients.transform import Block, Part, Transform
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import ParameterLayout

_MEMORY = 2**27  # said, since there is no device to be asked for what it has
_DEVICE = "meta"


class Sequences(nn.Module):
    """Tokens that are looked up, normalised, run through a recurrent network and attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 8), nn.LayerNorm(8)
        self.recurrent, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.recurrent(self.norm(self.words(tokens.long())))
        x, _ = self.attention(x, x, x)
        return self.last(x.mean(1))  # type: ignore[no-any-return]  # modules are not typed


class WithoutRule(nn.Module):
    """What is differentiated by copies of parameters, and a matrix that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.twice = nn.Bilinear(4, 4, 6), nn.Linear(6, 6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.pairs(x[:, :4], x[:, 4:])))
        return self.last(self.drop(x))  # type: ignore[no-any-return]  # modules are not typed


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (images, (3, 8, 8)),
    "sequences": (Sequences, (5,)),
    "without rule": (WithoutRule, (8,)),
    "small network": (lambda: build(ModelSpec("mnist-cnn", "relu", "group", (1, 28, 28), 10), seed=0), (1, 28, 28)),
    "standardised filters": (
        lambda: build(ModelSpec("digits-cnn", "relu", "group-and-weights", (1, 8, 8), 10), seed=0),
        (1, 8, 8),
    ),
}


def made_up(shape: tuple[int, ...]) -> Records:
    return Records(torch.ones(24, *shape), torch.zeros(24, dtype=torch.int64))


def on_device(known: Transform) -> Transform:
    """The same preparation for tensors without values; masks stay where they are, on the host."""
    moved = Transform(
        torch.empty(known.inverse_scale.shape, device=_DEVICE),
        None if known.mean is None else torch.empty(known.mean.shape, device=_DEVICE),
        known.mask,
    )
    for (start, shape), block in known._blocks.items():
        stop = start + block.inverse_scale.numel()
        mean = None if moved.mean is None else moved.mean[start:stop].view(shape)
        part = block.part and Part(
            *(
                None if indices is None else torch.empty(indices.shape, dtype=torch.int64, device=_DEVICE)
                for indices in (block.part.rows, block.part.columns)
            )
        )
        moved._blocks[start, shape] = Block(moved.inverse_scale[start:stop].view(shape), mean, part)
    moved._retains.update(known._retains)
    return moved


def run(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    *,
    retained: str = "all",
    mean: bool = False,
    loss: Loss = cross_entropy,
    augmentation: Augmentation | None = None,
) -> None:
    """Look at a model and a mask on the host, as always, and sum 24 records in two physical batches elsewhere."""
    make, shape = MODELS[name]
    records, model = made_up(shape), make()
    layout = ParameterLayout.of(model)
    mask = torch.ones(layout.num_parameters, dtype=torch.bool)
    if retained == "rows":
        mask[: layout.sizes[0] // 2] = False
    if retained == "some":
        mask = torch.rand(len(mask), generator=torch.Generator().manual_seed(1)) < 0.5
    standardisation = Standardisation(mask, torch.full(mask.shape, 0.1 * mean), torch.full(mask.shape, 2.0))
    found = replace(survey(model, records, augmentation), bytes_per_record=_MEMORY // 24)
    known = Transform.of(standardisation, torch.device("cpu"))
    start = 0
    for parameter, size in zip(model.parameters(), layout.sizes, strict=True):
        if known.retains(start, size):
            known.block(start, tuple(parameter.shape))
        start += size
    with FakeTensorMode():
        moved = on_device(known)
        monkeypatch.setattr(engine, "survey", lambda *_: found)
        monkeypatch.setattr(engine.Transform, "of", lambda *_: moved)
        with torch.device(_DEVICE):
            model = make()
        result = clipped_sum(
            model,
            loss,
            made_up(shape),
            standardisation,
            1.0,
            options=replace(DEFAULTS, memory_limit=_MEMORY),
            augmentation=augmentation,
        )
    assert result.total.shape == mask.shape
    assert result.norms.shape == (24,)
    assert result.total.device.type == result.norms.device.type == "cpu"


@pytest.mark.parametrize("mean", [False, True], ids=["no mean", "mean"])
@pytest.mark.parametrize("retained", ["all", "rows", "some"])
@pytest.mark.parametrize("name", MODELS)
def test_host_never_waits_inside_a_step(monkeypatch: pytest.MonkeyPatch, name: str, retained: str, mean: bool) -> None:
    run(monkeypatch, name, retained=retained, mean=mean)


def test_host_never_waits_for_views(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "images", augmentation=lambda x: torch.stack([x, x.flip(-1)], dim=1))


def test_waiting_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(outputs: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy(outputs, labels)
        return losses / float(losses.detach().amax())

    with pytest.raises(DataDependentOutputException):
        run(monkeypatch, "images", loss=waiting)


def test_mixed_devices_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="device"):
        run(monkeypatch, "images", loss=lambda outputs, labels: cross_entropy(outputs, labels) * torch.ones(12))
