import math
from dataclasses import replace

import pytest

from adadpigu_core.accounting import NoiseSchedule, calibrate, epsilon
from adadpigu_core.client_list import ClientEntry
from adadpigu_core.exceptions import BudgetError, ConfigurationError
from adadpigu_core.planning import (
    Terms,
    most_rounds,
    noise_to_clipping,
    plan_epsilon,
    plan_noise,
    releases,
    smallest_sampling,
)
from adadpigu_core.weights import marginal_values, noise_of_mean

TERMS = Terms(40, 1, 0.1, 0.1, 0.2, NoiseSchedule(), 1e-5)
FEW = (ClientEntry("north", 1200, 8.0), ClientEntry("south", 300, 0.5), ClientEntry("west", 700, 2.0))
MANY = tuple(ClientEntry(f"site-{i}", 100 + 7 * i, 0.3 * 1.06**i) for i in range(60))


def test_few_clients_get_the_very_plans_that_they_will_make():
    plan = plan_noise(FEW, TERMS)
    for one in plan.clients:
        assert one.plan == calibrate(TERMS.shape, one.client.target_epsilon, 1e-5)
        assert len(one.epsilons) == 40
        assert 0.99 * one.client.target_epsilon < one.epsilon <= one.client.target_epsilon
    assert not plan.in_levels


@pytest.mark.parametrize(
    "terms",
    [TERMS, replace(TERMS, noise_schedule=NoiseSchedule("linear", 0.5), local_steps=2, pretraining_round_share=0.0)],
)
def test_many_budgets_are_met_and_little_is_wasted(terms):
    plan = plan_noise(MANY, terms)
    assert plan.in_levels
    checked = {}
    for one in plan.clients:
        if one.plan not in checked:
            checked[one.plan] = epsilon(one.plan.events, 1e-5)
        # what is planned was accounted for, and what is said is no less than that
        assert checked[one.plan] <= one.client.target_epsilon * (1 + 1e-9)
        assert one.epsilon >= checked[one.plan] * (1 - 1e-6)
        assert one.epsilon > 0.98 * one.client.target_epsilon
    assert len(checked) > 40


def test_epsilon_on_the_way_is_never_understated():
    for clients, terms in (
        (FEW, TERMS),
        (MANY, TERMS),
        (FEW, replace(TERMS, num_rounds=700, sampling_probability=0.02)),
    ):
        plan = plan_noise(clients, terms)
        assert plan.points[-1] == terms.num_rounds
        one = plan.clients[1]
        for place in (0, len(plan.points) // 2, -1):
            spent = epsilon(one.plan.rounds[: plan.points[place]], 1e-5)
            assert spent * 0.999 <= one.epsilons[place] <= spent * 1.02 + 1e-3
        assert list(one.epsilons) == sorted(one.epsilons)


def test_epsilon_is_found_for_given_noise():
    plan = plan_epsilon(FEW, TERMS, 3.0)
    assert len({one.plan for one in plan.clients}) == 1
    assert plan.clients[0].epsilon == pytest.approx(epsilon(plan.clients[0].plan.events, 1e-5), rel=1e-4)
    assert plan.clients[0].plan.training.noise_multiplier == 3.0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_no_more_rounds_than_these_can_be_afforded(share, kind):
    terms = replace(TERMS, pretraining_round_share=share, local_steps=2, noise_schedule=NoiseSchedule(kind, 0.7))
    found = most_rounds(FEW, terms, 6.0).terms.num_rounds

    def spent(num_rounds):
        return epsilon(replace(terms, num_rounds=num_rounds).shape.plan(6.0).events, 1e-5)

    assert spent(found) <= 0.5
    assert all(spent(found + more) > 0.5 for more in (1, 2))


def test_not_even_one_round_is_said():
    with pytest.raises(BudgetError, match=r"a single round exceeds epsilon 0\.5"):
        most_rounds(FEW, TERMS, 0.3)


@pytest.mark.parametrize("clients", [FEW, MANY])
def test_smaller_batches_than_these_are_too_noisy(clients):
    wanted = 0.01
    plan = smallest_sampling(clients, TERMS, "precision", wanted)
    assert 0.97 * wanted < noise_to_clipping(plan, "precision", 40) <= wanted
    assert 0 < plan.terms.sampling_probability < 1
    if clients is FEW:
        less = replace(plan.terms, sampling_probability=plan.terms.sampling_probability * 0.94)
        assert noise_to_clipping(plan_noise(clients, less), "precision", 40) > wanted
    assert all(one.epsilon <= one.client.target_epsilon * (1 + 1e-9) for one in plan.clients)


def test_noise_that_cannot_be_reached_is_said():
    with pytest.raises(BudgetError, match="with all records in every step"):
        smallest_sampling(FEW, TERMS, "precision", 1e-9)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_absurd_noise_is_refused(noise):
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        plan_epsilon(FEW, TERMS, noise)
    with pytest.raises(ConfigurationError, match="noise_ratio"):
        smallest_sampling(FEW, TERMS, "precision", noise)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_rounds", 0),
        ("num_rounds", 10**9),
        ("local_steps", 0),
        ("sampling_probability", 0.0),
        ("sampling_probability", math.nan),
        ("pretraining_round_share", 1.0),
        ("pretraining_share", 0.0),
        ("target_delta", 1.0),
    ],
)
def test_absurd_terms_are_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=name):
        replace(TERMS, **{name: value})


@pytest.mark.parametrize("aggregation", ["precision", "records", "uniform"])
def test_the_noise_of_an_aggregate_is_that_of_its_parts(aggregation):
    plan = plan_noise(FEW, replace(TERMS, local_steps=2, num_rounds=10))
    weights, noise = releases(plan, aggregation, 10)
    for one, stddev in zip(plan.clients, noise, strict=True):
        batch = 0.1 * one.client.records
        assert stddev == pytest.approx(one.plan.training.noise_multiplier / batch / math.sqrt(2))
    total = sum(weights)
    variance = sum((w / total * s) ** 2 for w, s in zip(weights, noise, strict=True))
    assert noise_to_clipping(plan, aggregation, 10) == pytest.approx(math.sqrt(variance))


def test_precision_weights_are_the_best_and_every_client_is_worth_something_under_them():
    plan = plan_noise(FEW, TERMS)
    noises = {kind: noise_to_clipping(plan, kind, 40) for kind in ("precision", "records", "uniform")}
    assert noises["precision"] < noises["records"] < noises["uniform"]
    assert all(value > 0 for value in marginal_values(*releases(plan, "precision", 40)))
    # under uniform weights the small budget costs everybody
    assert marginal_values(*releases(plan, "uniform", 40))[1] < 0


def test_marginal_values_are_what_leaving_out_shows():
    weights, noise = [3.0, 1.0, 0.5], [0.1, 0.4, 2.0]
    everyone = noise_of_mean(weights, noise)
    for index, value in enumerate(marginal_values(weights, noise)):
        rest = [i for i in range(3) if i != index]
        without = noise_of_mean([weights[i] for i in rest], [noise[i] for i in rest])
        assert value == pytest.approx(without / everyone - 1)
    assert marginal_values([1.0], [1.0]) == [math.inf]
