"""The networks are the published ones, and models that mix records are found."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adadpigu_core.exceptions import ConfigurationError, ModelError
from adadpigu_core.models import (
    NAMES,
    NORMALISATIONS,
    ModelSpec,
    StandardisedConv2d,
    build,
    check_isolation,
    check_private,
    default_model,
)

SHAPES = {
    "mnist-cnn": (1, 28, 28),
    "cifar-cnn": (3, 32, 32),
    "digits-cnn": (1, 8, 8),
    "mlp": (5, 3),
    "linear": (7,),
}
CONVOLUTIONAL = ("mnist-cnn", "cifar-cnn", "digits-cnn")
EVERY_SPEC = [
    ModelSpec(name, activation, normalisation, SHAPES[name], 10)
    for name in NAMES
    for activation in ("relu", "tanh")
    for normalisation in NORMALISATIONS
    if normalisation == "none" or name in CONVOLUTIONAL
]


def spec(name="mnist-cnn", activation="tanh", normalisation="none", input_shape=None, num_classes=10):
    return ModelSpec(name, activation, normalisation, input_shape or SHAPES[name], num_classes)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# The networks


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mnist-cnn", 26_010), ("cifar-cnn", 550_570), ("digits-cnn", 1_954), ("mlp", 3_338), ("linear", 80)],
)
def test_number_of_parameters(name, expected):
    assert size(build(spec(name), seed=0)) == expected
    if name in CONVOLUTIONAL:
        assert size(build(spec(name, normalisation="group"), seed=0)) == expected


@pytest.mark.parametrize("each", EVERY_SPEC, ids=lambda s: f"{s.name}-{s.activation}-{s.normalisation}")
def test_every_network_runs_is_private_and_isolated(each):
    model = build(each, seed=1)
    features = torch.rand(3, *each.input_shape)
    assert model(features).shape == (3, 10)
    check_private(model)
    check_isolation(model, features)


def published_mnist_cnn(x, w, activation):
    x = activation(F.conv2d(x, w["convolution1.weight"], w["convolution1.bias"], stride=2, padding=2))
    x = F.max_pool2d(x, 2, 1)
    x = activation(F.conv2d(x, w["convolution2.weight"], w["convolution2.bias"], stride=2))
    x = F.max_pool2d(x, 2, 1).flatten(1)
    x = activation(F.linear(x, w["hidden.weight"], w["hidden.bias"]))
    return F.linear(x, w["output.weight"], w["output.bias"])


def published_cifar_cnn(x, w, activation):
    for number in range(1, 7):
        x = activation(F.conv2d(x, w[f"convolution{number}.weight"], w[f"convolution{number}.bias"], padding=1))
        if number % 2 == 0:
            x = F.max_pool2d(x, 2)
    x = activation(F.linear(x.flatten(1), w["hidden.weight"], w["hidden.bias"]))
    return F.linear(x, w["output.weight"], w["output.bias"])


@pytest.mark.parametrize(
    ("name", "published"), [("mnist-cnn", published_mnist_cnn), ("cifar-cnn", published_cifar_cnn)]
)
@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_networks_compute_what_was_published(name, published, activation, function):
    model = build(spec(name, activation), seed=2)
    features = torch.randn(2, *SHAPES[name])
    expected = published(features, dict(model.named_parameters()), function)
    torch.testing.assert_close(model(features), expected)


def test_channels_and_classes_follow_the_spec():
    model = build(spec("mnist-cnn", input_shape=(3, 28, 28), num_classes=47), seed=0)
    assert model(torch.rand(2, 3, 28, 28)).shape == (2, 47)


def test_group_normalisation_comes_before_each_activation():
    layers = list(build(spec("cifar-cnn", normalisation="group"), seed=0))
    groups = [i for i, layer in enumerate(layers) if isinstance(layer, nn.GroupNorm)]
    assert len(groups) == 6
    for i in groups:
        assert isinstance(layers[i - 1], nn.Conv2d)
        assert isinstance(layers[i + 1], nn.Tanh)
        assert not list(layers[i].parameters())


def test_standardised_filters_have_mean_0_and_norm_1_whatever_their_weights():
    model = build(spec("digits-cnn", normalisation="group-and-weights"), seed=0)
    layer = next(layer for layer in model if isinstance(layer, StandardisedConv2d))
    records = torch.eye(int(layer.weight[0].numel())).reshape(-1, *layer.weight.shape[1:])
    plain = F.conv2d(records, layer.weight)
    centred = (layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)).flatten(1)
    seen = (plain - plain.mean(0)).squeeze() / centred.norm(dim=1)
    layer.stride, layer.padding = (1, 1), (0, 0)
    torch.testing.assert_close(layer(records).squeeze() - layer.bias, seen, rtol=1e-3, atol=1e-4)
    before = layer(records)
    with torch.no_grad():
        layer.weight.copy_(3 * layer.weight + 5)
    torch.testing.assert_close(layer(records), before, rtol=1e-3, atol=1e-3)


# Seeds


def test_a_seed_fixes_the_weights_whatever_the_global_generator_did():
    torch.manual_seed(5)
    first = weights(build(spec(), seed=3))
    torch.manual_seed(6)
    assert torch.equal(first, weights(build(spec(), seed=3)))
    assert not torch.equal(first, weights(build(spec(), seed=4)))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    model = build(spec("digits-cnn"), seed=3)
    check_isolation(nn.Sequential(model, nn.Dropout()), torch.zeros(2, 1, 8, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_the_same_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(weights(build(spec(), seed=3))))
    thread.start()
    thread.join()
    assert torch.equal(found[0], weights(build(spec(), seed=3)))


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "auto", "input_shape": (1,)}, ["'auto'", *NAMES]),
        ({"activation": "gelu"}, ["gelu", "relu", "tanh"]),
        ({"normalisation": "batch"}, ["batch", "none", "group"]),
        ({"name": "mlp", "normalisation": "group"}, ["mlp", "normalisation"]),
        ({"num_classes": 1}, ["num_classes", "1"]),
        ({"input_shape": (1, 32, 32)}, ["mnist-cnn", "28", "cifar-cnn", "mlp", "linear"]),
        ({"input_shape": (28, 28)}, ["(28, 28)", "mlp"]),
        ({"name": "cifar-cnn", "input_shape": (1, 8, 8)}, ["digits-cnn"]),
        ({"name": "linear", "input_shape": (3, 0)}, ["(3, 0)"]),
        ({"name": "linear", "input_shape": ()}, ["()"]),
    ],
)
def test_what_is_wrong_with_a_spec_is_named(changes, words):
    values = {"name": "mnist-cnn", "activation": "relu", "normalisation": "none", "num_classes": 10}
    with pytest.raises(ConfigurationError) as caught:
        ModelSpec(**{**values, "input_shape": (1, 28, 28), **changes})
    assert all(word in str(caught.value) for word in words)


def test_default_models():
    names = ("digits", "mnist", "fashion-mnist", "cifar-10", "npz:own.npz")
    assert [default_model(name) for name in names] == ["digits-cnn", "mnist-cnn", "mnist-cnn", "cifar-cnn", "mlp"]
    with pytest.raises(ConfigurationError, match="svhn"):
        default_model("svhn")


# Models that are refused by what they are


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(6), ["body.1", "BatchNorm1d", "nn.GroupNorm(2, 6)"]),
        (nn.BatchNorm2d(64, affine=False), ["body.1", "BatchNorm2d", "nn.GroupNorm(8, 64)"]),
        (nn.SyncBatchNorm(8), ["body.1", "SyncBatchNorm", "nn.GroupNorm(8, 8)"]),
        (nn.LazyBatchNorm2d(), ["body.1", "LazyBatchNorm2d", "nn.GroupNorm"]),
        (nn.InstanceNorm2d(4, track_running_stats=True), ["InstanceNorm2d", "track_running_stats=False"]),
        (nn.Linear(2, 2).double(), ["body.1.weight", "float64", "model.float()"]),
    ],
)
def test_layer_that_cannot_be_private_is_named(layer, words):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), layer)})
    with pytest.raises(ModelError) as caught:
        check_private(model)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.public_message == str(caught.value)


def test_the_model_itself_can_be_the_fault():
    with pytest.raises(ModelError, match="the model itself"):
        check_private(nn.BatchNorm1d(2))


@pytest.mark.parametrize("model", [nn.Flatten(), nn.Linear(2, 2).requires_grad_(False)])
def test_model_without_trainable_parameter_is_refused(model):
    with pytest.raises(ModelError, match="no trainable parameter"):
        check_private(model)


def test_frozen_layers_and_harmless_normalisation_pass():
    norms = [nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2), nn.LocalResponseNorm(1), nn.Dropout()]
    check_private(nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2), *norms))


# Models that are refused by what they do


class Layer(nn.Module):
    """A layer from a function of the layer and its input."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.function = function

    def forward(self, x):
        return self.function(self, self.linear(x))


MIXING = {
    "centred by the batch": lambda self, x: x - x.mean(0),
    "pairs exchanged": lambda self, x: x + 0.01 * x.roll(1, 0),
    "softmax over records": lambda self, x: x.softmax(0),
    "divided by their number": lambda self, x: x / len(x),
    "only in training": lambda self, x: x - x.mean(0) if self.training else x,
    "only in evaluation": lambda self, x: x if self.training else x - x.mean(0),
    "under random dropout": lambda self, x: F.dropout(x - x.mean(0), 0.2, self.training),
    "the first record leaks": lambda self, x: x + 0.01 * x[0],
}


@pytest.mark.parametrize("fault", MIXING)
def test_mixing_is_found_by_experiment(fault):
    torch.manual_seed(0)
    features = torch.rand(4, 3)
    model = nn.Sequential(Layer(MIXING[fault]), nn.Linear(3, 2))
    check_private(model)
    with pytest.raises(ModelError, match="mixes records") as caught:
        check_isolation(model, features)
    assert caught.value.public_message == "Sequential mixes the records of a batch"


@pytest.mark.parametrize("mode", [True, False])
def test_batch_normalisation_is_found_in_either_mode_and_left_as_it_was(mode):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train(mode)
    with pytest.raises(ModelError):
        check_isolation(model, torch.rand(4, 3))
    assert model.training is mode
    assert int(model[1].num_batches_tracked) == 0


HARMLESS = {
    "dropout": lambda self, x: F.dropout(x, 0.5, self.training),
    "normalised per record": lambda self, x: F.layer_norm(x, (3,)),
    "large values": lambda self, x: 1e6 * x,
    "not a number": lambda self, x: x / torch.zeros(()) * 0.0,
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_isolated_models_are_not_accused(kind):
    check_isolation(Layer(HARMLESS[kind]), torch.rand(4, 3))


def test_a_single_record_shows_nothing():
    with pytest.raises(ValueError, match="two at least"):
        check_isolation(nn.Linear(2, 2), torch.rand(1, 2))


def test_model_that_does_not_run_or_returns_something_else():
    with pytest.raises(ModelError, match=r"cannot take features \[4, 5\]"):
        check_isolation(nn.Linear(2, 2), torch.rand(4, 5))
    for wrong in (lambda self, x: x.sum(), lambda self, x: (x, x)):
        with pytest.raises(ModelError, match="one output per record"):
            check_isolation(Layer(wrong), torch.rand(4, 3))
