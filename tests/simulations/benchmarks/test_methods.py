"""Every method makes a step of the same kind; those that standardise compute the same sum."""

from dataclasses import replace

import pytest
import torch

from adadpigu_core.gradients import PRECISIONS, cross_entropy
from adadpigu_core.gradients.simple import clipped_sum
from adadpigu_core.models import check_isolation, check_private
from adadpigu_core.parameters import flatten
from simulations.benchmarks import plan
from simulations.benchmarks.methods import CLIPPING_NORM, Trained, kept_gb, make_step
from simulations.benchmarks.models import make_model, make_records
from simulations.benchmarks.plan import (
    ADADPIGU,
    GHOST,
    HOOKS,
    METHODS,
    MODELS,
    OPACUS,
    PLAIN,
    STANDARDISED,
    Layout,
    Plan,
    Task,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus warns of hooks that it sets itself

COUNTS = {"mnist-cnn": 26_010, "cifar-cnn": 550_570, "mlp": 1_863_690}


def task(model="mnist-cnn", method=PLAIN, layout=None, retention=0.6, batch=3):
    return Task(model, method, layout or Layout(), batch, retention, "cpu", 1, limit_gb=10)


@pytest.mark.parametrize("model", MODELS)
def test_networks_can_be_trained_privately(model):
    network, records = make_model(model), make_records(model, 2)
    check_private(network)
    check_isolation(network, records.features)
    assert network(records.features).shape == (2, 10)
    assert torch.equal(flatten(network), flatten(make_model(model)))


@pytest.mark.parametrize(("model", "count"), COUNTS.items())
def test_sizes_of_the_literature(model, count):
    assert flatten(make_model(model)).numel() == count


def test_sizes_of_the_transformer_and_the_residual_network():
    dense = [m for m in make_model("transformer").modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.weight.numel() for m in dense) == pytest.approx(394_000, rel=0.01)
    assert flatten(make_model("wrn-16-4")).numel() == pytest.approx(2.75e6, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_the_weights_and_can_be_repeated(method):
    if method in OPACUS:
        pytest.importorskip("opacus", reason="needs the extra benchmark")
    trained = Trained.of(task(method=method), batch=3)
    step = make_step(task(method=method), trained)
    seen = [flatten(trained.model)]
    for _ in range(2):
        step()
        seen.append(flatten(trained.model))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert all(bool(torch.isfinite(weights).all()) for weights in seen)


@pytest.mark.parametrize("layout", [Layout(), Layout(True), Layout(False, 2), Layout(True, 2)], ids=lambda it: it.name)
def test_layouts_change_no_plain_step(layout):
    """The batch of 3 is cut into 2 and 1: the mean must still be that of all."""
    expected, found = (Trained.of(task(), batch=3) for _ in range(2))
    make_step(task(), expected)()
    make_step(task(layout=layout), found)()
    assert torch.allclose(flatten(found.model), flatten(expected.model), atol=1e-6)


def test_views_that_are_all_the_same_change_no_step():
    """Each method sees as many rows, and its step is that of one view."""
    for method in (PLAIN, ADADPIGU):
        once, repeated = task(method=method), replace(task(method=method), views=3)
        trained = [Trained.of(each, batch=3) for each in (once, repeated)]
        for each, given in zip((once, repeated), trained, strict=True):
            make_step(each, given)()
        torch.testing.assert_close(flatten(trained[0].model), flatten(trained[1].model), rtol=0, atol=1e-5)


def test_with_views_or_in_half_precision_opacus_is_left_out():
    for other in (Plan(views=2), Plan(precision="bfloat16")):
        assert not {each.method for each in other.tasks("mlp")} & set(OPACUS)
        assert not other.bounds_apply


@pytest.mark.parametrize("method", [PLAIN, ADADPIGU])
def test_half_precision_is_what_is_timed(method):
    """The step is nearly that of float32, and not that."""
    exact = replace(task("mlp", method), batch=3)
    moved = []
    for each in (exact, exact, replace(exact, precision="bfloat16")):
        trained = Trained.of(each, batch=3)
        before = flatten(trained.model).clone()
        make_step(each, trained)()
        moved.append(flatten(trained.model) - before)
    assert torch.equal(moved[0], moved[1])
    distance = float((moved[2] - moved[0]).norm() / moved[0].norm())
    assert 1e-6 < distance < 0.1


def test_precisions_are_those_of_the_engine():
    assert plan.PRECISIONS == PRECISIONS


@pytest.mark.parametrize("way", ["by_parameter", "as_vectors"])
@pytest.mark.parametrize("model", ["mnist-cnn", "transformer"])
def test_hooks_and_standardising_give_the_sum_of_the_simple_engine(model, way):
    opacus_steps = pytest.importorskip("simulations.benchmarks.opacus_steps", reason="needs the extra benchmark")
    trained = Trained.of(task(model), batch=3)
    expected = clipped_sum(trained.model, cross_entropy, trained.records, trained.standardisation, CLIPPING_NORM)
    assert bool((expected.norms > CLIPPING_NORM).any()), "something must have been clipped"
    found = opacus_steps.standardised_sum(trained, getattr(opacus_steps, way))()
    assert torch.allclose(found.float(), expected.total, atol=1e-5)
    assert bool((found[~trained.standardisation.mask] == 0).all())


def test_the_mask_keeps_the_share_that_was_asked_for():
    trained = Trained.of(task(retention=0.25), batch=1)
    assert int(trained.standardisation.mask.sum()) == round(0.25 * 26_010)


def test_only_methods_that_keep_gradients_need_memory_for_them():
    assert kept_gb(task(method=GHOST)) == kept_gb(task()) == 0
    assert kept_gb(task("mlp", STANDARDISED, batch=256)) == 2 * kept_gb(task("mlp", HOOKS, batch=256))
    assert kept_gb(task("mlp", HOOKS, batch=256)) == pytest.approx(256 * 1_863_690 * 4e-9)
