"""The Flower ServerApp: reads the configuration, builds the parts, runs the strategy, writes the run folder."""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn

from adadpigu_core import datasets, model_file
from adadpigu_core.augmentation import Views
from adadpigu_core.configuration import (
    ORACLE,
    PUBLIC,
    Configuration,
    Value,
    not_private,
    parse,
    to_toml,
)
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.home import run_folder
from adadpigu_core.kept_features import public_features
from adadpigu_core.models import ModelSpec, build, check_private, default_model, normalisation_of
from adadpigu_core.parameters import ParameterLayout, assign, assign_fixed, flatten, flatten_fixed
from adadpigu_core.provenance import code_fingerprint
from server.earlier_runs import known_charges
from server.evaluation import evaluator
from server.exchange import Wait, sleep
from server.outcome import Watch, best_accuracy, outcome
from server.public_importance import public_scores
from server.round_report import RoundReport, ignore
from server.run_folder import CONFIGURATION, MODEL, PRIVACY, RESULT, Checkpoint, RunFolder
from server.starting_weights import start_from
from server.state import ServerState
from server.strategy import AdaDPIGU, EvaluateFn

# Given the model at its first weights, and the rate of a client's steps.
Oracle = Callable[[Configuration, nn.Module, float], Tensor]
log = logging.getLogger("flwr")  # what Flower shows while a run works
warning_log = logging.getLogger("adadpigu.server")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation as Flower starts it."""
    configuration = parse(cast(Mapping[str, Value], context.run_config))
    folder = RunFolder(run_folder(configuration, context.run_id))
    num_rounds = configuration.federation.num_rounds

    def show(report: RoundReport) -> None:
        quality = "".join(f", {name} {value:.4f}" for name, value in report.metrics.items())
        log.info(
            "[ROUND %d/%d] %s by %d clients%s, largest epsilon %.3f",
            *(report.round, num_rounds, report.phase, report.clients, quality, report.epsilon),
        )

    result = run(grid, configuration, folder, show)
    log.info("Accuracy %.4f on test data; the run is in %s", result["accuracy"], folder.path)


def run(
    grid: Grid,
    configuration: Configuration,
    folder: RunFolder,
    observer: Callable[[RoundReport], None] = ignore,
    wait: Wait = sleep,
    oracle: Oracle | None = None,
) -> dict[str, Any]:
    """Run a federation, or go on with the one in the folder, and write everything down.

    Args:
        grid: Flower's way to the nodes.
        configuration: All settings.
        folder: Of the run.
        observer: Told of every round.
        wait: Waits for replies.
        oracle: Scores of a model's coordinates, float64 [d], computed from records without noise: for the ranking
            ``oracle``, which only a simulation can have.

    Returns:
        What stands in ``result.json``.

    Raises:
        ConfigurationError: If the settings ask for an oracle, and there is none here.
    """
    check_oracle(configuration, available=oracle is not None)
    data = datasets.evaluated_on(datasets.load(configuration.task.dataset), configuration.task.evaluate_on)
    spec = model_spec(configuration, data)
    model = build(spec, seed=configuration.seed)
    check_private(model)
    state = ServerState.fresh(configuration, ParameterLayout.of(model))
    state.fixed = flatten_fixed(model)
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        folder.write_text(CONFIGURATION, to_toml(configuration))
        start_from(model, spec, configuration)
        _begin(state, model, spec, configuration)
    else:
        _restore(state, checkpoint, folder)
        assign(model, state.optimiser.weights)
        assign_fixed(model, state.fixed)
    folder.keep_metrics(state.round)
    state.tally.remember(known_charges(folder.path))
    if checkpoint is None:
        # the run has an identity from here on, by which clients know their plans, whatever happens in its first round
        folder.save_checkpoint(*state.dump())
    test = public_features(spec.features, data.test)
    device = "cuda" if configuration.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    evaluate = evaluator(copy.deepcopy(model).to(device), test.to(device))

    def evaluate_fn(_: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(evaluate(flatten(model)).metrics))

    watch = Watch(best_accuracy(folder.metrics()))

    def record(report: RoundReport) -> None:
        line = asdict(report)
        evaluated = line.pop("metrics")
        folder.add_metrics({**line, **evaluated})
        if astray := watch.see(evaluated):
            warning_log.warning("round %d: %s", report.round, astray)
        folder.write_json(PRIVACY, _privacy(strategy))
        folder.save_checkpoint(*state.dump())
        observer(report)

    asked = configuration.pretraining.ranking == ORACLE
    strategy = AdaDPIGU(
        configuration,
        spec,
        copy.deepcopy(model),
        state,
        record,
        wait,
        public=test.features,
        oracle=partial(oracle, configuration) if oracle is not None and asked else None,
    )
    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        timeout=configuration.federation.round_timeout,
        evaluate_fn=cast(EvaluateFn, evaluate_fn),
    )
    folder.write_json(PRIVACY, _privacy(strategy))
    result = {
        **outcome(state.optimiser, evaluate, test, folder.metrics()),
        "rounds": state.round,
        "seconds": state.seconds,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "seed": configuration.seed,
        "code": code_fingerprint(),
        "parameters": state.layout.num_parameters,
        "learning_rate": state.learning_rate,
        "not_private": not_private(configuration),
        **_privacy(strategy),
    }
    assign(model, state.optimiser.weights)
    folder.write_bytes(MODEL, model_file.pack(model))
    folder.write_json(RESULT, result)
    return result


def model_spec(configuration: Configuration, data: datasets.DataSet) -> ModelSpec:
    """Say what is trained, from the settings and the public data."""
    task = configuration.task
    name = default_model(task.dataset) if task.model == "auto" else task.model
    Views(configuration.training.views, configuration.training.augmentation).check(data.input_shape)
    return ModelSpec(
        name=name,
        activation=task.activation,
        normalisation=normalisation_of(name, task.normalisation),
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        features=task.features,
    )


def _begin(state: ServerState, model: nn.Module, spec: ModelSpec, configuration: Configuration) -> None:
    """Take a model at its first weights into the state, and what these alone say of its coordinates."""
    state.fixed = flatten_fixed(model)
    state.optimiser.reset(flatten(model))
    if configuration.pretraining.ranking == PUBLIC:
        state.importance.reveal(public_scores(model, spec))


def _restore(state: ServerState, checkpoint: Checkpoint, folder: RunFolder) -> None:
    try:
        state.restore(*checkpoint)
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder.path}: {error}") from error


def check_oracle(configuration: Configuration, *, available: bool) -> None:
    """Refuse a ranking by un-noised gradients wherever clients could have records of their own.

    Raises:
        ConfigurationError: If there is no oracle.
    """
    if configuration.pretraining.ranking == ORACLE and not available:
        raise ConfigurationError(
            "pretraining.ranking: oracle is not private and exists in simulations of the in-process engine only; "
            "use consensus"
        )


def _privacy(strategy: AdaDPIGU) -> dict[str, Any]:
    """The tally, and who does not take part."""
    return {
        "unit": "one record of one client, add-or-remove-one, over everything released from the client's data set",
        "clients": strategy.state.tally.report(),
        "refused": [
            {"node": node, "code": refusal.code, "message": refusal.message}
            for node, refusal in sorted(strategy.cohort.refused.items())
        ],
    }
