"""Data sets made by a formula."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from adadpigu_core import datasets, made_up


@pytest.fixture(scope="module")
def table():
    return datasets.load("wide-table")


def test_everybody_has_the_same_table(table):
    again = datasets.load("wide-table")
    assert again.train.fingerprint() == table.train.fingerprint()
    assert again.test.fingerprint() == table.test.fingerprint() != table.train.fingerprint()
    assert (len(table.train), len(table.test), table.input_shape, table.num_classes) == (20_000, 4_000, (1000,), 2)


def test_twenty_columns_say_all_that_can_be_said(table):
    """The other 980 tell nothing, although all of them are active."""
    x, y = table.train.features.numpy(), table.train.labels.numpy()
    informative = LogisticRegression().fit(x[:4000, :20], y[:4000])
    others = LogisticRegression(max_iter=30).fit(x[:4000, 20:120], y[:4000])
    x, y = table.test.features.numpy(), table.test.labels.numpy()
    assert 0.82 < informative.score(x[:, :20], y) < 0.86
    assert 0.45 < others.score(x[:, 20:120], y) < 0.55
    assert table.train.features.std(dim=0).min() > 0.9


def test_background_hides_no_digit_and_leaves_no_input_idle():
    images = torch.zeros(50, 1, 4, 4)
    images[:, :, 1, 1] = 1.0
    noisy = made_up.with_background(images, seed=1)
    assert torch.equal(noisy, made_up.with_background(images, seed=1))
    assert not torch.equal(noisy, made_up.with_background(images, seed=2))
    assert bool((noisy[:, 0, 1, 1] == 1).all())
    assert bool(((noisy >= -1) & (noisy <= 1)).all())
    assert noisy.std(dim=0)[0, 0, 0] > 0.4
