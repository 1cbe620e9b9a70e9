"""Accuracy and loss against numbers computed by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import server.evaluation
from adadpigu_core.datasets import Records
from adadpigu_core.parameters import flatten
from server.evaluation import evaluator


def task(count):
    generator = torch.Generator().manual_seed(0)
    return Records(torch.randn(count, 3, generator=generator), torch.randint(0, 2, (count,), generator=generator))


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_by_hand(monkeypatch, batch):
    monkeypatch.setattr(server.evaluation, "_BATCH", batch)
    model, test = torch.nn.Linear(3, 2), task(50)
    weights = torch.linspace(-1, 1, 8)
    logits = (test.features @ weights[:6].reshape(2, 3).T + weights[6:]).double().numpy()
    labels = test.labels.numpy()
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(50), labels]
    evaluation = evaluator(model, test)(weights)
    assert evaluation.accuracy == (logits.argmax(axis=1) == labels).mean()
    assert evaluation.loss == pytest.approx(loss.mean(), rel=1e-6)


def test_dropout_is_off_and_nothing_is_learnt():
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(3, 2))
    evaluate, weights = evaluator(model, task(50)), torch.linspace(-1, 1, 8)
    assert evaluate(weights) == evaluate(weights)
    assert torch.equal(flatten(model), weights)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_diverged_are_evaluated_all_the_same():
    evaluation = evaluator(torch.nn.Linear(3, 2), task(50))(torch.full((8,), 3e38))
    assert 0 <= evaluation.accuracy <= 1


def test_area_under_curve_is_that_of_scikit_learn():
    """Ties included; a third class has none."""
    labels = torch.tensor([0, 1] * 50)
    scores = torch.randint(0, 8, (100,), generator=torch.Generator().manual_seed(0)).float() + labels
    outputs = torch.stack([torch.zeros(100), scores], dim=1)
    test = Records(outputs, labels)
    found = evaluator(torch.nn.Linear(2, 2), test)
    value = found(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]))  # the identity
    assert value.area_under_curve == pytest.approx(roc_auc_score(labels, scores))
    assert value.metrics["area_under_curve"] == value.area_under_curve
    one_class = evaluator(torch.nn.Linear(2, 2), test.select([0, 2]))
    assert "area_under_curve" not in one_class(torch.zeros(6)).metrics
