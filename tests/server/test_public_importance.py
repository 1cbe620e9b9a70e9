"""A ranking by made-up drawings: free, the same for everyone, and about what images have in common."""

import pytest
import torch

from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.importance import rank
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import ParameterLayout, flatten
from adadpigu_core.strokes import drawings
from server.public_importance import public_scores

IMAGES = ModelSpec("linear", "relu", "none", (1, 8, 8), 3)


def test_scores_are_those_of_autograd_on_single_drawings_by_hand():
    """For a linear layer: the square of a pixel times the square of what the softmax leaves of the label."""
    model = build(IMAGES, seed=0)
    images = drawings(8, 8)[:200].float().reshape(200, 64)
    labels = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        left = model(images.reshape(200, 1, 8, 8)).softmax(1) - torch.eye(3)[labels]
    weight = torch.einsum("nk,np->kp", left.double().square(), images.double().square()) / 200
    expected = torch.cat([weight.reshape(-1), left.double().square().mean(0)])
    assert torch.allclose(public_scores(model, IMAGES), expected, rtol=1e-4)


def test_a_border_that_drawings_leave_blank_ranks_last():
    model = build(IMAGES, seed=0)
    layout = ParameterLayout.of(model)
    order = rank(public_scores(model, IMAGES))
    corner = layout.split(torch.arange(layout.num_parameters))[layout.names[0]].reshape(3, 8, 8)[:, 0, 0]
    places = torch.argsort(order)[corner]
    assert int(places.min()) > layout.num_parameters // 2


def test_the_model_stays_as_it_is_and_chance_plays_no_part():
    model = build(IMAGES, seed=0).train()
    before = flatten(model).clone()
    assert torch.equal(public_scores(model, IMAGES), public_scores(model, IMAGES))
    assert torch.equal(flatten(model), before)
    assert model.training


def test_colours_and_a_front_end():
    for spec in (
        ModelSpec("linear", "relu", "none", (3, 8, 8), 3),
        ModelSpec("linear", "relu", "none", (1, 8, 8), 3, "scattering"),
    ):
        model = build(spec, seed=0)
        scores = public_scores(model, spec)
        assert scores.shape == (ParameterLayout.of(model).num_parameters,)
        assert bool((scores >= 0).all())
        assert float(scores.max()) > 0


def test_records_that_are_no_images_are_refused():
    spec = ModelSpec("linear", "relu", "none", (5,), 2)
    with pytest.raises(
        ConfigurationError, match=r"pretraining\.ranking: public ranks by made-up images.*use consensus"
    ):
        public_scores(build(spec, seed=0), spec)
