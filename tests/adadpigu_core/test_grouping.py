"""Groups of coordinates, and masks that retain them as a whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adadpigu_core.grouping import groups, means
from adadpigu_core.masking import RETAINED_AS, mask_of
from adadpigu_core.parameters import ParameterLayout

LAYOUT = ParameterLayout.of(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(4, 2)))


def test_by_hand():
    assert groups(LAYOUT, "layer").tolist() == [0] * 24 + [1] * 3 + [2] * 8 + [3] * 2
    assert groups(LAYOUT, "row").tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 3 + [4] * 4 + [5] * 4 + [6] * 2
    filters = [*[0] * 4, *[1] * 4] * 3
    assert groups(LAYOUT, "column").tolist() == filters + [2] * 3 + [3, 4, 5, 6] * 2 + [7] * 2
    assert groups(LAYOUT, "coordinate").tolist() == list(range(37))


def test_means():
    values = torch.arange(37.0)
    by_layer = means(values, groups(LAYOUT, "layer"))
    assert by_layer.tolist() == [11.5, 25.0, 30.5, 35.5]
    assert torch.equal(means(values, groups(LAYOUT, "coordinate")), values.double())


@given(st.sampled_from(RETAINED_AS), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99))
def test_masks_of_groups_are_whole_nested_and_never_too_large(granularity, one, other, seed):
    group = groups(LAYOUT, granularity)
    ranking = torch.randperm(int(group.max()) + 1, generator=torch.Generator().manual_seed(seed))
    small, large = (mask_of(ranking, ratio, group) for ratio in sorted((one, other)))
    assert bool((large | ~small).all())
    for mask, ratio in zip((small, large), sorted((one, other)), strict=True):
        retained = {int(index) for index in group[mask]}
        assert all(bool(mask[group == index].all()) for index in retained)
        first = int((group == ranking[0]).sum())
        assert int(mask.sum()) <= max(first, round(ratio * 37))
        assert bool(mask[group == ranking[0]].all())


def test_single_coordinates_are_the_special_case():
    ranking = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    for ratio in (0.01, 0.3, 1.0):
        assert torch.equal(mask_of(ranking, ratio), mask_of(ranking, ratio, groups(LAYOUT, "coordinate")))


def test_importance_of_a_group_is_less_noisy_than_that_of_a_coordinate():
    """Two of 64 rows carry a signal well below the noise of a coordinate; averaging over a row finds them."""
    layout = ParameterLayout(("w",), ((64, 100),))
    rows = groups(layout, "row")
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(6400, generator=generator) + torch.where(rows < 2, 1.0, 0.0)
    found = mask_of(torch.argsort(means(noisy.square(), rows), descending=True), 2 / 64, rows)
    assert set(rows[found].tolist()) == {0, 1}
    single = mask_of(torch.argsort(noisy.square(), descending=True), 2 / 64)
    assert int((rows[single] < 2).sum()) < 50


def test_there_is_no_other_granularity():
    with pytest.raises(KeyError):
        groups(LAYOUT, "diagonal")
