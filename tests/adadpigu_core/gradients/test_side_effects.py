"""A call leaves nothing behind, not even one that fails halfway."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from adadpigu_core.datasets import Records
from adadpigu_core.gradients import clipped_sum


class Network(nn.Module):
    """Layers of many kinds, one of them called twice, a parameter of its own and dropout, over [n, 5, 4]."""

    def __init__(self):
        super().__init__()
        self.scale, self.spare = nn.Parameter(torch.ones(4)), nn.Linear(2, 2)
        self.first, self.norm, self.convolution = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(5, 5, 1, groups=5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.slopes, self.drop, self.head = nn.PReLU(4), nn.Dropout(0.1), nn.Linear(4, 3)
        self.register_buffer("offset", torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        x = self.convolution(self.first(self.first(x)) * self.scale + self.offset)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0] + self.frozen(x))
        return self.head(self.drop(self.slopes(x.transpose(1, 2)).mean(2)))


@pytest.fixture
def case(built, records_of, reference_of, standardisation_of):
    model, records = built(Network), records_of((5, 4), 6)
    model.train()
    model.norm.eval()
    given = standardisation_of(reference_of(copy.deepcopy(model).eval(), records), "most", "random", "unit")
    return model, records, given


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def traces(model):
    """Everything about a model that a call could change, in a form that can be compared."""
    state = {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forward": [module.forward.__func__ for module in model.modules()],
        "hooks": [[len(getattr(module, hook)) for hook in HOOKS] for module in model.modules()],
        "parameters": [(name, id(p), type(p), p.requires_grad, p.is_leaf) for name, p in model.named_parameters()],
        "tensor hooks": [bool(p._backward_hooks) for p in model.parameters()],
        "attributes of tensors": [sorted(vars(p)) for p in model.parameters()],
        "gradients": [None if p.grad is None else id(p.grad) for p in model.parameters()],
        "global hooks": [len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_backward_hooks)],
        "grad mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }
    values = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return state, values, gradients, [t._version for t in model.parameters()]


def unchanged(model, before):
    state, values, gradients, versions = traces(model)
    assert state == before[0]
    assert versions == before[3], "weights were written to"
    for now, then in zip(values + gradients, before[1] + before[2], strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("clipping_norm", [0.1, math.inf])
def test_the_model_is_left_as_it_is(case, cross_entropy, with_gradients, clipping_norm):
    model, records, given = case
    if with_gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
    before = traces(model)
    features, labels = records.features.clone(), records.labels.clone()
    clipped_sum(model, cross_entropy, records, given, clipping_norm)
    unchanged(model, before)
    assert torch.equal(records.features, features)
    assert torch.equal(records.labels, labels)


def test_the_statistics_are_left_as_they_are(case, cross_entropy):
    model, records, given = case
    before = [t.clone() for t in (given.mask, given.mean, given.scale)]
    clipped_sum(model, cross_entropy, records, given, 0.1)
    assert all(torch.equal(a, b) for a, b in zip((given.mask, given.mean, given.scale), before, strict=True))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("in the backward pass")


def failing_loss(outputs, labels):
    raise KeyError("in the loss")


def failing_backward(outputs, labels):
    return Fails.apply(outputs).sum(1)


def failing_views(features):
    raise KeyError("in the augmentation")


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "augmentation"])
def test_a_call_that_fails_leaves_the_model_as_it_is(case, cross_entropy, where):
    model, records, given = case
    loss = {"loss": failing_loss, "backward": failing_backward}.get(where, cross_entropy)
    views = failing_views if where == "augmentation" else None
    if where == "forward":
        model.head = nn.Linear(5, 3)  # of the wrong size
        given = type(given)(*(torch.cat([t, t[:3]]) for t in (given.mask, given.mean, given.scale)))
    before = traces(model)
    with pytest.raises(Exception, match=r"in the|mat1 and mat2|shape"):
        clipped_sum(model, loss, records, given, 0.1, augmentation=views)
    unchanged(model, before)
    assert math.isfinite(float(model(records.features).detach().sum() if where != "forward" else 0.0))


def test_after_a_call_that_failed_the_next_is_right(case, cross_entropy):
    model, records, given = case
    model.eval()
    expected = clipped_sum(model, cross_entropy, records, given, 0.1)
    for loss in (failing_loss, failing_backward):
        with pytest.raises(Exception, match="in the"):
            clipped_sum(model, loss, records, given, 0.1)
        again = clipped_sum(model, cross_entropy, records, given, 0.1)
        assert torch.equal(again.total, expected.total)


def test_the_model_can_be_copied_and_sent(case, cross_entropy):
    """And a copy is a model of its own: the original takes no part in it."""
    model, records, given = case
    model.eval()
    expected = clipped_sum(model, cross_entropy, records, given, 0.1)
    copied = copy.deepcopy(model)
    sent = pickle.loads(pickle.dumps(model))
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    assert torch.equal(clipped_sum(copied, cross_entropy, records, given, 0.1).total, expected.total)
    assert torch.equal(clipped_sum(sent, cross_entropy, records, given, 0.1).total, expected.total)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(records.features).any()
    assert torch.equal(clipped_sum(model, cross_entropy, records, given, 0.1).total, expected.total)


def test_ordinary_training_goes_on_afterwards(case, cross_entropy):
    model, records, given = case
    model.eval()
    fresh = copy.deepcopy(model)
    clipped_sum(model, cross_entropy, records, given, 0.1)
    for other in (model, fresh):
        cross_entropy(other(records.features), records.labels).sum().backward()
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


# ---- surroundings


def test_where_gradients_are_switched_off(case, cross_entropy):
    model, records, given = case
    model.eval()
    usual = clipped_sum(model, cross_entropy, records, given, 0.1)
    with torch.no_grad():
        off = clipped_sum(model, cross_entropy, records, given, 0.1)
        assert not torch.is_grad_enabled()
    assert torch.equal(usual.total, off.total)
    assert torch.equal(usual.norms, off.norms)


def test_with_another_default_type(case, cross_entropy):
    model, records, given = case
    model.eval()
    usual = clipped_sum(model, cross_entropy, records, given, 0.1)
    torch.set_default_dtype(torch.float64)
    try:
        result = clipped_sum(model, cross_entropy, records, given, 0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.total.dtype == result.norms.dtype == torch.float64
    assert torch.allclose(result.norms, usual.norms, rtol=1e-5)
    assert float((result.total - usual.total).norm()) <= 1e-5 * 0.6


def test_with_features_that_require_a_gradient(case, cross_entropy):
    model, records, given = case
    model.eval()
    usual = clipped_sum(model, cross_entropy, records, given, 0.1)
    features = records.features.clone().requires_grad_()
    result = clipped_sum(model, cross_entropy, Records(features, records.labels), given, 0.1)
    assert features.grad is None
    assert not result.total.requires_grad
    assert float((result.total - usual.total).norm()) <= 1e-5 * 0.6


def test_with_features_that_are_a_view(case, cross_entropy):
    """Strided, as a slice of a larger tensor is."""
    model, records, given = case
    model.eval()
    usual = clipped_sum(model, cross_entropy, records, given, 0.1)
    wide = torch.zeros(12, 5, 8)
    wide[::2, :, ::2] = records.features
    result = clipped_sum(model, cross_entropy, Records(wide[::2, :, ::2], records.labels), given, 0.1)
    assert torch.allclose(result.norms, usual.norms, rtol=1e-5)


# ---- memory


def living_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_fifty_calls_keep_no_tensor(case, cross_entropy):
    model, records, given = case
    for _ in range(3):
        clipped_sum(model, cross_entropy, records, given, 0.1)
    before = living_tensors()
    for _ in range(50):
        clipped_sum(model, cross_entropy, records, given, 0.1)
    assert living_tensors() <= before + 5


class Watched(nn.Module):
    """Keeps weak references to what passes through it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.seen = nn.Linear(4, 4), nn.Linear(4, 3), []

    def forward(self, x):
        hidden = self.first(x)
        bent = torch.tanh(hidden)
        self.seen += [weakref.ref(hidden), weakref.ref(bent)]
        return self.second(bent)


@pytest.mark.parametrize("fails", [False, True])
def test_activations_die(built, records_of, reference_of, standardisation_of, cross_entropy, fails):
    model, records = built(Watched), records_of((4,), 4)
    given = standardisation_of(reference_of(model, records), "full", "random", "unit")
    model.seen.clear()
    if fails:
        with pytest.raises(Exception, match="in the"):
            clipped_sum(model, failing_backward, records, given, 0.1)
    else:
        result = clipped_sum(model, cross_entropy, records, given, 0.1)
        assert result.total.grad_fn is None
    gc.collect()
    assert model.seen
    assert [reference() for reference in model.seen if reference() is not None] == []
