"""A federation of equal clients as one, for exploring: the same distribution of models, without messages or ledgers.

If N clients with equally many records take one step a round with the same noise multiplier sigma, the mean of their
releases is the release of one client that holds all records, samples them with the same probability, and adds noise of
sigma sqrt(N): Poisson samples of the parts are a Poisson sample of the whole, and independent noise adds up. That one
client is simulated here by the project's own private step and the server's own learning, in one process, so that a
search over rates or masks takes seconds a run instead of a minute. Epsilon is that of each of the N clients: sigma is
calibrated as theirs is.

Runs with one seed draw the same records, and the same noise wherever both release a coordinate, so that a comparison
paired by seed shows what a mask is worth and not how the numbers fell.

Left out: whatever makes clients unequal, several steps a round, and scores that clients compute one by one.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adadpigu_core import datasets
from adadpigu_core.accounting import PRETRAINING, TRAINING, Plan, calibrate
from adadpigu_core.adaptive_clipping import FixedStatistics, Standardisation
from adadpigu_core.augmentation import Views
from adadpigu_core.configuration import NOT_RELEASED, ORACLE, PUBLIC, Configuration, not_private
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.gradients import cross_entropy
from adadpigu_core.importance import DRIFT
from adadpigu_core.kept_features import public_features
from adadpigu_core.models import build
from adadpigu_core.parameters import ParameterLayout, assign, flatten
from adadpigu_core.private_step import Mechanism, private_step
from adadpigu_core.sampling import SeededRandomness, Vector
from client.partitions import Deal, deal
from server.aggregation import Contribution
from server.app import model_spec
from server.evaluation import evaluator
from server.learning import learn, rerank
from server.learning_rate import automatic, output_gain
from server.outcome import outcome
from server.public_importance import public_scores
from server.schedule import EVERYONE, Schedule
from server.starting_weights import start_from
from server.state import ServerState
from simulations.oracle import oracle_scores

_BYTES = 4  # of a coordinate


class _NoiseOfAll(SeededRandomness):
    """One step's randomness whose noise does not depend on the mask, beyond which coordinates get any.

    A step draws a normal for each retained coordinate, in order. Here one is drawn for every coordinate, and those of
    frozen ones are thrown away.
    """

    def __init__(self, mask: Tensor, *key: int) -> None:
        super().__init__(*key)
        self._mask = mask.numpy()
        self._left: Vector | None = None

    def normal(self, size: int) -> Vector:
        """Draw the noise of the next ``size`` retained coordinates."""
        left = super().normal(len(self._mask))[self._mask] if self._left is None else self._left
        self._left = left[size:]
        return left[:size]


class _Client(NamedTuple):
    num_records: int
    training_noise_multiplier: float


@dataclass(frozen=True)
class _Pool:
    """All records of the clients, and what the clients agree on."""

    records: Records
    num_clients: int
    plan: Plan
    configuration: Configuration

    @property
    def clients(self) -> list[_Client]:
        """What the clients would declare."""
        each = _Client(len(self.records) // self.num_clients, self.plan.training.noise_multiplier)
        return [each] * self.num_clients

    def release(self, state: ServerState, model: Any, given: Standardisation, number: int, phase: str) -> Tensor:
        """The mean release of the clients in a round, float32 [d]."""
        event = self.plan.step_event(phase, number)
        mechanism = Mechanism(
            phase,
            self.configuration.privacy.clipping_norm,
            event.noise_multiplier * sqrt(self.num_clients),
            event.sampling_probability,
            len(self.records),
        )
        statistics = FixedStatistics(given.mean, given.scale)
        randomness = _NoiseOfAll(given.mask, self.configuration.seed, number)
        assign(model, state.optimiser.weights)
        training = self.configuration.training
        release, _, _ = private_step(
            model,
            cross_entropy,
            self.records,
            mechanism,
            given.mask,
            statistics,
            randomness,
            lambda _: None,
            self.configuration.runtime.gradient_options,
            Views(training.views, training.augmentation).augmentation,
        )
        return release.gradient


def run(configuration: Configuration) -> dict[str, Any]:
    """Train as the federation would.

    Returns:
        Quality on test data and ``diverged``, as `server.outcome` has them, ``bytes_up`` (released coordinates alone),
        ``learning_rate``, and ``not_private``.

    Raises:
        ConfigurationError: If clients are not equal, or the settings need messages.
    """
    _check(configuration)
    data = datasets.evaluated_on(datasets.load(configuration.task.dataset), configuration.task.evaluate_on)
    pool = _pool(configuration, data)
    spec = model_spec(configuration, data)
    model = build(spec, seed=configuration.seed)
    start_from(model, spec, configuration)
    layout = ParameterLayout.of(model)
    test = public_features(spec.features, data.test)
    if configuration.optimiser.local_learning_rate == 0:
        rate = automatic(configuration, pool.clients, layout.num_parameters, output_gain(model, test.features))
        configuration = replace(configuration, optimiser=replace(configuration.optimiser, local_learning_rate=rate))
        pool = replace(pool, configuration=configuration)
    state = ServerState.fresh(configuration, layout)
    state.optimiser.reset(flatten(model))
    if configuration.pretraining.ranking == ORACLE:
        state.importance.reveal(oracle_scores(configuration, model, configuration.optimiser.local_learning_rate))
    if configuration.pretraining.ranking == PUBLIC:
        state.importance.reveal(public_scores(model, spec))
    sent = sum(_round(pool, state, model, number) for number in range(1, configuration.federation.num_rounds + 1))
    return {
        **outcome(state.optimiser, evaluator(model, test), test, []),
        "bytes_up": sent * pool.num_clients * _BYTES,
        "learning_rate": configuration.optimiser.local_learning_rate,
        "not_private": not_private(configuration),
    }


def _round(pool: _Pool, state: ServerState, model: Any, number: int) -> int:
    """One round; the number of coordinates that a client sends."""
    configuration = pool.configuration
    schedule, d = Schedule(configuration), state.layout.num_parameters
    phase = schedule.phase(number)
    rerank(state, schedule, number)
    mask = state.importance.mask(EVERYONE, schedule.ratio(number))
    statistics = configuration.adaptive_clipping.rule != "none"
    given = Standardisation.identity(d)
    if mask is not None:
        given = Standardisation(mask, given.mean, given.scale)
    if phase == TRAINING and statistics:
        given = state.statistics.standardisation(given.mask)
    gradient = pool.release(state, model, given, number, phase)
    update = -configuration.optimiser.local_learning_rate * gradient[given.mask]
    if phase == PRETRAINING:
        state.importance.add(EVERYONE, update, 1.0)
    event = pool.plan.step_event(phase, number)
    batch = event.sampling_probability * len(pool.records)
    noise = event.noise_multiplier * sqrt(pool.num_clients) * configuration.privacy.clipping_norm / batch
    contribution = Contribution(update, given.mask, 1.0, noise)
    learn(
        state,
        [contribution],
        given.scale,
        configuration,
        phase=phase,
        round_number=number,
        statistics=statistics,
    )
    return int(given.mask.sum())


def _pool(configuration: Configuration, data: datasets.DataSet) -> _Pool:
    federation, privacy = configuration.federation, configuration.privacy
    how = Deal(federation.partition, federation.dirichlet_alpha, federation.partition_seed, federation.clients)
    shares = deal(data.train.labels.numpy(), federation.num_clients, how)
    sizes = [len(share) for share in shares]
    if max(sizes) - min(sizes) > 1:
        raise ConfigurationError(f"clients have {min(sizes)} to {max(sizes)} records; only equal ones can be pooled")
    plan = calibrate(configuration.plan_shape, privacy.target_epsilon, privacy.target_delta, ())
    records = public_features(configuration.task.features, data.train).select(np.concatenate(shares))
    return _Pool(records, len(shares), plan, configuration)


def _check(configuration: Configuration) -> None:
    pretraining, clipping = configuration.pretraining, configuration.adaptive_clipping
    learnt = configuration.pretraining_rounds > 0 and pretraining.ranking not in NOT_RELEASED
    for key, ok, remedy in (
        ("federation.local-steps", configuration.federation.local_steps == 1, "1"),
        ("pretraining.measure", not learnt or pretraining.measure == DRIFT, DRIFT),
        ("pretraining.ranking", pretraining.ranking != "local", "consensus"),
        ("adaptive-clipping.owner", clipping.rule == "none" or clipping.owner == "server", "server"),
    ):
        if not ok:
            raise ConfigurationError(f"{key}: must be {remedy} where equal clients are simulated as one")
