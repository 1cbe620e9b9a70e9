"""Accuracy on public test data: the only data that the server has."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadpigu_core.datasets import Records
from adadpigu_core.parameters import assign

_BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model on test data.

    Args:
        accuracy: In [0, 1].
        loss: Mean cross entropy in nats.
        area_under_curve: Of the receiver operating characteristic, in [0, 1]: the chance that a record of class 1
            scores above one of class 0. None unless there are two classes and both are among the test data.
    """

    accuracy: float
    loss: float
    area_under_curve: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What is known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Evaluate = Callable[[Tensor], Evaluation]


def evaluator(model: nn.Module, test: Records) -> Evaluate:
    """Make a function from flat weights [d] to an evaluation; the model serves as a container."""

    def evaluate(weights: Tensor) -> Evaluation:
        assign(model, weights)
        model.eval()
        correct, loss, scores = 0, 0.0, []
        with torch.no_grad():
            for start in range(0, len(test), _BATCH):
                piece = slice(start, start + _BATCH)
                outputs, labels = model(test.features[piece]), test.labels[piece]
                correct += int((outputs.argmax(dim=1) == labels).sum())
                loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
                scores.append(outputs)
        return Evaluation(correct / len(test), loss / len(test), _area_under_curve(torch.cat(scores), test.labels))

    return evaluate


def _area_under_curve(outputs: Tensor, labels: Tensor) -> float | None:
    """Share of the pairs of a record of either class that are in order; a tie counts half (Mann and Whitney)."""
    positives = int((labels == 1).sum())
    pairs = positives * (len(labels) - positives)
    if outputs.shape[1] != 2 or pairs == 0:
        return None
    scores = (outputs[:, 1] - outputs[:, 0]).double()
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    middles = counts.cumsum(0) - (counts - 1) / 2  # mean rank of equal scores, from 1
    above = float(middles[group][labels == 1].sum()) - positives * (positives + 1) / 2
    return above / pairs
