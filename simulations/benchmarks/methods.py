"""One training step by every method, ready to be called again and again.

All private methods clip to the same norm and add the same noise. ``adadpigu`` is what a client does with a batch. What
needs Opacus is in ``opacus_steps``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor, nn

from adadpigu_core.accounting import TRAINING
from adadpigu_core.adaptive_clipping import FixedStatistics, Standardisation, expand
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import GradientOptions, cross_entropy
from adadpigu_core.masking import mask_of
from adadpigu_core.parameters import ParameterLayout, descend
from adadpigu_core.private_step import Mechanism, private_step
from adadpigu_core.sampling import Randomness, SeededRandomness, SystemRandomness
from simulations.benchmarks.models import make_model, make_records
from simulations.benchmarks.plan import ADADPIGU, GHOST, HOOKS, NAIVE, OPACUS, PLAIN, STANDARDISED, Layout, Task

CLIPPING_NORM = 1.0
NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 0.01

# of every record's gradient at the same time
_COPIES = {HOOKS: 1, STANDARDISED: 2, NAIVE: 3}

Step = Callable[[], None]


@dataclass(frozen=True)
class Trained:
    """A network, its records and the standardisation of its gradients."""

    model: nn.Module
    records: Records
    standardisation: Standardisation
    views: int = 1
    precision: str = "float32"

    @classmethod
    def of(cls, task: Task, *, batch: int) -> "Trained":
        """Make what a task names, on its device; mask and scale stay in host memory, as on a client."""
        model, records = make_model(task.model), make_records(task.model, batch)
        layout = ParameterLayout.of(model)
        ranking = torch.randperm(layout.num_parameters, generator=torch.Generator().manual_seed(0))
        scale = expand(torch.linspace(0.5, 1.5, len(layout.names)), layout, "layer")
        standardisation = Standardisation(mask_of(ranking, task.retention), torch.zeros_like(scale), scale)
        moved = Records(records.features.to(task.device), records.labels.to(task.device))
        return cls(model.to(task.device), moved, standardisation, task.views, task.precision)


@dataclass(frozen=True)
class Repeated:
    """An augmentation that costs nothing itself: so many times the same view."""

    views: int

    def __call__(self, features: Tensor) -> Tensor:
        """Map features [n, ...] to [n, views, ...]."""
        return features.unsqueeze(1).expand(-1, self.views, *features.shape[1:])


def kept_gb(task: Task) -> float:
    """Estimate what the gradients of single records take that a method keeps, in GB."""
    num_parameters = ParameterLayout.of(make_model(task.model)).num_parameters
    return _COPIES.get(task.method, 0) * task.batch * num_parameters * 4 / 1e9


def load(task: Task) -> None:
    """Have libraries import what they import at their first use: tens of MB that are no method's memory."""
    if task.method in OPACUS:
        import_module("simulations.benchmarks.opacus_steps")
    model, records = nn.Linear(1, 2), Records(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    standardisation = Standardisation.identity(4)
    _plain(Trained(model, records, standardisation), Layout())()


def make_step(task: Task, trained: Trained) -> Step:
    """Prepare the step of a task."""
    if task.method in OPACUS:
        from simulations.benchmarks import opacus_steps  # noqa: PLC0415 - only here is Opacus needed

        makers = {
            HOOKS: opacus_steps.hooks,
            GHOST: opacus_steps.ghost,
            STANDARDISED: opacus_steps.hooks_standardised,
            NAIVE: opacus_steps.naive,
        }
        return makers[task.method](trained)
    if task.method == PLAIN:
        return _plain(trained, task.layout)
    return _private(trained, SeededRandomness(0) if task.method == ADADPIGU else SystemRandomness())


def _plain(trained: Trained, layout: Layout) -> Step:
    model, views = trained.model, trained.views
    records = Records(
        *(values.repeat_interleave(views, 0) for values in (trained.records.features, trained.records.labels))
    )
    if layout.channels_last:
        model.to(memory_format=torch.channels_last)
        records = replace(records, features=records.features.contiguous(memory_format=torch.channels_last))
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    size = layout.physical_batch or len(records)
    half = torch.autocast(records.labels.device.type, torch.bfloat16, enabled=trained.precision == "bfloat16")
    batches = list(zip(torch.split(records.features, size), torch.split(records.labels, size), strict=True))

    def step() -> None:
        optimiser.zero_grad()
        for features, labels in batches:
            with half:
                outputs = model(features)
            loss = cross_entropy(outputs.float(), labels).sum() / len(records)
            loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimiser.step()

    return step


def _private(trained: Trained, randomness: Randomness) -> Step:
    """Make the step of a client; what its ledger writes is not in it."""
    model, given = trained.model, trained.standardisation
    mechanism = Mechanism(TRAINING, CLIPPING_NORM, NOISE_MULTIPLIER, 1.0, len(trained.records))
    statistics = FixedStatistics(given.mean, given.scale)
    options = GradientOptions(precision=trained.precision)
    augmentation = Repeated(trained.views) if trained.views > 1 else None

    def step() -> None:
        release, _, _ = private_step(
            model,
            cross_entropy,
            trained.records,
            mechanism,
            given.mask,
            statistics,
            randomness,
            lambda _: None,
            options=options,
            augmentation=augmentation,
        )
        descend(model, release.gradient, LEARNING_RATE)

    return step


def noised_mean(total: Tensor, given: Standardisation, count: int, generator: torch.Generator) -> Tensor:
    """Noise a sum of standardised gradients [d] and map it back: the end of a step in the plainest way."""
    noise = torch.randn(len(total), generator=generator, dtype=total.dtype)
    noisy = (total + NOISE_MULTIPLIER * CLIPPING_NORM * noise) / count
    return torch.where(given.mask, given.mean + given.scale * noisy, 0.0).float()
