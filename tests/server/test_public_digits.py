"""Weights from public digits: the same for a seed, worth something, and only where digits fit."""

import pytest
import torch

from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import ModelSpec, build
from server import public_digits
from server.evaluation import evaluator

SPEC = ModelSpec("digits-cnn", "relu", "group", (1, 8, 8), 10)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (8, 8), (28, 20)])
def test_digits_are_in_the_middle_of_a_black_border(height, width):
    images, labels = public_digits.enlarged(height, width)
    assert images.shape == (1797, 1, height, width)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert labels.bincount().min() > 170
    if height == width == 28:
        lit = images.sum((0, 1)) > 0
        assert torch.nonzero(lit.any(1)).aminmax() == torch.nonzero(lit.any(0)).aminmax() == (4, 23)


def test_a_seed_gives_weights_that_know_digits():
    state = torch.random.get_rng_state()
    weights = public_digits.trained(SPEC, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    public_digits.trained.cache_clear()
    assert torch.equal(weights, public_digits.trained(SPEC, 3))
    assert not torch.equal(weights, public_digits.trained(SPEC, 4))
    evaluate = evaluator(build(SPEC, seed=3), Records(*public_digits.enlarged(8, 8)))
    assert evaluate(weights).accuracy > 0.7


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("linear", "relu", "none", (64,), 10),
        ModelSpec("mlp", "relu", "none", (3, 8, 8), 10),
        ModelSpec("mlp", "relu", "none", (1, 8, 8), 9),
        ModelSpec("mlp", "relu", "none", (1, 8, 8), 10, "scattering"),
    ],
    ids=["table", "colours", "classes", "features"],
)
def test_other_tasks_are_refused(spec):
    with pytest.raises(
        ConfigurationError, match=r"^task\.weights: public-digits is for raw images of one channel.*name a file"
    ):
        public_digits.check(spec)
