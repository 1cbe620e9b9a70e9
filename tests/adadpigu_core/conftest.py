"""Small models, random records, a slow oracle, private steps and ledgers for the tests of the core."""

import copy
import math
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import Tensor, nn

from adadpigu_core import local_training
from adadpigu_core.accounting import TRAINING, Event
from adadpigu_core.adaptive_clipping import FixedStatistics, Standardisation, Statistics
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import cross_entropy
from adadpigu_core.ledger import Ledger, Round, Target
from adadpigu_core.local_training import LocalUpdate
from adadpigu_core.parameters import ParameterLayout
from adadpigu_core.private_step import Charge, Mechanism, Release, private_step
from adadpigu_core.sampling import Randomness, SeededRandomness

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


def _mechanism(count: int, **changes: Any) -> Mechanism:
    numbers = {
        "phase": "training",
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "sampling_probability": 0.5,
        "num_records": count,
    }
    return Mechanism(**{**numbers, **changes})


def _plain(count: int, **changes: Any) -> Mechanism:
    """Without noise and without clipping."""
    return _mechanism(count, noise_multiplier=0.0, clipping_norm=math.inf, **changes)


def _accept(event: Event) -> None:
    pass


def _step(
    model: nn.Module,
    records: Records,
    chosen: Mechanism,
    randomness: Randomness,
    *,
    mask: Tensor | None = None,
    statistics: Statistics | None = None,
    charge: Charge = _accept,
) -> tuple[Release, Statistics, Event]:
    d = ParameterLayout.of(model).num_parameters
    mask = torch.ones(d, dtype=torch.bool) if mask is None else mask
    statistics = statistics or FixedStatistics.neutral(d)
    return private_step(model, cross_entropy, records, chosen, mask, statistics, randomness, charge)


def _train(
    model: nn.Module,
    records: Records,
    *,
    mask: Tensor | None = None,
    statistics: Statistics | None = None,
    mechanism: Mechanism | None = None,
    charge: Charge = _accept,
    **options: Any,
) -> LocalUpdate:
    """A round of one step with learning rate 1, unless told otherwise, by whatever train_round is at the moment."""
    d = ParameterLayout.of(model).num_parameters
    mask = torch.ones(d, dtype=torch.bool) if mask is None else mask
    statistics = statistics or FixedStatistics.neutral(d)
    mechanism = mechanism or _mechanism(len(records))
    options = {"steps": 1, "learning_rate": 1.0, **options}
    return local_training.train_round(
        model, cross_entropy, records, mechanism, mask, statistics, SeededRandomness(3), charge, **options
    )


def _counts(ledger: Ledger) -> int:
    return sum(event.count for event in ledger.events())


def _release(ledger: Ledger, number: int, payload: bytes | None = None, run: str = "run") -> bytes:
    """A whole round, as a client does it."""
    charge = ledger.charge(Round(run, number), Event(TRAINING, 10.0, 1.0, 5), Target(4.0, 1e-5))
    return ledger.store_release(charge, payload or f"release {number}".encode(), f"memory {number}".encode())


# What processes that use a ledger start with.
LEDGER_PRELUDE = """
import json, os, signal, time
from adadpigu_core.accounting import Event, TRAINING
from adadpigu_core.exceptions import BudgetError, MessageError
from adadpigu_core.ledger import Ledger, Round, Target
EVENT, TARGET = Event(TRAINING, 10.0, 1.0, 5), Target(4.0, 1e-5)
"""


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


@pytest.fixture(scope="session")
def mechanism() -> Callable[..., Mechanism]:
    return _mechanism


@pytest.fixture(scope="session")
def plain() -> Callable[..., Mechanism]:
    return _plain


@pytest.fixture(scope="session")
def step() -> Callable[..., tuple[Release, Statistics, Event]]:
    return _step


@pytest.fixture(scope="session")
def train() -> Callable[..., LocalUpdate]:
    return _train


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a ledger may be made."""
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, "site", "content") as opened:
        yield opened


@pytest.fixture
def used(path: Path) -> Path:
    """The path of a ledger that knows a release."""
    with Ledger(path, "site", "content") as ledger:
        _release(ledger, 1)
    return path


@pytest.fixture(scope="session")
def counts() -> Callable[[Ledger], int]:
    return _counts


@pytest.fixture(scope="session")
def release() -> Callable[..., bytes]:
    return _release


@pytest.fixture(scope="module")
def spawn() -> Callable[..., BaseProcess]:
    """Start processes that share nothing with this one; the fork server imports only once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adadpigu_core.ledger"])

    def start(code: str, **arguments: Any) -> BaseProcess:
        process = context.Process(target=exec, args=(LEDGER_PRELUDE + code, arguments))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def gaussian_epsilon() -> Callable[[float, float], float]:
    """An oracle of epsilon without sampling that uses no accounting library."""

    def gaussian_epsilon(noise_multiplier, delta):
        """Analytic Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
        mu = 1 / noise_multiplier

        def excess(value):
            return stats.norm.cdf(mu / 2 - value / mu) - np.exp(value + stats.norm.logcdf(-mu / 2 - value / mu)) - delta

        return optimize.brentq(excess, 0, mu**2 + 20 * mu + 1, xtol=1e-13) if excess(0) > 0 else 0.0

    return gaussian_epsilon
