from dataclasses import replace

import pytest
import torch

from adadpigu_core.accounting import Event
from adadpigu_core.adaptive_clipping import AdaptiveClipping, FixedStatistics, RunningStatistics
from adadpigu_core.exceptions import BudgetError, ConfigurationError
from adadpigu_core.gradients import cross_entropy
from adadpigu_core.importance import importance_of
from adadpigu_core.local_training import train_round
from adadpigu_core.parameters import ParameterLayout, assign, flatten
from adadpigu_core.private_step import Mechanism, private_step
from adadpigu_core.sampling import SeededRandomness

D = 53  # of the mlp
MECHANISM = Mechanism("training", 1.0, 0.5, 0.5, 16)
EVERYTHING = torch.ones(D, dtype=torch.bool)
HALF = torch.arange(D) % 2 == 0


@pytest.fixture
def model(make_model):
    return make_model("mlp")


@pytest.fixture
def records(make_records):
    return make_records("mlp", 16)


def accept(event):
    pass


def train(
    model, records, randomness, *, mask=EVERYTHING, statistics=None, charge=accept, mechanism=MECHANISM, **options
):
    statistics = statistics or FixedStatistics.neutral(D)
    options = {"steps": 1, "learning_rate": 0.5, **options}
    return train_round(model, cross_entropy, records, mechanism, mask, statistics, randomness, charge, **options)


def loop(model, records, randomness, steps, *, mask=EVERYTHING, statistics=None):
    """Centralised training: private steps, and nothing else."""
    statistics = statistics or FixedStatistics.neutral(D)
    releases = []
    for _ in range(steps):
        release, statistics, _ = private_step(
            model, cross_entropy, records, MECHANISM, mask, statistics, randomness, accept
        )
        assign(model, flatten(model) - 0.5 * release.gradient)
        releases.append(release)
    return releases, statistics


@pytest.mark.parametrize("rule", ["none", "energy", "paper"])
@pytest.mark.parametrize("mask", [EVERYTHING, HALF], ids=["all", "half"])
@pytest.mark.parametrize("steps", [1, 5])
def test_rounds_of_one_client_are_centralised_training(make_model, records, rule, mask, steps):
    """Bit by bit: five steps as five rounds of one, as one round of five, and without rounds."""
    layout = ParameterLayout.of(make_model("mlp"))
    start = RunningStatistics.neutral(AdaptiveClipping(rule=rule), layout)
    federated, central = make_model("mlp"), make_model("mlp")
    randomness, statistics = SeededRandomness(3), start
    for _ in range(5 // steps):
        statistics = train(federated, records, randomness, mask=mask, statistics=statistics, steps=steps).statistics
    _, expected = loop(central, records, SeededRandomness(3), 5, mask=mask, statistics=start)
    assert torch.equal(flatten(federated), flatten(central))
    assert torch.equal(statistics.moment, expected.moment)
    assert torch.equal(statistics.mean, expected.mean)


def test_a_server_that_adds_the_update_has_the_weights_of_the_client(make_model, records):
    """To float32 rounding, because (w + u) - w is not u."""
    model = make_model("mlp")
    start = flatten(model)
    update = train(model, records, SeededRandomness(3), steps=4).update
    assert torch.allclose(start + update, flatten(model), atol=1e-6)
    assert torch.equal(update, flatten(model) - start)


def test_the_update_is_the_learning_rate_times_the_releases(make_model, records):
    update = train(make_model("mlp"), records, SeededRandomness(3), steps=3, learning_rate=0.5).update
    releases, _ = loop(make_model("mlp"), records, SeededRandomness(3), 3)
    assert torch.allclose(update, -0.5 * sum(release.gradient for release in releases), atol=1e-6)


def test_frozen_weights_stay_where_they_are(model, records):
    before = flatten(model)
    result = train(model, records, SeededRandomness(3), mask=HALF, steps=5)
    assert torch.equal(flatten(model)[~HALF], before[~HALF])
    assert bool((flatten(model) != before)[HALF].all())
    assert torch.equal(result.update != 0, HALF)


def test_every_step_is_charged(model, records):
    events = []
    train(model, records, SeededRandomness(3), steps=4, charge=events.append)
    assert events == [Event("training", 0.5, 0.5, 1)] * 4


def test_a_refusal_ends_the_round_without_an_update(model, records, recording):
    events = []

    def charge(event):
        if len(events) == 2:
            raise BudgetError("nothing is left")
        events.append(event)

    randomness = recording(3)
    with pytest.raises(BudgetError):
        train(model, records, randomness, steps=4, charge=charge)
    assert randomness.calls.count("normal") == 2, "as many releases as charges"


def test_no_importance_unless_asked_for(model, records):
    assert train(model, records, SeededRandomness(3)).importance is None


@pytest.mark.parametrize("measure", ["magnitude", "energy"])
@pytest.mark.parametrize("steps", [1, 4])
def test_importance_is_the_mean_score_of_the_releases(make_model, records, measure, steps):
    result = train(make_model("mlp"), records, SeededRandomness(3), steps=steps, importance_measure=measure)
    releases, _ = loop(make_model("mlp"), records, SeededRandomness(3), steps)
    scores = [importance_of(release.gradient, MECHANISM.noise_stddev, measure) for release in releases]
    assert torch.allclose(result.importance, torch.stack(scores).mean(0), atol=1e-6)
    assert result.importance.dtype == torch.float32


def test_an_unknown_measure_is_refused(model, records):
    with pytest.raises(ConfigurationError, match=r"importance\.measure"):
        train(model, records, SeededRandomness(3), importance_measure="loudness")


def test_asking_for_importance_changes_nothing_else(make_model, records):
    one = train(make_model("mlp"), records, SeededRandomness(3), steps=2)
    other = train(make_model("mlp"), records, SeededRandomness(3), steps=2, importance_measure="energy")
    assert torch.equal(one.update, other.update)


def test_statistics_pass_from_step_to_step(make_model, records):
    """Two rounds that differ only in whether the second step knows what the first has learnt."""
    layout = ParameterLayout.of(make_model("mlp"))
    start = RunningStatistics.neutral(AdaptiveClipping(rule="energy", granularity="coordinate"), layout)
    quiet = replace(MECHANISM, noise_multiplier=0.05)  # where noise dominates, nothing is there to be learnt
    acting = make_model("mlp")
    train(acting, records, SeededRandomness(3), steps=2, statistics=start, mechanism=quiet)
    forgetful, randomness = make_model("mlp"), SeededRandomness(3)
    for _ in range(2):
        train(forgetful, records, randomness, steps=1, statistics=start, mechanism=quiet)
    assert not torch.allclose(flatten(acting), flatten(forgetful), atol=1e-3)


def test_a_learning_rate_of_zero_moves_nothing(model, records):
    before = flatten(model)
    result = train(model, records, SeededRandomness(3), steps=2, learning_rate=0.0)
    assert torch.equal(flatten(model), before)
    assert not result.update.any()
