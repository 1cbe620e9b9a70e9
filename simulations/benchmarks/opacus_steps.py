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

Clip = Callable[[list[Tensor], Trained], Tensor]


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
    """Prepare what AdaDPIGU's step computes, from the gradients that the hooks keep, a parameter at a time."""
    return _private(trained, standardised_sum(trained, by_parameter))


def naive(trained: Trained) -> Step:
    """Prepare the same, written as the method is: the gradient of a record is one vector, and so are the statistics."""
    return _private(trained, standardised_sum(trained, as_vectors))


def _private(trained: Trained, sum_up: Callable[[], Tensor]) -> Step:
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        total = sum_up().cpu()
        descend(
            trained.model, noised_mean(total, trained.standardisation, len(trained.records), generator), LEARNING_RATE
        )

    return step


def standardised_sum(trained: Trained, clip: Clip) -> Callable[[], Tensor]:
    """Prepare the sum of standardised and clipped gradients, [d]."""
    module = GradSampleModule(trained.model, loss_reduction="sum")
    parameters = [parameter for parameter in trained.model.parameters() if parameter.requires_grad]

    def sum_up() -> Tensor:
        module.zero_grad()
        loss = cross_entropy(module(trained.records.features), trained.records.labels).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        return clip([_taken(parameter) for parameter in parameters], trained)

    return sum_up


def _taken(parameter: nn.Parameter) -> Tensor:
    """Take the gradients of records, [n, P], from where the hooks put them."""
    kept: Tensor = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus adds it
    parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus adds it
    return kept.flatten(1)


def by_parameter(gradients: list[Tensor], trained: Trained) -> Tensor:
    """Standardise, clip and add up gradients, [d], as Opacus clips; ``gradients`` is emptied on the way."""
    standardised = []
    for piece in _pieces(trained):
        standardised.append(standardise(gradients.pop(0), piece))
    norms = torch.stack([torch.linalg.vector_norm(each, dim=1) for each in standardised], dim=1).double().norm(dim=1)
    factors = clipping_factors(norms, CLIPPING_NORM).float()
    return torch.cat([factors @ each for each in standardised])


def as_vectors(gradients: list[Tensor], trained: Trained) -> Tensor:
    """Standardise, clip and add up gradients, [d], as rows of one matrix [n, d]."""
    device = trained.records.labels.device
    given = trained.standardisation
    vectors = Standardisation(given.mask.to(device), given.mean.to(device), given.scale.to(device))
    standardised = standardise(torch.cat(gradients, dim=1), vectors)
    norms = torch.linalg.vector_norm(standardised, dim=1).double()
    return clipping_factors(norms, CLIPPING_NORM).float() @ standardised


def _pieces(trained: Trained) -> list[Standardisation]:
    """Cut the standardisation into parameters, on the device of the network."""
    layout, given, device = ParameterLayout.of(trained.model), trained.standardisation, trained.records.labels.device
    parts = [layout.split(vector.to(device)) for vector in (given.mask, given.mean, given.scale)]
    return [Standardisation(*(part[name].reshape(-1) for part in parts)) for name in layout.names]
