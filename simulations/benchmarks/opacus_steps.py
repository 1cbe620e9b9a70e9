"""DP-SGD steps by Opacus, and what a user would add to its hooks to standardise before clipping.

Importing this module imports Opacus, a dependency of benchmarks alone.
"""

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.gradients import cross_entropy
from adadpigu_core.gradients.clipping import clipping_factors
from adadpigu_core.gradients.simple import standardise
from adadpigu_core.parameters import ParameterLayout, descend
from simulations.benchmarks.methods import (
    CLIPPING_NORM,
    LEARNING_RATE,
    NOISE_MULTIPLIER,
    Step,
    Trained,
    noised_mean,
)


def hooks(trained: Trained) -> Step:
    """Prepare DP-SGD with a gradient kept for every record."""
    module = GradSampleModule(trained.model)
    optimiser = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=len(trained.records),
    )
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimiser.zero_grad()
        criterion(module(trained.records.features), trained.records.labels).backward()
        optimiser.step()

    return step


def ghost(trained: Trained) -> Step:
    """Prepare DP-SGD by ghost clipping: norms in a first backward pass, the clipped sum in a second."""
    module = GradSampleModuleFastGradientClipping(
        trained.model, max_grad_norm=CLIPPING_NORM, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimiser = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=len(trained.records),
    )
    criterion = DPLossFastGradientClipping(module, optimiser, nn.CrossEntropyLoss())

    def step() -> None:
        optimiser.zero_grad()
        criterion(module(trained.records.features), trained.records.labels).backward()
        optimiser.step()

    return step


def hooks_standardised(trained: Trained) -> Step:
    """Prepare what AdaDPIGU's step computes, from the gradients that the hooks keep."""
    sum_up = standardised_sum(trained)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        total = sum_up().cpu()
        descend(
            trained.model, noised_mean(total, trained.standardisation, len(trained.records), generator), LEARNING_RATE
        )

    return step


def standardised_sum(trained: Trained) -> Callable[[], Tensor]:
    """Prepare the sum of standardised and clipped gradients, [d]."""
    module = GradSampleModule(trained.model, loss_reduction="sum")
    parameters = [parameter for parameter in trained.model.parameters() if parameter.requires_grad]
    pieces = _pieces(trained)

    def sum_up() -> Tensor:
        module.zero_grad()
        loss = cross_entropy(module(trained.records.features), trained.records.labels).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return _clipped_sum(parameters, pieces)

    return sum_up


def _pieces(trained: Trained) -> list[Standardisation]:
    """Cut the standardisation into parameters, on the device of the network."""
    layout, given, device = ParameterLayout.of(trained.model), trained.standardisation, trained.records.labels.device
    parts = [layout.split(vector.to(device)) for vector in (given.mask, given.mean, given.scale)]
    return [Standardisation(*(part[name].reshape(-1) for part in parts)) for name in layout.names]


def _clipped_sum(parameters: list[nn.Parameter], pieces: list[Standardisation]) -> Tensor:
    """Standardise, clip and add up the kept gradients, [d]; a parameter at a time, as Opacus does."""
    standardised = []
    for parameter, piece in zip(parameters, pieces, strict=True):
        kept: Tensor = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus' hooks put it there
        standardised.append(standardise(kept.flatten(1), piece))
        parameter.grad_sample = None  # type: ignore[attr-defined]
        del kept
    norms = torch.stack([torch.linalg.vector_norm(each, dim=1) for each in standardised], dim=1).double().norm(dim=1)
    factors = clipping_factors(norms, CLIPPING_NORM).float()
    return torch.cat([factors @ each for each in standardised])
