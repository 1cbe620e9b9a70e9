"""What a run has come to, on public test data: the last weights, their average, and whether training went astray."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adadpigu_core.datasets import Records
from server.evaluation import Evaluate, Evaluation
from server.optimiser import ServerOptimiser

_LOSS_OF_ACCURACY = 0.1


def outcome(
    optimiser: ServerOptimiser, evaluate: Evaluate, test: Records, rounds: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Say how good a run's weights are.

    Args:
        optimiser: At the end of the run.
        evaluate: Of weights.
        test: What they are evaluated on.
        rounds: Lines of metrics; the accuracy of some is known.

    Returns:
        ``accuracy``, ``loss`` and, of two classes, ``area_under_curve`` of the last iterate, ``average`` with those of
        the averaged weights if there are any, and ``diverged``: why the run must be taken for a failure, empty if
        nothing speaks for it.
    """
    last = evaluate(optimiser.weights)
    found: dict[str, Any] = dict(last.metrics)
    if optimiser.average is not None:
        found["average"] = evaluate(optimiser.average).metrics
    best = max((line["accuracy"] for line in rounds if line.get("accuracy") is not None), default=0.0)
    found["diverged"] = _divergence(last, best, test)
    return found


def _divergence(last: Evaluation, best: float, test: Records) -> str:
    remedy = "lower optimiser.local-learning-rate or raise optimiser.warmup-rounds"
    commonest = float(torch.bincount(test.labels).max()) / max(1, len(test)) if len(test) else 0.0
    if not math.isfinite(last.loss):
        return f"training has diverged: the loss is not a number; {remedy}"
    if last.accuracy < best - _LOSS_OF_ACCURACY:
        return f"training has diverged: accuracy was {best:.4f} and is {last.accuracy:.4f} at the end; {remedy}"
    if last.accuracy <= commonest:
        return f"nothing was learnt: always guessing the commonest class is right as often ({commonest:.4f}); {remedy}"
    return ""
