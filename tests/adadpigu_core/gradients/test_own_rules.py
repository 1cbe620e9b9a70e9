"""A rule of one's own, as docs/engine.md shows it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from adadpigu_core.gradients import recorder as recording
from adadpigu_core.gradients.layers.linear import linear
from adadpigu_core.gradients.recorder import register_rule


def scaled_linear(x, weight, scale):
    if has_torch_function((x, weight)):
        return handle_torch_function(scaled_linear, (x, weight), x, weight, scale)
    return F.linear(x * scale, weight)


class Scaled(nn.Module):
    """A parameter of its own, used by that function alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return scaled_linear(x, self.weight, 0.5).flatten(1, -2).mean(1)


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(recording, "RULES", dict(recording.RULES))
    seen = []

    @register_rule(scaled_linear)
    def record_scaled_linear(recorder, x, weight, scale):
        seen.append(scale)
        return linear(recorder, x * scale, weight)

    return seen


@pytest.mark.parametrize("positions", [1, 5])
def test_it_is_used_and_right(agree, built, records_of, calls, positions):
    agree(built(Scaled), records_of((positions, 4), 5))
    assert calls


def test_without_it_the_result_is_the_same(agree, built, records_of):
    agree(built(Scaled), records_of((5, 4), 5))
