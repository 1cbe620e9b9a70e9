"""Settings, groups of coordinates, and statistics that nothing was learnt for."""

import math

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import (
    GRANULARITIES,
    AdaptiveClipping,
    FixedStatistics,
    RunningStatistics,
    Standardisation,
    expand,
    shrink,
)
from adadpigu_core.exceptions import ConfigurationError, MessageError
from adadpigu_core.grouping import groups
from adadpigu_core.parameters import ParameterLayout

# two matrices, two vectors: 6 + 2 + 4 + 2 coordinates
LAYOUT = ParameterLayout(("a.weight", "a.bias", "b.weight", "b.bias"), ((2, 3), (2,), (2, 2), (2,)))
D = LAYOUT.num_parameters
ALL = torch.ones(D, dtype=torch.bool)
NO_NOISE = torch.zeros(D)
LAYERS = torch.tensor([0] * 6 + [1] * 2 + [2] * 4 + [3] * 2)
ROWS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])


# ---- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "Energy"),
        ("granularity", "tensor"),
        ("decay", 1.0),
        ("decay", -0.1),
        ("decay", math.nan),
        ("floor", 0.0),
        ("floor", 1.1),
        ("floor", math.nan),
        ("shrinkage", -0.1),
        ("shrinkage", 1.1),
        ("shrinkage", math.nan),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=f"adaptive-clipping.{name}.*{value}"):
        AdaptiveClipping(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("decay", 0.0), ("floor", 1.0), ("shrinkage", 0.0), ("shrinkage", 1.0)])
def test_settings_at_the_ends_of_their_range_are_accepted(name, value):
    assert getattr(AdaptiveClipping(**{name: value}), name) == value


# ---- groups


def test_groups_are_layers_rows_and_coordinates():
    assert torch.equal(groups(LAYOUT, "layer"), LAYERS)
    assert torch.equal(groups(LAYOUT, "row"), ROWS)
    assert torch.equal(groups(LAYOUT, "coordinate"), torch.arange(D))


def test_a_row_of_a_convolution_is_one_filter():
    layout = ParameterLayout.of(nn.Conv2d(2, 3, 2))
    assert groups(layout, "row").tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_group_values_survive_expansion(granularity):
    count = int(groups(LAYOUT, granularity)[-1]) + 1
    values = torch.randn(count)
    assert torch.equal(shrink(expand(values, LAYOUT, granularity), LAYOUT, granularity), values)
    with pytest.raises(MessageError, match=granularity):
        expand(torch.zeros(count + 1), LAYOUT, granularity)


# ---- fixed statistics, and running ones at the start


def test_fixed_statistics_learn_nothing():
    mean, scale, mask = torch.randn(D), torch.rand(D) + 0.1, torch.rand(D) < 0.5
    statistics = FixedStatistics(mean, scale)
    assert statistics.updated(torch.ones(D), NO_NOISE, mask) is statistics
    given_ = statistics.standardisation(mask)
    assert (given_.mask is mask, given_.mean is mean, given_.scale is scale) == (True, True, True)


def test_neutral_fixed_statistics_are_the_identity():
    given_ = FixedStatistics.neutral(D).standardisation(ALL)
    assert given_.mean.tolist() == [0] * D
    assert given_.scale.tolist() == [1] * D


@pytest.mark.parametrize("rule", ["none", "energy", "paper"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_before_anything_was_released_every_rule_is_the_identity(rule, centre, granularity):
    settings = AdaptiveClipping(rule=rule, centre=centre, granularity=granularity)
    given_ = RunningStatistics.neutral(settings, LAYOUT).standardisation(ALL)
    assert given_.mean.tolist() == [0] * D
    assert given_.scale.tolist() == [1] * D


@pytest.mark.parametrize("spread", [False, True])
def test_the_scale_of_a_piece_is_that_of_its_retained_coordinates(spread):
    """Frozen coordinates may have any scale; a piece of one scale gives a number."""
    torch.manual_seed(0)
    mask, scale = torch.rand(150_000) < 0.3, torch.full((150_000,), 0.7)
    mask[65_536:131_072] = False  # a piece without any
    scale[~mask] = torch.tensor([torch.nan, torch.inf, -1.0, 0.0]).repeat(40_000)[: int((~mask).sum())]
    if spread:
        scale[mask] += torch.rand(int(mask.sum()))
    given = Standardisation(mask, torch.zeros(150_000), scale)
    kinds = []
    for part, retained in given.pieces():
        found = given.scale_of(part)
        kinds.append(type(found))
        whole = torch.as_tensor(found).expand(len(mask[part]))
        assert torch.equal(whole[retained], scale[part][retained])
        assert bool((torch.isfinite(whole) & (whole > 0)).all())
    assert kinds == ([torch.Tensor, float, torch.Tensor] if spread else [float] * 3)
