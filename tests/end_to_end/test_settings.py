"""Every way to run it finishes, and spends no more than its target."""

import numpy as np
import pytest

STATISTICS = {"adaptive-clipping.rule": "energy"}
VARIANTS = {
    "dp-sgd": {"method": "dp-fedsgd"},
    "dirichlet": {"federation.partition": "dirichlet", "federation.dirichlet-alpha": 0.5},
    "three local steps": {"federation.local-steps": 3},
    "the server's statistics": STATISTICS,
    "the client's statistics": {**STATISTICS, "adaptive-clipping.owner": "client"},
    "the client's statistics by row": {
        **STATISTICS,
        "adaptive-clipping.owner": "client",
        "adaptive-clipping.granularity": "row",
    },
    "statistics by coordinate": {
        **STATISTICS,
        "adaptive-clipping.granularity": "coordinate",
        "adaptive-clipping.shrinkage": 0.5,
    },
    "scores of single releases": {"pretraining.measure": "energy"},
    "local ranking": {"pretraining.ranking": "local"},
    "ranking by drawings": {"pretraining.ranking": "public", "pretraining.round-share": 0},
    "ranked anew": {"retention.rerank-every": 1, "retention.schedule": "constant"},
    "ranked by training alone": {"retention.rerank-every": 2, "pretraining.round-share": 0},
    "random ranking": {"pretraining.ranking": "random"},
    "random ranking without pretraining": {"pretraining.ranking": "random", "pretraining.round-share": 0},
    "the paper's rules": {"adaptive-clipping.rule": "paper", "pretraining.measure": "magnitude"},
    "the paper's rules at the client": {
        "adaptive-clipping.rule": "paper",
        "adaptive-clipping.owner": "client",
        "pretraining.measure": "magnitude",
        "pretraining.ranking": "local",
        "retention.schedule": "constant",
        "retention.final-ratio": 0.1,
    },
    "adam": {"optimiser.name": "adam", "optimiser.server-learning-rate": 0.01, "optimiser.warmup-rounds": 2},
    "by records": {**STATISTICS, "federation.aggregation": "records", "adaptive-clipping.centre": "true"},
    "less noise towards the end": {"privacy.noise-schedule": "cosine", "privacy.final-noise-ratio": 0.5},
    "all records in every step": {"privacy.sampling-probability": 1.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(adadpigu, tiny, run_in, folder, name):
    settings = {**tiny, "privacy.target-epsilon": 3.0, **VARIANTS[name]}
    result = adadpigu("--output", folder, settings=settings)
    assert result.exit_code == 0, result.output
    run = run_in(folder)
    outcome = run.json()
    assert outcome["refused"] == []
    assert np.isfinite(run.weights).all()
    assert 0.0 <= outcome["accuracy"] <= 1.0
    steps = 3 * 4 if name == "three local steps" else 4
    for client, rows in zip(outcome["clients"], run.ledgers().values(), strict=True):
        assert 2.9 < client["epsilon"] <= 3.0
        assert client["warnings"] == []
        assert sum(event["count"] for event in client["events"]) == steps == sum(count for _, _, count in rows)
    assert sum(client["num_records"] for client in outcome["clients"]) == 1437


def test_dp_sgd_has_one_kind_of_noise_and_trains_everything(finished, folder):
    run = finished(folder, **{key.replace(".", "__").replace("-", "_"): v for key, v in VARIANTS["dp-sgd"].items()})
    assert {line["retained"] for line in run.metrics} == {1.0}
    assert [len(client["events"]) for client in run.json()["clients"]] == [1, 1, 1]


def test_a_dirichlet_partition_is_uneven(finished, folder):
    run = finished(folder, federation__partition="dirichlet", federation__dirichlet_alpha=0.5)
    sizes = [client["num_records"] for client in run.json()["clients"]]
    assert len(set(sizes)) == 3


class TestOwnArrays:
    @pytest.fixture
    def npz(self, make_npz):
        return make_npz()

    def test_are_learnt(self, adadpigu, tiny, run_in, folder, npz):
        settings = {**tiny, "task.dataset": f"npz:{npz}", "federation.num-rounds": 6, "privacy.target-epsilon": 8.0}
        result = adadpigu("--output", folder, settings=settings)
        assert result.exit_code == 0, result.output
        outcome = run_in(folder).json()
        assert outcome["accuracy"] > 0.75
        assert outcome["parameters"] == 12
        assert all(client["epsilon"] <= 8.0 for client in outcome["clients"])
        assert f"30 records of npz:{npz}" in result.stdout

    def test_may_be_named_from_here_and_gone_on_with_from_there(
        self, adadpigu, tiny, run_in, npz, monkeypatch, tmp_path
    ):
        def stop(count, moment):
            if (count, moment) == (8, "after"):
                raise KeyboardInterrupt

        monkeypatch.chdir(npz.parent)
        settings = {**tiny, "task.dataset": f"npz:{npz.name}", "privacy.ledger-dir": "ledgers"}
        assert adadpigu("--output", "run", settings=settings, on_message=stop).exit_code == 130
        folder = npz.parent / "run"
        monkeypatch.chdir(tmp_path)
        result = adadpigu("--resume", folder)
        assert result.exit_code == 0, result.output
        assert {len(rows) for rows in run_in(folder).ledgers(npz.parent / "ledgers").values()} == {4}
        assert list(tmp_path.iterdir()) == []
