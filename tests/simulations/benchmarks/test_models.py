"""The networks that rows of experiments name by their import path."""

import pytest
import torch
from torch import nn

from adadpigu_core.configuration import parse
from adadpigu_core.gradients import check_model
from adadpigu_core.gradients.clipping import cross_entropy
from adadpigu_core.models import ModelSpec, StandardisedConv2d, build, check_isolation, check_private
from simulations.simulate import read_settings
from simulations.tables import EXPERIMENTS


@pytest.mark.parametrize("row", ["cifar10_wrn_central_eps4", "cifar10_wrn_central_eps8"])
def test_the_wide_residual_network_of_the_rows(row):
    """2,748,890 parameters are those of WRN-16-4 on CIFAR-10 (De et al. 2022)."""
    name = parse(read_settings(EXPERIMENTS / f"{row}.toml")).task.model
    model = build(ModelSpec(name, "relu", "none", (3, 32, 32), 10), seed=0)
    check_private(model)
    check_isolation(model, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_748_890
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 16
    assert all(isinstance(module, StandardisedConv2d) for module in convolutions)


def test_the_narrow_residual_network_of_the_fine_tuning_row():
    name = parse(read_settings(EXPERIMENTS / "fine_tuning_deep_10_eps1.toml")).task.model
    model = build(ModelSpec(name, "relu", "none", (1, 28, 28), 10), seed=0)
    check_model(model, cross_entropy, (1, 28, 28), 10)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 15
    assert sum(parameter.ndim > 1 for parameter in model.parameters()) == 16


def test_it_takes_other_images_and_classes():
    model = build(ModelSpec("simulations.benchmarks.models:wide_resnet", "relu", "none", (1, 8, 8), 3), seed=0)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
