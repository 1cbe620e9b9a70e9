"""Models that mix or move records only for some values, weights, directions or layouts, and rounding that cancels."""

import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import GradientOptions, check_model, clipped_sum, cross_entropy
from adadpigu_core.parameters import ParameterLayout

CLASSES = 3


class Model(nn.Module):
    """A function of a model's parts and its records."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def sorted_by_length(model, x):
    tokens = x.long()
    order = torch.argsort((tokens != 0).sum(1), descending=True)
    hidden = torch.tanh(model.first(model.table(tokens).sum(1)[order]))
    return model.last(hidden[torch.argsort(order)])


def trimmed_to_the_longest(model, x):
    tokens = x.long()
    longest = int((tokens != 0).sum(1).max().clamp(min=1))
    return model.last(model.table(tokens[:, :longest]).mean(1))


def scaled_by_the_largest(model, x):
    return model.last((x / x.abs().max()).flatten(1))


def sorted_by_signs(model, x):
    order = torch.argsort((x < 0).sum(1), stable=True)
    return model.last(torch.tanh(model.first(x[order]))[torch.argsort(order)])


def mixed_now_and_then(model, x):
    if model.training and torch.rand(()) < 0.3:
        x = 0.6 * x + 0.4 * x.roll(1, 0)
    return model.last(x)


def clipped_backwards(model, x):
    hidden = torch.tanh(model.first(x))
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient * (5 / (gradient.norm() + 1e-6)).clamp(max=1))
    return model.last(hidden)


def behind_closed_gates(model, x):
    mixed = model.first(x)
    return model.last(x + model.gate * model.closed(mixed - mixed.mean(0)))


def closed_gates():
    closed, gate = nn.Linear(6, 6, bias=False), nn.Parameter(torch.zeros(()))
    nn.init.zeros_(closed.weight)
    return Model(behind_closed_gates, first=nn.Linear(6, 6), last=nn.Linear(6, CLASSES), closed=closed, gate=gate)


class Clipped(torch.autograd.Function):
    """A batch's gradients, scaled by their norm."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (5 / (gradient.norm() + 1e-6)).clamp(max=1)


def clipped_by_a_function(model, x):
    return model.last(Clipped.apply(torch.tanh(model.first(x))))


def clipped_in_the_graph(model, x):
    hidden = torch.tanh(model.first(x))
    if hidden.grad_fn is not None:
        hidden.grad_fn.register_prehook(lambda g: (g[0] * (5 / (g[0].norm() + 1e-6)).clamp(max=1),))
    return model.last(hidden)


def behind_a_switch(model, x):
    if model.switch > 0:
        x = x - x.mean(0)
    return model.last(x)


def switched():
    model = Model(behind_a_switch, last=linear())
    model.register_buffer("switch", torch.zeros(()))
    return model


def remembering(model, x):
    model.seen += x.mean(0).detach()
    return model.last(x - model.seen)


def counting(model, x):
    model.calls += 1
    return model.last(x) * (-1) ** model.calls


def counted():
    model = Model(counting, last=linear())
    model.calls = 0
    return model


def scaled_in_training(model, x):
    hidden = torch.tanh(model.first(x))
    return model.last(Clipped.apply(hidden) if model.training else hidden)


def behind_a_negative_gate(model, x):
    hidden = model.first(x)
    return model.last(hidden + torch.relu(model.gate) * hidden.detach().mean(0))


def negative_gate():
    model = Model(behind_a_negative_gate, first=linear(6, 6), last=linear())
    model.register_buffer("gate", torch.tensor([-1.0]))
    return model


def only_together(model, x):
    if model.training and len(x) < 2:
        raise ValueError("one record is too few")
    return model.last(x)


def with_memory():
    model = Model(remembering, last=linear())
    model.register_buffer("seen", torch.zeros(6))
    return model


def by_experts(model, x):
    """Which layer a record meets depends on it, so that a layer sees some of the records."""
    outputs = torch.zeros(len(x), CLASSES)
    for expert, chosen in ((model.first, x[:, 0] >= 0), (model.last, x[:, 0] < 0)):
        numbers = chosen.nonzero().flatten()
        if len(numbers):
            outputs = outputs.index_add(0, numbers, expert(x[numbers]))
    return outputs


def watched():
    layer = nn.Linear(6, 6)
    layer.register_full_backward_hook(lambda *_: None)
    return nn.Sequential(layer, nn.Linear(6, CLASSES))


def linear(inputs=6, outputs=CLASSES):
    return nn.Linear(inputs, outputs)


HIDDEN = {
    "sorted by length": (
        lambda: Model(sorted_by_length, table=nn.Embedding(8, 4), first=linear(4, 5), last=linear(5)),
        (6,),
    ),
    "trimmed to the longest": (
        lambda: Model(trimmed_to_the_longest, table=nn.Embedding(8, 4, padding_idx=0), last=linear(4)),
        (40,),
    ),
    "scaled by the largest": (lambda: Model(scaled_by_the_largest, last=linear(12288)), (3, 64, 64)),
    "sorted by signs": (lambda: Model(sorted_by_signs, first=linear(6, 6), last=linear()), (6,)),
    "mixed now and then": (lambda: Model(mixed_now_and_then, last=linear()), (6,)),
    "clipped backwards": (lambda: Model(clipped_backwards, first=linear(6, 6), last=linear()), (6,)),
    "behind closed gates": (closed_gates, (6,)),
    "counted": (counted, (6,)),
    "scaled in training": (lambda: Model(scaled_in_training, first=linear(6, 6), last=linear()), (6,)),
    "behind a negative gate": (negative_gate, (6,)),
    "only together": (lambda: Model(only_together, last=linear()), (6,)),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(linear(6, 6)), linear()), (6,)),
    "by experts": (lambda: Model(by_experts, first=linear(), last=linear()), (6,)),
    "watched": (watched, (6,)),
    "clipped by a function": (lambda: Model(clipped_by_a_function, first=linear(6, 6), last=linear()), (6,)),
    "clipped in the graph": (lambda: Model(clipped_in_the_graph, first=linear(6, 6), last=linear()), (6,)),
    "behind a switch": (switched, (6,)),
    "with memory": (with_memory, (6,)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_made_up_records_hid_is_refused_before_a_run(built, remedy, name):
    make, shape = HIDDEN[name]
    with pytest.raises(ModelError) as refused:
        check_model(built(make), cross_entropy, shape, CLASSES)
    assert remedy.search(str(refused.value))


def picked(model, x):
    """The last word of each text: rows are chosen, but each stays where it is."""
    tokens = x.long()
    last = (tokens != 0).sum(1).clamp(min=1) - 1
    return model.last(model.table(tokens)[torch.arange(len(x)), last])


class Positions(nn.Module):  # without a rule, so that the table with padding needs copies, too
    def __init__(self, padding):
        super().__init__()
        self.table, self.last = nn.Embedding(12, 6, padding_idx=padding), linear(6)
        self.positions = nn.Parameter(torch.randn(16, 6) / 2)

    def forward(self, x):
        return self.last(torch.tanh(self.table(x.long()) + self.positions[: x.shape[1]]).mean(1))


class Scaled(nn.Module):
    """Has a parameter that must stay positive."""

    def __init__(self):
        super().__init__()
        self.size, self.last = nn.Parameter(torch.ones(6)), linear()

    def forward(self, x):
        return self.last(x * self.size.sqrt())


def mean_over_words(model, x):
    """Without words there is no mean: 0 / 0."""
    tokens = x.long()
    there = (tokens != 0).unsqueeze(2)
    return model.last((model.table(tokens) * there).sum(1) / there.sum(1))


def frozen_spectral_norm():
    """Its buffers move with every call, which must not matter."""
    layer = nn.utils.parametrizations.spectral_norm(linear(6, 6))
    return nn.Sequential(layer.requires_grad_(False), nn.Tanh(), linear())


def instances():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), linear(144))


def sines(model, x):
    return model.last(torch.sin(30 * model.first(x)))


HARMLESS = {
    "padding at 0": (lambda: Positions(0), (6,)),
    "padding at 11": (lambda: Positions(11), (6,)),
    "positive": (Scaled, (6,)),
    "mean over words": (lambda: Model(mean_over_words, table=nn.Embedding(8, 4), last=linear(4)), (6,)),
    "instances": (instances, (3, 8, 8)),
    "frozen spectral norm": (frozen_spectral_norm, (6,)),
    "sines": (
        lambda: Model(lambda model, x: model.last(torch.sin(30 * model.first(x))), first=linear(6, 6), last=linear()),
        (6,),
    ),
    "picked": (lambda: Model(picked, table=nn.Embedding(8, 4), last=linear(4)), (6,)),
    "logarithms": (lambda: Model(lambda model, x: model.last(x.log()), last=linear()), (6,)),
    "own scale": (lambda: Model(lambda model, x: model.last(x / x.abs().amax(1, keepdim=True)), last=linear()), (6,)),
    "dropout": (lambda: nn.Sequential(nn.Flatten(), linear(12), nn.Dropout()), (3, 4)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_treats_each_record_by_itself_is_taken(built, name):
    make, shape = HARMLESS[name]
    check_model(built(make), cross_entropy, shape, CLASSES)


RUNNING = {
    "added up over records": lambda x: torch.cumsum(x, 0),
    "the record before": lambda x: x + torch.cat([torch.zeros_like(x[:1]), x[:-1]]),
}


@pytest.mark.parametrize("padding", [0, 5, 11, -1])
def test_padding_beside_positions_without_a_rule(agree, built, records_of, padding):
    agree(built(lambda: Positions(padding)), records_of((6,), 6, tokens=12))


@pytest.mark.parametrize("name", RUNNING)
def test_the_engine_refuses_what_looks_back(built, records_of, name):
    look, records = RUNNING[name], records_of((6,), 5)
    parts = {"first": linear(6, 6), "last": linear()}
    model = built(lambda: Model(lambda model, x: model.last(look(model.first(x))), **parts))
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    with pytest.raises(ModelError):
        clipped_sum(model, cross_entropy, records, given, 1.0)


class Cell(nn.Module):
    """A cell without a rule, whose state has its layers first."""

    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(6, 5) / 2), nn.Parameter(torch.randn(5, 5) / 2)

    def forward(self, x, state):
        return torch.tanh(x @ self.w + state[0] @ self.u).unsqueeze(0)


def test_a_state_whose_layers_come_first(agree, built, records_of):
    model = built(
        lambda: Model(lambda model, x: model.last(model.cell(x, x[:, :5].unsqueeze(0))[0]), cell=Cell(), last=linear(5))
    )
    agree(model, records_of((6,), 4))


class Reversed(torch.autograd.Function):
    """Gradient reversal that changes what it is given in place, which other layers hold on to."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(-10)


def test_gradients_that_are_changed_in_place_are_those_of_the_norm(agree, built, records_of):
    def function(model, x):
        return model.last(Reversed.apply(model.first(x)) + model.other(x))

    class Model(nn.Module):  # its function in place of an attribute, so that it can be copied
        def __init__(self):
            super().__init__()
            self.first, self.other, self.last = linear(6, 6), linear(6, 6), linear()

        def forward(self, x):
            return function(self, x)

    agree(built(Model), records_of((6,), 5))


def test_complex_data(agree, built, records_of):
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(4)), linear()

        def forward(self, x):
            return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6))

    agree(built(Filter), records_of((6,), 5))


def test_a_module_without_rule_keeps_its_own_forward(built, records_of):
    model = built(lambda: nn.Sequential(nn.Bilinear(1, 1, 1), linear(1)))
    model[0].forward = lambda x: torch.tanh(nn.functional.bilinear(x[:, :1], x[:, 1:2], model[0].weight, model[0].bias))
    own, records = model[0].forward, records_of((6,), 5)
    before = model(records.features)
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    clipped_sum(model, cross_entropy, records, given, 1.0)
    assert model[0].forward is own
    assert torch.equal(model(records.features), before)


class Tutorial(nn.Module):
    """A network as in many a tutorial: it views its images as vectors, which other layouts do not allow."""

    def __init__(self):
        super().__init__()
        self.filters, self.last = nn.Conv2d(2, 4, 3), linear(16)

    def forward(self, x):
        return self.last(nn.functional.max_pool2d(self.filters(x), 2).view(-1, 16))


def test_images_that_are_viewed_as_vectors(agree, built, records_of):
    check_model(built(Tutorial), cross_entropy, (2, 6, 6), CLASSES)
    agree(built(Tutorial), records_of((2, 6, 6), 5))


def test_buffers_that_move_with_every_call_carry_nothing_from_batch_to_batch(built, records_of):
    """How often a model is called depends on how many records were drawn, and on failures among them."""
    model, records = built(frozen_spectral_norm).train(), records_of((6,), 64)
    before = [buffer.clone() for buffer in model.buffers()]
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    together = clipped_sum(model, cross_entropy, records, given, 0.1)
    apart = clipped_sum(model, cross_entropy, records, given, 0.1, options=GradientOptions(memory_limit=1))
    again = clipped_sum(model, cross_entropy, records, given, 0.1)
    assert torch.allclose(together.total, apart.total, rtol=1e-4, atol=1e-6)
    assert torch.equal(together.total, again.total)
    assert len(before) > 0
    assert all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))
