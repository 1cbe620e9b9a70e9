"""What a clipped sum costs, in multiplications: what is not needed is not computed."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.gradients import clipped_sum, cross_entropy
from adadpigu_core.grouping import groups
from adadpigu_core.masking import mask_of
from adadpigu_core.parameters import ParameterLayout


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1)


MODELS = {
    "sequences": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), Mean(), nn.Linear(32, 3)),
        (64, 32),
    ),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), Mean(), nn.Linear(16, 3)),
        (8, 14, 14),
    ),
}


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(params=MODELS)
def case(request, built, records_of):
    make, shape = MODELS[request.param]
    model, records = built(make), records_of(shape, 8)
    layout = ParameterLayout.of(model)

    def private(mask):
        given = Standardisation(mask, torch.zeros(len(mask)), torch.ones(len(mask)))
        clipped_sum(model, cross_entropy, records, given, 1.0)  # looks at the model
        return counted(lambda: clipped_sum(model, cross_entropy, records, given, 1.0))

    def forward():
        with torch.no_grad():
            model(records.features)

    def plain():
        cross_entropy(model(records.features), records.labels).sum().backward()

    return layout, private, forward, plain


def test_one_forward_one_backward_and_no_ordinary_weight_gradient(case):
    layout, private, _, plain = case
    full = torch.ones(layout.num_parameters, dtype=torch.bool)
    # gradients of single records take the place of the weight gradients, and their weighted sum is nearly for nothing
    assert private(full) <= 1.1 * counted(plain)


def test_a_mask_of_single_coordinates_saves_nothing(case):
    layout, private, _, _ = case
    full = torch.ones(layout.num_parameters, dtype=torch.bool)
    half = torch.rand(layout.num_parameters, generator=torch.Generator().manual_seed(0)) < 0.5
    assert private(half) == private(full)


def test_layers_that_are_left_out_cost_nothing(case):
    layout, private, forward, _ = case
    last = torch.zeros(layout.num_parameters, dtype=torch.bool)
    last[-layout.sizes[-1] - layout.sizes[-2] :] = True  # weights and bias of the head, which nothing stands before
    head = 4 * 8 * layout.sizes[-2]  # norms and sum of eight records, two products each at most
    assert private(last) <= counted(forward) + head


@pytest.mark.parametrize(("granularity", "ratio"), [("row", 0.25), ("column", 0.25)])
def test_rows_and_columns_that_are_left_out_cost_nothing(case, granularity, ratio):
    layout, private, forward, plain = case
    of_weights = (counted(plain) - counted(forward)) / 2  # the other half of a backward pass is for the inputs
    group = groups(layout, granularity)
    mask = mask_of(torch.arange(int(group.max()) + 1), ratio, group)
    full = torch.ones_like(mask)
    assert private(full) - private(mask) >= 0.5 * of_weights
