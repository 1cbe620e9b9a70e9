"""Whole runs with the engine are those with the simple one, and without any of our additions they are Opacus'."""

import warnings

import pytest
import torch
from torch import nn

from adadpigu_core import private_step
from adadpigu_core.adaptive_clipping import AdaptiveClipping, FixedStatistics, RunningStatistics, Standardisation
from adadpigu_core.gradients import ClippedSum, clipped_sum, simple
from adadpigu_core.local_training import train_round
from adadpigu_core.parameters import ParameterLayout, flatten
from adadpigu_core.private_step import Mechanism
from adadpigu_core.sampling import SeededRandomness


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.words(x.long())
        return self.head((x + torch.tanh(self.body(self.norm(x)))).mean(1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x + self.body(x, x, x, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    """Words and classes share a table, and a layer is called twice."""

    def __init__(self):
        super().__init__()
        self.words, self.body = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.body(torch.tanh(self.body(self.words(x.long()).mean(1)))))
        return nn.functional.linear(x, self.words.weight[:3])


MODELS = {
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 2), Mean(), nn.Linear(4, 3)
        ),
        (2, 6, 5),
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 3)),
        (5, 4),
    ),
    "words": (Reader, (5,)),
    "attention": (Attending, (5, 4)),
    "tied": (Tied, (5,)),
    "other filters": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, groups=2, padding=2, dilation=2),
            nn.InstanceNorm1d(4, affine=True),
            nn.Tanh(),
            nn.ConvTranspose1d(4, 6, 2, stride=2),
            nn.Flatten(),
            nn.Linear(60, 3),
        ),
        (4, 5),
    ),
}
OPACUS_HAS = [name for name in MODELS if name not in ("attention", "tied")]  # no such layer, no function of a weight
STATISTICS = ("neutral", "fixed", "energy", "paper")


@pytest.fixture(scope="module")
def case(built, records_of):
    def make(name, count=24):
        return built(MODELS[name][0]), records_of(
            MODELS[name][1], count, tokens=9 if name in ("words", "tied") else None
        )

    return make


def statistics_for(rule, layout):
    generator = torch.Generator().manual_seed(1)
    d = layout.num_parameters
    if rule == "neutral":
        return FixedStatistics.neutral(d)
    if rule == "fixed":
        mean = 0.1 * torch.randn(d, generator=generator)
        return FixedStatistics(mean, 10 ** (2 * torch.rand(d, generator=generator) - 1))
    return RunningStatistics.neutral(AdaptiveClipping(rule=rule, centre=True), layout)


def run(model, records, rule, retained, loss, seed=3, noise_multiplier=0.5):
    """Ten private steps; give the weights and the statistics that they end with."""
    layout = ParameterLayout.of(model)
    d = layout.num_parameters
    mask = torch.rand(d, generator=torch.Generator().manual_seed(2)) < retained
    mechanism = Mechanism("training", 0.5, noise_multiplier, 0.5, len(records))
    statistics = statistics_for(rule, layout)
    randomness = SeededRandomness(seed)
    update = train_round(
        model, loss, records, mechanism, mask, statistics, randomness, lambda event: None, steps=10, learning_rate=0.2
    )
    standardisation = update.statistics.standardisation(mask)
    return flatten(model), standardisation.mean, standardisation.scale


def by_the_simple_engine(model, loss, records, standardisation, clipping_norm, **ignored):
    return simple.clipped_sum(model, loss, records, standardisation, clipping_norm)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func, about attention
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", STATISTICS)
@pytest.mark.parametrize("retained", [0.3, 1.0])
def test_a_run_is_that_of_the_simple_engine(monkeypatch, case, cross_entropy, name, rule, retained):
    """Mostly: where the noise explains nearly all of a layer's energy, its scale magnifies rounding a hundred times."""
    apart = []
    for seed in (3, 4, 5):
        model, records = case(name)
        before = flatten(model)
        ours = run(model, records, rule, retained, cross_entropy, seed)
        other, records = case(name)
        with monkeypatch.context() as patch:
            patch.setattr(private_step, "clipped_sum", by_the_simple_engine)
            theirs = run(other, records, rule, retained, cross_entropy, seed)
        moved = float((theirs[0] - before).norm())
        assert moved > 0.05
        distances = [float((ours[0] - theirs[0]).norm()) / (1e-5 * moved)]
        for one, two in zip(ours[1:], theirs[1:], strict=True):
            distances.append(float(((one - two).abs() / (1e-4 * two.abs() + 1e-5 * two.abs().max() + 1e-30)).max()))
        apart.append(max(distances))
    assert sorted(apart)[1] <= 1


def test_runs_that_differ_are_told_apart(monkeypatch, case, cross_entropy):
    """Negative control: sums that are larger by a ten-thousandth would be seen."""
    model, records = case("vectors")
    before = flatten(model)
    ours = run(model, records, "neutral", 1.0, cross_entropy)[0]

    def larger(*arguments, **ignored):
        result = by_the_simple_engine(*arguments)
        return ClippedSum(1.0001 * result.total, result.norms)

    other, records = case("vectors")
    monkeypatch.setattr(private_step, "clipped_sum", larger)
    theirs = run(other, records, "neutral", 1.0, cross_entropy)[0]
    assert float((ours - theirs).norm()) > 1e-5 * float((theirs - before).norm())


@pytest.fixture(scope="module")
def by_opacus():
    """Sum of clipped gradients as Opacus computes it, float64 [d]."""
    from opacus.grad_sample import GradSampleModule  # noqa: PLC0415 - slow to import
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415 - the same

    def clipped(model, loss, records, clipping_norm):
        wrapped = GradSampleModule(model, loss_reduction="sum")
        optimiser = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=clipping_norm,
            expected_batch_size=len(records),
            loss_reduction="sum",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own hooks
            loss(wrapped(records.features), records.labels).sum().backward()
        optimiser.clip_and_accumulate()
        return torch.cat([p.summed_grad.reshape(-1) for p in wrapped.parameters()]).double()

    return clipped


@pytest.mark.parametrize("name", OPACUS_HAS)
@pytest.mark.parametrize("clipping_norm", [0.05, 0.5, 2.0, 1e4])
@pytest.mark.parametrize("count", [1, 9])
def test_without_mask_mean_and_scale_it_is_the_sum_of_opacus(
    case, cross_entropy, by_opacus, name, clipping_norm, count
):
    """It adds 1e-6 to norms before it divides by them, so factors differ by that much relative to the norm."""
    model, records = case(name, count)
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    ours = clipped_sum(model, cross_entropy, records, given, clipping_norm)
    theirs = by_opacus(model, cross_entropy, records, clipping_norm)
    contributed = ours.norms.clamp(max=clipping_norm)
    allowed = (1e-5 * contributed + 1e-6 * contributed / ours.norms).sum()
    assert float((ours.total - theirs).norm()) <= float(allowed)
