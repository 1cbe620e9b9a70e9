"""Memory limit, precision, randomness: how a sum is computed may change its last bits, and never what it is."""

import math

import pytest
import torch
from torch import nn

from adadpigu_core import gradients
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import clipped_sum, engine, survey
from adadpigu_core.parameters import ParameterLayout


class Counting(nn.Module):
    """Writes down how many records every forward pass has seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x + self.body(x, x, x, need_weights=False)[0]).mean(1))


MODELS = {
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        (2, 6, 5),
    ),
    "attention": (Attention, (5, 4)),
}


@pytest.fixture(scope="module")
def case(built, records_of, reference_of, standardisation_of, clipping_norm_of):
    def make(name, count=40):
        model, records = built(MODELS[name][0]), records_of(MODELS[name][1], count)
        reference = reference_of(model, records)
        given = standardisation_of(reference, "most", "random", "layer")
        return model, records, given, clipping_norm_of(reference, given, "typical")

    return make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [1, 20_000, 10**12])
def test_a_memory_limit_changes_rounding_alone(case, cross_entropy, name, limit):
    model, records, given, norm = case(name)
    usual = clipped_sum(model, cross_entropy, records, given, norm)
    options = gradients.GradientOptions(memory_limit=limit)
    limited = clipped_sum(model, cross_entropy, records, given, norm, options=options)
    assert limited.norms.shape == (40,)
    assert torch.allclose(limited.norms, usual.norms, rtol=1e-5)
    assert float((limited.total - usual.total).norm()) <= 1e-5 * float(usual.norms.clamp(max=norm).sum())


@pytest.mark.parametrize("name", MODELS)
def test_a_memory_limit_and_views(agree, built, records_of, name):
    def views(features):
        return torch.stack([features, features.flip(-1), 0.5 * features], 1)

    options = gradients.GradientOptions(memory_limit=1)
    agree(built(MODELS[name][0]), records_of(MODELS[name][1], 5), augmentation=views, options=options)


def test_a_memory_limit_bounds_the_physical_batch(built, records_of, cross_entropy):
    counting = Counting()
    model = built(lambda: nn.Sequential(counting, nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    records = records_of((6,), 64)
    largest = {}
    for limit in (1, 10**12):
        counting.seen.clear()
        options = gradients.GradientOptions(memory_limit=limit)
        clipped_sum(model, cross_entropy, records, given, 1.0, options=options)
        assert sum(counting.seen) >= 64
        largest[limit] = max(counting.seen)
    assert largest[1] <= 8
    assert largest[10**12] == 64


@pytest.mark.parametrize(("megabytes", "expected"), [(1, 64), (6, 16), (12, 16), (64, 4), (1000, 1)])
def test_large_records_get_more_memory_up_to_a_bound(megabytes, expected):
    found = survey.Survey({}, megabytes * 2**20, channels_last=False, foreign=False)
    batches = engine._physical_batches(256, found, gradients.GradientOptions(), torch.device("cpu"))
    assert batches[0] == (0, expected)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_less_precise_and_holds_the_bound(case, cross_entropy, exact_norm, name):
    model, records, given, norm = case(name)
    usual = clipped_sum(model, cross_entropy, records, given, norm)
    options = gradients.GradientOptions(precision="bfloat16")
    half = clipped_sum(model, cross_entropy, records, given, norm, options=options)
    assert torch.allclose(half.norms, usual.norms, rtol=0.05)
    assert float((half.total - usual.total).norm()) <= 0.05 * float(usual.norms.clamp(max=norm).sum())
    for number in range(5):
        alone = records.select([number])
        total = clipped_sum(model, cross_entropy, alone, given, 0.1 * norm, options=options).total
        assert exact_norm(total) <= 0.1 * norm


# ---- randomness


def noisy():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 3))


def jitter(features):
    return features.unsqueeze(1) + torch.randn(len(features), 2, *features.shape[1:])


@pytest.mark.parametrize("views", [None, jitter])
def test_the_same_seed_gives_the_same_bits(built, records_of, cross_entropy, views):
    model, records = built(noisy).train(), records_of((6,), 20)
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(clipped_sum(model, cross_entropy, records, given, 0.5, augmentation=views))
    assert torch.equal(results[0].total, results[1].total)
    assert torch.equal(results[0].norms, results[1].norms)
    assert not torch.allclose(results[0].norms, results[2].norms, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_second_call_gives_the_same_bits(case, cross_entropy, name):
    model, records, given, norm = case(name)
    first, second = (clipped_sum(model, cross_entropy, records, given, norm) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert torch.equal(first.norms, second.norms)


@pytest.mark.parametrize("limit", [1, None, 10**12])
def test_dropout_is_drawn_anew_for_every_record(cross_entropy, limit):
    """Physical batches must not start from the same state either."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(60, 2, bias=False)).train()
    same = Records(torch.ones(32, 60), torch.zeros(32, dtype=torch.int64))
    options = gradients.GradientOptions(memory_limit=limit)
    given = Standardisation.identity(120)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = clipped_sum(model, cross_entropy, same, given, math.inf, options=options).norms
    assert len(set(norms.tolist())) > 24


def test_dropout_is_drawn_anew_for_every_view():
    """With one mask for all views, gradients would be zero in whole columns."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(200, 1, bias=False)).train()
    record = Records(torch.ones(1, 200), torch.zeros(1, dtype=torch.int64))

    def eight(features):
        return features.unsqueeze(1).expand(-1, 8, -1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        total = clipped_sum(
            model, lambda out, _: out.sum(1), record, Standardisation.identity(200), math.inf, augmentation=eight
        ).total
    assert float((total == 0).float().mean()) < 0.05
    assert len(total.unique()) > 4


def test_forward_and_backward_drop_the_same():
    """The gradient in column j is 2 x_j e if feature j was kept, else zero, and e tells which features were kept."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(30, 1, bias=False)).train()
    generator = torch.Generator().manual_seed(0)
    # of one sign, as the features are, so that their product does not cancel to rounding
    nn.init.uniform_(model[1].weight, 0.5, 1.0, generator=generator)
    features = torch.rand(1, 30, generator=generator) + 0.1
    record = Records(features, torch.zeros(1, dtype=torch.int64))

    def loss(outputs, labels):
        return 0.5 * outputs.square().sum(1)

    for seed in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            total = clipped_sum(model, loss, record, Standardisation.identity(30), math.inf).total.double()
        kept = total != 0
        assert 3 < int(kept.sum()) < 27
        dropped_out = torch.where(kept, 2 * features[0].double(), 0.0)
        output = float(model[1].weight.detach()[0].double() @ dropped_out)
        assert torch.allclose(total, output * dropped_out, rtol=1e-5)


@pytest.mark.parametrize("layer", ["encoder", "gru"])
def test_dropout_inside_of_layers(cross_entropy, layer):
    """Layers that draw their dropout themselves draw it anew for every record and leave it out in evaluation."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            if layer == "encoder":
                self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
            else:
                self.body = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.body(x)
            return self.head((x[0] if layer == "gru" else x).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
        same = Records(torch.randn(1, 5, 4).expand(16, -1, -1).clone(), torch.zeros(16, dtype=torch.int64))
        given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
        drawn = clipped_sum(model.train(), cross_entropy, same, given, math.inf).norms
        quiet = clipped_sum(model.eval(), cross_entropy, same, given, math.inf).norms
    assert len(set(drawn.tolist())) > 12
    assert torch.allclose(quiet, quiet[:1].expand(16), rtol=1e-5)
