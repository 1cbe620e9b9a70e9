import pytest
import torch
from torch import nn

from adadpigu_core.parameters import ParameterLayout, assign, assign_fixed, flatten, flatten_fixed


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))


def test_the_flat_order_is_that_of_named_parameters(model):
    layout = ParameterLayout.of(model)
    assert layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layout.shapes == ((2, 3), (2,), (1, 2), (1,))
    assert layout.sizes == (6, 2, 2, 1)
    assert layout.num_parameters == 11
    assert torch.equal(flatten(model), torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


def test_a_tensor_is_flattened_row_by_row():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert flatten(layer).tolist() == [1, 2, 3, 4]


def test_split_and_join_are_inverse(model):
    layout = ParameterLayout.of(model)
    vector = torch.arange(11.0)
    named = layout.split(vector)
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == dict(
        zip(layout.names, layout.shapes, strict=True)
    )
    assert torch.equal(layout.join(named), vector)
    assert torch.equal(layout.join(dict(reversed(named.items()))), vector), "the order of the mapping must not matter"


@pytest.mark.parametrize("length", [10, 12])
def test_a_vector_of_another_length_is_refused(model, length):
    with pytest.raises(RuntimeError):
        ParameterLayout.of(model).split(torch.zeros(length))
    with pytest.raises(RuntimeError):
        assign(model, torch.zeros(length))


def test_a_missing_tensor_is_refused(model):
    with pytest.raises(KeyError):
        ParameterLayout.of(model).join({"0.weight": torch.zeros(2, 3)})


def test_assign_and_flatten_are_inverse(model):
    vector = torch.randn(11)
    assign(model, vector)
    assert torch.equal(flatten(model), vector)


def test_a_flattened_model_is_a_copy(model):
    before = flatten(model)
    kept = before.clone()
    assign(model, torch.zeros(11))
    assert torch.equal(before, kept)
    assert not before.requires_grad


def test_assign_keeps_a_copy_of_the_values(model):
    vector = torch.ones(11)
    assign(model, vector)
    vector.zero_()
    assert torch.equal(flatten(model), torch.ones(11))


def test_parameters_that_are_not_trained_are_left_out(model):
    model[0].weight.requires_grad_(False)
    fixed = model[0].weight.clone()
    assert ParameterLayout.of(model).names == ("0.bias", "2.weight", "2.bias")
    assign(model, torch.zeros(5))
    assert torch.equal(model[0].weight, fixed)


def test_a_shared_parameter_counts_once():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    layout = ParameterLayout.of(nn.Sequential(first, second))
    assert layout.names == ("0.weight", "0.bias", "1.bias")


def test_buffers_are_not_parameters():
    assert ParameterLayout.of(nn.BatchNorm1d(3)).num_parameters == 6


def test_the_fingerprint_is_of_names_and_shapes_and_not_of_values(model):
    fingerprint = ParameterLayout.of(model).fingerprint
    assign(model, torch.zeros(11))
    assert ParameterLayout.of(model).fingerprint == fingerprint
    others = [
        ParameterLayout(("a", "b"), ((2,), (3,))),
        ParameterLayout(("b", "a"), ((2,), (3,))),
        ParameterLayout(("a", "b"), ((3,), (2,))),
        ParameterLayout(("a", "b"), ((1, 2), (3,))),
        ParameterLayout(("a",), ((2,),)),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 6


def test_the_fingerprint_is_the_same_on_every_machine():
    assert ParameterLayout(("weight", "bias"), ((2, 3), (2,))).fingerprint == "1db904c3a87d05e6"


def test_a_scalar_parameter_has_one_coordinate():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(2.0))

    model = Temperature()
    assert flatten(model).tolist() == [2.0]
    assign(model, torch.tensor([3.0]))
    assert model.value.item() == 3


def test_what_is_not_trained_is_frozen_parameters_and_buffers_that_are_saved(model):
    assert flatten_fixed(model).shape == (0,)
    assign_fixed(model, torch.zeros(0))
    model[0].bias.requires_grad_(False)
    model.register_buffer("offset", torch.ones(3))
    model.register_buffer("count", torch.tensor(4))
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    model.register_buffer("cache", torch.ones(5), persistent=False)
    assert ParameterLayout.of_fixed(model).names == ("0.bias", "offset")
    trained = flatten(model)
    assign_fixed(model, torch.arange(5.0))
    assert model[0].bias.tolist() == [0, 1]
    assert model.offset.tolist() == [2, 3, 4]
    assert torch.equal(flatten_fixed(model), torch.arange(5.0))
    assert torch.equal(flatten(model), trained)
    with pytest.raises(RuntimeError):
        assign_fixed(model, torch.zeros(4))


def test_a_parameter_that_is_shared_with_a_trained_one_is_trained(model):
    model.append(nn.Linear(3, 2))
    model[3].weight = model[0].weight
    assert ParameterLayout.of_fixed(model).names == ()
