"""Small models, random records and a slow oracle for the tests of the core."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.parameters import ParameterLayout
from adadpigu_core.sampling import SeededRandomness

CLASSES = 3
SHAPES = {"linear": (6,), "mlp": (6,), "cnn": (1, 4, 4)}


def _model(kind: str, seed: int = 0) -> nn.Module:
    """A model without kinks, so that float32 and float64 cannot disagree about the side of one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(6, CLASSES)
        if kind == "mlp":
            mlp = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, CLASSES))
            return mlp.eval()
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)
        )


def _records(kind: str, count: int, seed: int = 0, size: float = 1.0) -> Records:
    generator = torch.Generator().manual_seed(seed)
    features = size * torch.randn(count, *SHAPES[kind], generator=generator)
    return Records(features, torch.randint(0, CLASSES, (count,), generator=generator))


def _standardisation(model: nn.Module, seed: int, *, retained: float = 1.0, spread: float = 0.0) -> Standardisation:
    """A random mask with at least one coordinate, a random mean, and scales from 10^-spread to 10^spread."""
    d = ParameterLayout.of(model).num_parameters
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(d, dtype=torch.bool)
    mask[torch.randperm(d, generator=generator)[: max(1, round(retained * d))]] = True
    mean = torch.randn(d, generator=generator) if spread else torch.zeros(d)
    scale = 10 ** (spread * (2 * torch.rand(d, generator=generator) - 1))
    return Standardisation(mask, mean, scale)


def _record_gradients(model: nn.Module, records: Records) -> list[Tensor]:
    """Gradient of each record, float64 [d], by plain autograd."""
    double = copy.deepcopy(model).double()
    parameters = [p for p in double.parameters() if p.requires_grad]
    gradients = []
    for features, label in zip(records.features, records.labels, strict=True):
        loss = F.cross_entropy(double(features.double().unsqueeze(0)), label.unsqueeze(0))
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return gradients


def _contributions(model: nn.Module, records: Records, given: Standardisation, clipping_norm: float) -> list[Tensor]:
    """What every record adds to the clipped sum, in float64 and one record at a time."""
    contributions = []
    kept = given.mask
    for gradient in _record_gradients(model, records):
        u = torch.zeros_like(gradient)
        u[kept] = (gradient[kept] - given.mean.double()[kept]) / given.scale.double()[kept]
        norm = float(u.norm())
        contributions.append(u * (min(1.0, clipping_norm / norm) if norm > 0 else 1.0))
    return contributions


class RecordingRandomness:
    """Seeded randomness that writes down what was asked of it."""

    def __init__(self, *key: int) -> None:
        self._source = SeededRandomness(*key)
        self.calls: list[str] = []
        self.sizes: dict[str, list[int]] = {"uniform": [], "normal": []}

    def uniform(self, size: int) -> np.ndarray:
        self.calls.append("uniform")
        self.sizes["uniform"].append(size)
        return self._source.uniform(size)

    def normal(self, size: int) -> np.ndarray:
        self.calls.append("normal")
        self.sizes["normal"].append(size)
        return self._source.normal(size)

    def torch_seed(self) -> int:
        self.calls.append("torch_seed")
        return self._source.torch_seed()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only stand in each other's way in models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    return _model


@pytest.fixture(scope="session")
def make_records() -> Callable[..., Records]:
    return _records


@pytest.fixture(scope="session")
def make_standardisation() -> Callable[..., Standardisation]:
    return _standardisation


@pytest.fixture(scope="session")
def record_gradients() -> Callable[..., list[Tensor]]:
    return _record_gradients


@pytest.fixture(scope="session")
def contributions_of() -> Callable[..., list[Tensor]]:
    return _contributions


@pytest.fixture(scope="session")
def recording() -> type[RecordingRandomness]:
    return RecordingRandomness
