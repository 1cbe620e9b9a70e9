"""Accuracy on public test data: the only data that the server has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadpigu_core.datasets import Records
from adadpigu_core.parameters import assign

_BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model on test data: accuracy in [0, 1] and mean loss in nats."""

    accuracy: float
    loss: float


Evaluate = Callable[[Tensor], Evaluation]


def evaluator(model: nn.Module, test: Records) -> Evaluate:
    """Make a function from flat weights [d] to an evaluation; the model serves as a container."""

    def evaluate(weights: Tensor) -> Evaluation:
        assign(model, weights)
        model.eval()
        correct, loss = 0, 0.0
        with torch.no_grad():
            for start in range(0, len(test), _BATCH):
                piece = slice(start, start + _BATCH)
                outputs, labels = model(test.features[piece]), test.labels[piece]
                correct += int((outputs.argmax(dim=1) == labels).sum())
                loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        return Evaluation(correct / len(test), loss / len(test))

    return evaluate
