"""What a run has come to, on public test data: the last weights, their average, and whether training went astray."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adadpigu_core.datasets import Records
from server.evaluation import Evaluate, Evaluation
from server.optimiser import ServerOptimiser

_LOSS_OF_ACCURACY = 0.1
_LOW_FOR = 5  # evaluations in a row
_REMEDY = "lower optimiser.local-learning-rate or raise optimiser.warmup-rounds"


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
    found["diverged"] = _divergence(last, best_accuracy(rounds), test)
    return found


class Watch:
    """Notices while a run goes on that training goes astray, and says so once.

    Accuracy that falls and rises again is common in the first rounds: it must stay low for several evaluations.

    Args:
        best: Best accuracy so far.
    """

    def __init__(self, best: float = 0.0) -> None:
        self._best = best
        self._low = 0
        self._said = False

    def see(self, metrics: Mapping[str, float]) -> str:
        """Look at an evaluation; what is to be said of it, mostly nothing."""
        if self._said or "accuracy" not in metrics:
            return ""
        found = _collapse(metrics["accuracy"], metrics["loss"], self._best, "now")
        self._best = max(self._best, metrics["accuracy"])
        self._low = self._low + 1 if found else 0
        self._said = self._low >= _LOW_FOR or not math.isfinite(metrics["loss"])
        return found if self._said else ""


def best_accuracy(rounds: Iterable[Mapping[str, Any]]) -> float:
    """Best of those that are known; 0 if none is."""
    return max((line["accuracy"] for line in rounds if line.get("accuracy") is not None), default=0.0)


def _divergence(last: Evaluation, best: float, test: Records) -> str:
    commonest = float(torch.bincount(test.labels).max()) / max(1, len(test)) if len(test) else 0.0
    if found := _collapse(last.accuracy, last.loss, best, "at the end"):
        return found
    if last.accuracy <= commonest:
        return f"nothing was learnt: always guessing the commonest class is right as often ({commonest:.4f}); {_REMEDY}"
    return ""


def _collapse(accuracy: float, loss: float, best: float, when: str) -> str:
    if not math.isfinite(loss):
        return f"training has diverged: the loss is not a number; {_REMEDY}"
    if accuracy < best - _LOSS_OF_ACCURACY:
        return f"training has diverged: accuracy was {best:.4f} and is {accuracy:.4f} {when}; {_REMEDY}"
    return ""
