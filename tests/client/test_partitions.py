"""Every record goes to exactly one client, the same one each time, and nobody is left without."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.exceptions import ConfigurationError
from client.partitions import SCHEMES, partition, partition_by_size

LABELS = np.arange(1000) % 10


def deal(labels=LABELS, num_partitions=8, scheme="iid", alpha=1.0, seed=0):
    return partition(labels, num_partitions=num_partitions, scheme=scheme, alpha=alpha, seed=seed)


def skew(parts, labels=LABELS):
    """Mean distance between the class shares of a client and those of everyone."""
    overall = np.bincount(labels) / len(labels)
    shares = [np.bincount(labels[part], minlength=len(overall)) / len(part) for part in parts]
    return np.mean([np.abs(share - overall).sum() / 2 for share in shares])


@settings(deadline=None, max_examples=40)
@given(
    num_records=st.integers(20, 200),
    num_partitions=st.integers(1, 5),
    num_classes=st.integers(1, 5),
    scheme=st.sampled_from(SCHEMES),
    alpha=st.floats(0.5, 1e6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_record_is_dealt_once(num_records, num_partitions, num_classes, scheme, alpha, seed):
    labels = np.random.default_rng(seed).integers(0, num_classes, num_records)
    parts = deal(labels, num_partitions, scheme, alpha, seed)
    assert len(parts) == num_partitions
    assert all(len(part) > 0 and part.dtype == np.int64 for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_records))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seed_fixes_the_deal(scheme):
    np.random.seed(1)  # The global generator must not matter.
    first = deal(scheme=scheme, seed=4)
    np.random.seed(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, deal(scheme=scheme, seed=4), strict=True))
    assert not np.array_equal(first[0], deal(scheme=scheme, seed=5)[0])


def test_known_deals():
    # Fails when a new version of numpy or flwr-datasets deals differently: recorded results then change too.
    assert deal(LABELS[:12], 3, "iid", seed=7)[0].tolist() == [0, 4, 6, 10]
    assert [len(part) for part in deal(scheme="dirichlet", alpha=0.3, seed=7)] == [153, 43, 51, 208, 307, 68, 98, 72]


def test_iid_is_even_and_shuffled():
    sorted_labels = np.sort(LABELS)
    parts = deal(sorted_labels, 7)
    assert {len(part) for part in parts} == {142, 143}
    assert skew(parts, sorted_labels) < 0.15


def test_alpha_sets_the_skew():
    skews = [skew(deal(scheme="dirichlet", alpha=alpha)) for alpha in (0.1, 1.0, 1000.0)]
    assert skews[0] > skews[1] + 0.1
    assert skews[1] > skews[2] + 0.1
    assert skews[2] < 0.05


def test_as_many_clients_as_records():
    assert [len(part) for part in deal(LABELS[:9], 9)] == [1] * 9


def test_order_within_a_class_does_not_decide_who_gets_what():
    # Without shuffling, the first client would hold the first records of every class.
    first = deal(np.zeros(1000, dtype=np.int64), 2, "dirichlet", alpha=100.0)[0]
    assert 400 < first.mean() < 600


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "sorted"}, ["'sorted'", "iid", "dirichlet"]),
        ({"num_partitions": 0}, ["1000 records", "0 clients"]),
        ({"num_partitions": 1001}, ["1000 records", "1001 clients"]),
        ({"labels": LABELS[:0]}, ["0 records"]),
        ({"scheme": "dirichlet", "alpha": 0.0}, ["alpha is 0.0"]),
        ({"scheme": "dirichlet", "alpha": float("nan")}, ["alpha is nan"]),
        ({"scheme": "dirichlet", "alpha": 0.001, "num_partitions": 100}, ["fewer clients", "larger alpha"]),
    ],
)
def test_what_is_wrong_is_named(changes, words):
    with pytest.raises(ConfigurationError) as caught:
        deal(**changes)
    assert all(word in str(caught.value) for word in words)


CODE = """
import socket, sys
import numpy as np
from client.partitions import partition, partition_by_size

def refuse(*arguments):
    raise AssertionError("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
assert not {"datasets", "flwr_datasets", "pandas"} & set(sys.modules), "imported early"
for scheme in ("iid", "dirichlet"):
    partition(np.arange(100) % 10, num_partitions=4, scheme=scheme, alpha=0.5, seed=0)
assert not {"matplotlib", "seaborn"} & set(sys.modules), "imported at all"
"""


def test_home_and_network_are_left_alone_and_nothing_is_printed(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    for name in ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        environment.pop(name, None)
    command = [sys.executable, "-c", CODE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_plots_can_still_be_imported_afterwards():
    code = "import flwr_datasets.visualization as v; assert callable(v.plot_label_distributions)"
    deals = "import numpy as np; from client.partitions import partition\n"
    deals += "partition(np.arange(9), num_partitions=2, scheme='iid', alpha=1, seed=0)\n"
    run = subprocess.run([sys.executable, "-c", deals + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_sizes_are_dealt_out_as_asked():
    parts = partition_by_size(100, [10, 50, 1], seed=3)
    assert [len(part) for part in parts] == [10, 50, 1]
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == 61
    assert all((np.sort(part) == part).all() for part in parts)
    assert (partition_by_size(100, [10], seed=3)[0] == parts[0]).all()
    assert (partition_by_size(100, [10], seed=4)[0] != parts[0]).any()


def test_more_records_than_there_are_cannot_be_dealt_out():
    with pytest.raises(ConfigurationError, match="101 records together, but there are only 100"):
        partition_by_size(100, [100, 1], seed=0)
