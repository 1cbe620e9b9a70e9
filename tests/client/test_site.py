"""Whose records, ledger and limits a client works with: its owner's, or a simulation's."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import client.site
from adadpigu_core import datasets
from adadpigu_core.exceptions import ConfigurationError, DataError, LedgerError
from adadpigu_core.ledger import Target
from adadpigu_core.sampling import SeededRandomness, SystemRandomness
from client.site import is_simulated, site

NODE = {"partition-id": 0, "num-partitions": 2}
RAY = SimpleNamespace(is_initialized=lambda: True)


@pytest.fixture(autouse=True)
def fresh_process():
    client.site._deployed.cache_clear()


@pytest.fixture
def opened(monkeypatch):
    """Data sets that are read."""
    names = []
    for name in ("load", "load_records"):
        real = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda source, _real=real: names.append(source) or _real(source))
    return names


@pytest.fixture
def npz(tmp_path):
    """A small data set of three classes for simulations."""
    path = tmp_path / "shared.npz"
    generator = np.random.default_rng(0)
    arrays = {f"x_{split}": generator.normal(size=(30, 4)) for split in ("train", "test")}
    np.savez(path, **arrays, **{f"y_{split}": np.arange(30) % 3 for split in ("train", "test")})
    return f"npz:{path}"


def run_config(npz, **changes):
    return {"task.dataset": npz, "federation.num-clients": 2, "runtime.output": "/nowhere", **changes}


class TestDeployed:
    def test_takes_everything_from_its_node(self, node):
        node.config.update({"name": "ward 3", "data-set-name": "patients", "num-records": 50, "num-classes": 3})
        node.write_policy()
        found = site(node.config, {}, 1)
        assert (found.name, found.data_set, found.num_records, found.num_classes) == ("ward 3", "patients", 50, 3)
        assert (found.ledger, found.target) == (node.ledger, Target(8.0, 1e-5))
        assert len(found.records) == 60
        assert found.content == found.records.fingerprint()

    def test_needs_only_three_settings(self, node):
        found = site(node.config, {}, 1)
        assert (found.name, found.data_set, found.num_records) == ("", node.config["dataset"], 60)
        assert found.num_classes is None

    def test_a_whole_number_is_an_epsilon(self, make_node):
        assert site(make_node(budget=(3, 1e-5)).config, {}, 1).target == Target(3.0, 1e-5)

    def test_a_ledger_at_home_has_an_absolute_path(self, node, monkeypatch):
        monkeypatch.setenv("HOME", "/home/alice")
        node.config["ledger"] = "~/private/ledger.sqlite"
        assert site(node.config, {}, 1).ledger == Path("/home/alice/private/ledger.sqlite")

    @pytest.mark.skipif(os.name != "posix", reason="needs file modes")
    def test_a_ledger_that_others_may_write_or_exchange_is_refused(self, node, tmp_path):
        folder = tmp_path / "shared"
        folder.mkdir()
        ledger = folder / "ledger.sqlite"
        settings = {**node.config, "ledger": str(ledger)}
        for place, mode in ((folder, 0o777), (ledger, 0o666)):
            ledger.touch(0o600)
            site(settings, {}, 1)  # the control
            place.chmod(mode)
            with pytest.raises(LedgerError, match=f"{place}: others may write here") as caught:
                site(settings, {}, 1)
            assert caught.value.public_message == ""
            place.chmod(0o700)

    def test_its_randomness_cannot_be_repeated(self, node):
        found = site(node.config, {"seed": 0}, 1)
        assert isinstance(found.randomness(1), SystemRandomness)
        assert found.simulation_key is None

    @pytest.mark.parametrize("environment", [{}, {"RAY_JOB_ID": "01000000"}])
    def test_takes_nothing_from_the_run(self, node, npz, opened, tmp_path, monkeypatch, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        run = run_config(
            npz,
            seed=7,
            **{
                "privacy.ledger-dir": str(tmp_path / "elsewhere"),
                "privacy.target-epsilon": 1e6,
                "privacy.target-delta": 0.5,
                "federation.partition-seed": 3,
            },
        )
        found = site(node.config, run, 1)
        assert opened == [node.config["dataset"]]
        assert (found.ledger, found.target, found.simulation_key) == (node.ledger, Target(8.0, 1e-5), None)
        assert not (tmp_path / "elsewhere").exists()

    def test_does_not_even_look_at_the_run(self, node):
        found = site(node.config, {"no.such-key": [object()]}, 1)
        assert len(found.records) == 60

    def test_takes_no_part_in_a_run_with_an_oracle(self, node, opened):
        with pytest.raises(ConfigurationError, match="oracle is for simulations"):
            site(node.config, {"pretraining.ranking": "oracle"}, 1)
        assert opened == []

    def test_all_problems_are_reported_at_once(self):
        wrong = {"ledgr": "x", "target-epsilon": 8.0, "policy": "p.toml", "num-records": 0, "name": 3, "dataset": ""}
        with pytest.raises(ConfigurationError) as caught:
            site(wrong, {}, 1)
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(":")[0].strip("* ") for line in lines] == [
            "ledgr",
            "target-epsilon",
            "dataset",
            "ledger",
            "policy",
            "name",
            "num-records",
        ]
        assert caught.value.public_message == "the node's own configuration is wrong"

    @pytest.mark.parametrize(
        ("key", "value", "problem"),
        [
            ("dataset", None, "is missing"),
            ("dataset", 3, "expected str"),
            ("ledger", None, "is missing"),
            ("ledger", "", "absolute path"),
            ("ledger", "ledger.sqlite", "absolute path"),
            ("ledger", "./ledger.sqlite", "absolute path"),
            ("policy", None, "is missing"),
            ("policy", "policy.toml", "absolute path"),
            ("target-epsilon", 8.0, "stands in the node's policy, and nowhere else"),
            ("target-delta", 1e-5, "stands in the node's policy, and nowhere else"),
            ("name", "a" * 101, "100 printable letters"),
            ("name", "ward\n3", "100 printable letters"),
            ("num-records", 10.0, "expected int"),
            ("num-records", -1, "at least 1"),
            ("num-classes", 1, "at least 2"),
            ("data-set-name", "", "must not be empty"),
            ("simulation", True, "there is no such setting"),
            ("seed", 0, "there is no such setting"),
        ],
    )
    def test_a_wrong_setting_is_refused(self, node, opened, key, value, problem):
        config = {**node.config, key: value}
        with pytest.raises(ConfigurationError, match=problem) as caught:
            site({name: entry for name, entry in config.items() if entry is not None}, {}, 1)
        assert f"* {key}: " in str(caught.value)
        assert str(caught.value).count("*") == 1
        assert opened == []

    @pytest.mark.parametrize("damage", ["missing", "no archive", "cut short", "other keys", "pickles"])
    def test_a_file_that_cannot_be_read(self, node, damage):
        if damage == "missing":
            node.data.unlink()
        elif damage == "no archive":
            node.data.write_bytes(b"x" * 100)
        elif damage == "cut short":
            node.data.write_bytes(node.data.read_bytes()[:300])
        elif damage == "other keys":
            node.save(features=np.ones((2, 4)), labels=np.zeros(2))
        else:
            node.save(x=np.array([{"a": 1}], dtype=object), y=np.zeros(1))
        with pytest.raises(DataError) as caught:
            site(node.config, {}, 1)
        assert caught.value.public_message == ""


class TestIsSimulated:
    def test_the_engine_says_so(self):
        assert is_simulated({**NODE, "simulation": True})

    def test_its_noise_may_be_secret(self, npz):
        run = run_config(npz, seed=7)
        seeded, secret = (site({**NODE, "simulation": True, **more}, run, 1) for more in ({}, {"unseeded": True}))
        assert isinstance(seeded.randomness(1), SeededRandomness)
        assert isinstance(secret.randomness(1), SystemRandomness)
        assert not is_simulated({**NODE, "unseeded": True})

    @pytest.mark.parametrize("value", [False, "true", "True", 1, 1.0])
    def test_nothing_but_true_says_so(self, value):
        assert not is_simulated({**NODE, "simulation": value})

    def test_flowers_simulation_is_one(self, monkeypatch):
        monkeypatch.setenv("RAY_JOB_ID", "01000000")
        monkeypatch.setitem(sys.modules, "ray", RAY)
        assert is_simulated(NODE)

    def test_a_node_as_in_flowers_tutorials_is_none(self, monkeypatch):
        monkeypatch.delenv("RAY_JOB_ID", raising=False)
        assert not is_simulated(NODE)
        monkeypatch.setitem(sys.modules, "ray", RAY)
        assert not is_simulated(NODE)

    def test_neither_is_one_that_a_ray_job_has_started(self, monkeypatch):
        monkeypatch.setenv("RAY_JOB_ID", "01000000")
        monkeypatch.delitem(sys.modules, "ray", raising=False)
        assert not is_simulated(NODE)
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
        assert not is_simulated(NODE)

    @pytest.mark.parametrize("more", [{"dataset": "npz:/data/site.npz"}, {"ledger": "/l"}, {"name": "x"}])
    def test_a_node_with_anything_of_its_own_is_none(self, monkeypatch, more):
        monkeypatch.setenv("RAY_JOB_ID", "01000000")
        monkeypatch.setitem(sys.modules, "ray", RAY)
        assert not is_simulated({**NODE, **more})
        assert not is_simulated({**NODE, "simulation": True, **more})
        assert not is_simulated({"simulation": True, **more})

    def test_a_tutorial_node_cannot_be_made_to_read_a_servers_choice(self, npz, opened, monkeypatch):
        monkeypatch.setenv("RAY_JOB_ID", "01000000")
        with pytest.raises(ConfigurationError, match="dataset: is missing"):
            site(NODE, run_config(npz), 1)
        assert opened == []


class TestSimulated:
    def simulated(self, npz, index=0, **changes):
        node = {"partition-id": index, "num-partitions": 2, "simulation": True}
        return site(node, run_config(npz, **changes), 5)

    def test_takes_its_share(self, npz):
        sites = [self.simulated(npz, index) for index in (0, 1)]
        assert [found.name for found in sites] == ["client-0", "client-1"]
        assert sum(len(found.records) for found in sites) == 30
        assert sites[0].content != sites[1].content
        assert [found.num_records for found in sites] == [len(found.records) for found in sites]
        assert sites[0].num_classes == 3

    def test_takes_its_limits_from_the_run(self, npz):
        found = self.simulated(npz, **{"privacy.target-epsilon": 2.0, "privacy.target-delta": 1e-4})
        assert found.target == Target(2.0, 1e-4)

    def test_keeps_its_ledger_in_the_run_folder_or_where_the_run_says(self, npz):
        found = self.simulated(npz, 1)
        assert found.ledger.parent == Path("/nowhere/ledgers")
        assert found.ledger.name.endswith("shared-npz-1-of-2.sqlite")
        lasting = self.simulated(npz, 1, **{"privacy.ledger-dir": "/lasting"})
        assert lasting.ledger == Path("/lasting") / found.ledger.name
        assert found.data_set == f"{npz}/1-of-2"

    def test_a_long_path_still_gives_a_file_name(self, tmp_path):
        folder = tmp_path / ("a" * 120) / ("b" * 120)
        folder.mkdir(parents=True)
        path = folder / "c.npz"
        arrays = {f"{key}_{split}": value for split in ("train", "test") for key, value in XY.items()}
        np.savez(path, **arrays)
        assert len(self.simulated(f"npz:{path}").ledger.name) < 150

    def test_repeats_itself_by_seed_client_and_charge(self, npz):
        def draw(index=0, seed=0, charge=1):
            source = self.simulated(npz, index, seed=seed).randomness(charge)
            assert isinstance(source, SeededRandomness)
            return source.normal(2).tolist()

        assert draw() == draw()
        assert len({tuple(values) for values in (draw(), draw(index=1), draw(seed=1), draw(charge=2))}) == 4

    def test_under_flower_nothing_is_repeatable(self, npz, monkeypatch):
        monkeypatch.setenv("RAY_JOB_ID", "01000000")
        monkeypatch.setitem(sys.modules, "ray", RAY)
        found = site(NODE, run_config(npz), 5)
        assert found.name == "client-0"
        assert isinstance(found.randomness(1), SystemRandomness)

    @pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0), ("0", 2), (0.0, 2), (True, 2), (0, "2")])
    def test_a_partition_that_does_not_exist(self, npz, index, count):
        with pytest.raises(ConfigurationError, match="there is no partition"):
            site({"partition-id": index, "num-partitions": count, "simulation": True}, run_config(npz), 1)

    def test_settings_that_cannot_be_used(self, npz):
        with pytest.raises(ConfigurationError, match=r"privacy\.target-epsilon"):
            self.simulated(npz, **{"privacy.target-epsilon": -1.0})


XY = {"x": np.zeros((6, 2), np.float32), "y": np.arange(6) % 2}
