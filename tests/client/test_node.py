"""What a client does with a message: it describes itself once a run, charges once a round and releases once."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import client.node
from adadpigu_core import archive, masking
from adadpigu_core.adaptive_clipping import AdaptiveClipping, RunningStatistics
from adadpigu_core.ledger import Ledger
from adadpigu_core.messages import Description, Refusal, TrainReply
from adadpigu_core.models import ModelSpec

D = 15  # 4 features x 3 classes, and 3 biases


def refused(reply, code):
    assert isinstance(reply, Refusal), reply
    assert reply.code == code, reply
    return reply.message


def first(number):
    """A mask that retains the first coordinates, and its name."""
    mask = torch.arange(D) < number
    return {"mask": masking.pack(mask), "mask_id": masking.fingerprint(mask)}


class TestDescribe:
    def test_says_public_facts_and_charges_nothing(self, node):
        reply = node.describe()
        assert isinstance(reply, Description)
        assert (reply.num_records, reply.target_epsilon, reply.target_delta) == (60, 8.0, 1e-5)
        assert 0.3 < reply.training_noise_multiplier < reply.pretraining_noise_multiplier * 2
        assert reply.spent == ()
        assert node.charged() == ([], [])

    @pytest.mark.parametrize(
        ("own", "asked", "holds"),
        [
            ((2.0, 1e-6), (8.0, 1e-5), (2.0, 1e-6)),
            ((8.0, 1e-5), (2.0, 1e-6), (2.0, 1e-6)),
            ((2.0, 1e-5), (8.0, 1e-6), (2.0, 1e-6)),
        ],
    )
    def test_the_server_may_ask_for_less_budget_and_never_for_more(self, make_node, own, asked, holds):
        node = make_node(budget=own)
        reply = node.describe(target_epsilon=asked[0], target_delta=asked[1])
        assert (reply.target_epsilon, reply.target_delta) == holds
        node.train()
        with Ledger(node.ledger, node.config["dataset"], "x") as ledger:
            assert 0 < ledger.epsilon(holds[1]) <= holds[0]

    def test_the_first_plan_of_a_run_stays(self, described):
        first_reply = described.describe()
        again = described.describe(training_steps=1000, sampling_probability=0.9, target_epsilon=1.0)
        assert again == first_reply
        assert len(described.rows("plans")) == 1

    def test_an_owner_who_lowers_the_budget_is_obeyed_in_the_middle_of_a_run(self, described):
        assert isinstance(described.train(), TrainReply)
        described.budget["epsilon"] = 0.5
        before = described.charged()
        assert "budget" in refused(described.train(round=2), "budget")
        assert described.describe().target_epsilon == 0.5
        assert described.charged() == before

    def test_declared_records_are_told_and_used(self, make_node, monkeypatch):
        seen = []
        real = client.node.train_round
        monkeypatch.setattr(client.node, "train_round", lambda *a, **k: seen.append(a[3]) or real(*a, **k))
        node = make_node(**{"num-records": 1000})
        assert node.describe().num_records == 1000
        assert isinstance(node.train(), TrainReply)
        assert (seen[0].num_records, seen[0].expected_batch_size) == (1000, 500.0)

    def test_a_release_is_divided_by_declared_records(self, make_node):
        node = make_node(**{"num-records": 10**9})
        node.describe()
        # noise and signal alike: the sum of at most 60 gradients and noise of about one, over 5e8
        assert float(np.abs(node.train().update).max()) < 1e-6

    @pytest.mark.parametrize(
        ("changes", "code", "text"),
        [
            ({"code": "0.0.0+other"}, "message", "install the same release on both"),
            ({"layout": "0123456789abcdef"}, "message", "layout: the server's parameters"),
            ({"model.name": "gpt"}, "message", "model.unknown model 'gpt'"),
            ({"model.num-classes": 1}, "message", "num_classes"),
            ({"model.input-shape": [5]}, "data", "do not have the shape [5]"),
            ({"model.input-shape": [0]}, "message", "is not a shape"),
            ({"sampling-probability": 0.0}, "message", "sampling_probability"),
            ({"sampling-probability": 1.5}, "message", "sampling_probability"),
            ({"training-steps": 0}, "message", "training_steps"),
            ({"pretraining-steps": -1}, "message", "pretraining_steps"),
            ({"pretraining-steps": 1, "pretraining-share": 0.0}, "message", "pretraining_share"),
            ({"pretraining-steps": 1, "pretraining-share": 2.0}, "message", "pretraining_share"),
            ({"target-epsilon": 0.0}, "message", "epsilon"),
            ({"target-epsilon": -8.0}, "message", "epsilon"),
            ({"target-epsilon": math.inf}, "message", "target-epsilon: must be finite"),
            ({"target-epsilon": math.nan}, "message", "target-epsilon: must be finite"),
            ({"target-delta": 0.0}, "message", "delta"),
            ({"target-delta": 1e-300}, "message", "too small"),
            ({"target-epsilon": 1e-12, "target-delta": 1e-12}, "budget", "no amount of noise"),
            ({"run": 3}, "message", "run: must be str"),
            ({"run": None}, "message", "run: is missing"),
            ({"ledger": "/tmp/mine.sqlite"}, "message", "ledger: there is no such field"),
            ({"protocol-version": 2}, "message", "protocol-version"),
        ],
    )
    def test_a_request_that_makes_no_sense_is_refused(self, node, requests, changes, code, text):
        assert text in refused(node.ask(requests.describe(), changes), code)
        assert node.charged() == ([], [])
        assert node.rows("plans") == []

    @pytest.mark.parametrize("request_kind", ["describe", "train"])
    def test_a_model_that_mixes_records_is_refused(self, described, requests, monkeypatch, request_kind):
        def mixing(spec, seed):
            return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))

        monkeypatch.setattr(client.node, "build", mixing)
        request = getattr(requests, request_kind)(run="run-1")
        assert "BatchNorm1d" in refused(described.ask(request), "model")
        assert described.charged() == ([], [])

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("at_first", [True, False], ids=["described", "trained"])
    def test_a_precision_that_mixes_records_is_refused(self, make_node, requests, monkeypatch, precision, at_first):
        class Crowded(nn.Linear):
            def forward(self, x):
                return super().forward(x) * (1 + 0.01 * (len(x) % 3) * torch.is_autocast_enabled("cpu"))

        def crowded(spec, seed):
            return nn.Sequential(OrderedDict(flatten=nn.Flatten(), output=Crowded(4, 3)))

        monkeypatch.setattr(client.node, "build", crowded)
        node = make_node(precision=precision if at_first else "float32")
        answer = node.ask(requests.describe())
        if not at_first:  # as if the node had been started anew
            assert isinstance(answer, Description)
            node.config["precision"] = precision
            answer = node.ask(requests.train(run="run-1"))
        if precision == "bfloat16":
            assert "use float32" in refused(answer, "configuration")
            assert node.charged() == ([], [])
        else:
            assert isinstance(answer, Description if at_first else TrainReply)

    def test_a_model_that_mixes_records_under_another_name_is_refused(self, node, monkeypatch):
        class Centred(nn.Module):
            def forward(self, x):
                return x - x.mean(dim=0)

        def mixing(spec, seed):
            return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), Centred())

        monkeypatch.setattr(client.node, "build", mixing)
        client.node._check_once.cache_clear()
        node_layout = client.node.ParameterLayout.of(mixing(None, 0)).fingerprint
        assert "mixes the records" in refused(node.describe(layout=node_layout), "model")
        assert node.rows("plans") == []


class TestRelease:
    def test_is_charged_with_the_clients_own_noise(self, node):
        description = node.describe(steps_per_round=2)
        assert isinstance(node.train(steps=2), TrainReply)
        ((_, data_set, run, number, phase, noise, sampling, count, *_),) = node.rows("charges")
        assert (data_set, run, number, phase) == (node.config["dataset"], "run-1", 1, "training")
        assert (noise, sampling, count) == (description.training_noise_multiplier, 0.5, 2)

    def test_comes_with_the_ledger(self, node):
        data_set = node.describe(pretraining_steps=1).data_set
        reply = node.train(phase="pretraining", importance_measure="energy")
        assert [(event.phase, event.count) for event in reply.spent] == [("pretraining", 1)]
        assert reply.data_set == data_set
        assert len(reply.importance) == D
        reply = node.train(round=2)
        assert [(event.phase, event.count) for event in reply.spent] == [("pretraining", 1), ("training", 1)]

    def test_holds_noise_that_nobody_can_repeat(self, make_node):
        """The same request to the same node with a fresh ledger, twice."""
        updates = []
        for folder in ("a", "b"):
            node = make_node(ledger="")
            node.ledger = node.folder / folder / "ledger.sqlite"
            node.config["ledger"] = str(node.ledger)
            node.describe()
            updates.append(node.train().update)
        assert np.abs(updates[0] - updates[1]).min() > 0

    def test_is_the_same_when_asked_for_again(self, described):
        reply = described.train()
        before = described.charged()
        again = described.train()
        assert again.update.tobytes() == reply.update.tobytes()
        assert again.spent == reply.spent
        assert described.charged() == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"weights": np.ones(D, np.float32)},
            {"steps": 3},
            {"learning_rate": 0.25},
            {"phase": "pretraining"},
            {"clipping_norm": 9.0},
            {"gradient_scale": np.full(2, 3.0, np.float32)},
            first(3),
        ],
    )
    def test_is_the_same_when_asked_for_in_other_words(self, described, changes):
        reply = described.train()
        before = described.charged()
        again = described.train(**changes)
        assert again.update.tobytes() == reply.update.tobytes()
        assert described.charged() == before

    def test_of_another_process_counts_if_it_was_faster(self, described, monkeypatch):
        real, inner = client.node.train_round, []

        def slow(*arguments, **settings):
            monkeypatch.setattr(client.node, "train_round", real)
            inner.append(described.train(weights=np.ones(D, np.float32)))
            return real(*arguments, **settings)

        monkeypatch.setattr(client.node, "train_round", slow)
        outer = described.train()
        assert outer.update.tobytes() == inner[0].update.tobytes()
        assert [len(rows) for rows in described.charged()] == [1, 1]

    def test_a_mask_is_remembered_for_one_round_and_no_longer(self, described):
        named = first(7)
        assert len(described.train(**named).update) == 7
        assert len(described.train(round=2, mask_id=named["mask_id"]).update) == 7
        assert len(described.train(round=3).update) == D
        before = described.charged()
        refused(described.train(round=4, mask_id=named["mask_id"]), "unknown-mask")
        assert described.charged() == before

    @pytest.mark.parametrize("granularity", ["row", "column"])
    def test_a_mask_may_be_one_of_rows_or_columns(self, described, granularity):
        weight = torch.zeros(3, 4, dtype=torch.bool)
        weight[(1, slice(None)) if granularity == "row" else (slice(None), 1)] = True
        mask = torch.cat([weight.flatten(), torch.zeros(3, dtype=torch.bool)])
        named = {"mask": np.array([0b01000000], np.uint8), "mask_id": masking.fingerprint(mask)}
        reply = described.train(**named, mask_granularity=granularity)
        assert len(reply.update) == int(mask.sum())
        assert len(described.train(round=2, mask_id=named["mask_id"]).update) == int(mask.sum())
        before = described.charged()
        refused(described.train(round=3, **named), "message")  # the same bits for single coordinates
        refused(described.train(round=3, **named, mask_granularity="layer"), "message")
        assert described.charged() == before

    def test_stops_at_the_budget(self, described):
        described.describe(run="run-2")  # planned while all was there
        replies = [described.train(run=run, round=number) for run in ("run-1", "run-2") for number in range(1, 5)]
        assert [type(reply) for reply in replies] == [TrainReply] * 4 + [Refusal] * 4
        with Ledger(described.ledger, described.config["dataset"], "x") as ledger:
            assert ledger.epsilon(1e-5) <= 8.0
        assert "of 8 at delta 1e-05" in refused(replies[-1], "budget")


OWN_STATISTICS = {"clipping": AdaptiveClipping("energy", decay=0.5), "client_statistics": True}


class TestClientStatistics:
    def test_survive_a_restart(self, described, monkeypatch):
        started, ended = [], []
        real = client.node.train_round

        def spy(*arguments, **settings):
            started.append(arguments[5])
            ended.append(real(*arguments, **settings))
            return ended[-1]

        monkeypatch.setattr(client.node, "train_round", spy)
        for number in (1, 2, 3):
            assert isinstance(described.train(round=number, **OWN_STATISTICS), TrainReply)
        assert isinstance(started[0], RunningStatistics)
        assert not started[0].weight.any()
        for before, after in zip(ended, started[1:], strict=False):
            for name in ("mean", "moment", "weight"):
                assert torch.equal(getattr(before.statistics, name), getattr(after, name))
        assert started[2].weight.tolist() == [0.75, 0.75]

    def test_are_functions_of_releases_alone(self, described):
        reply = described.train(**OWN_STATISTICS)
        memory = archive.unpack(described.rows("releases")[0][2])[0]
        gradient = -reply.update / 0.5
        np.testing.assert_allclose(memory["mean"], 0.5 * gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "changes",
        [
            {"clipping": AdaptiveClipping("energy", granularity="row")},
            # as many layers, other sizes
            {"model": ModelSpec("linear", "relu", "none", (4,), 4), "weights": np.zeros(20, np.float32)},
        ],
    )
    def test_must_fit_the_request(self, described, changes):
        described.train(**OWN_STATISTICS)
        before = described.charged()
        assert "changed during the run" in refused(described.train(round=2, **{**OWN_STATISTICS, **changes}), "message")
        assert described.charged() == before


class TestSecondRun:
    def test_gets_what_is_left(self, described):
        first_noise = described.describe().training_noise_multiplier
        described.train()
        described.train(round=2)
        second = described.describe(run="run-2")
        assert isinstance(second, Description)
        assert second.training_noise_multiplier > first_noise
        for number in (1, 2, 3):
            assert isinstance(described.train(run="run-2", round=number), TrainReply)
        with Ledger(described.ledger, described.config["dataset"], "x") as ledger:
            assert ledger.epsilon(1e-5) <= 8.0

    def test_is_refused_when_nothing_is_left(self, described):
        described.describe(run="run-2")  # planned while all was there
        for number in (1, 2, 3, 4):
            described.train(round=number)
        message = refused(described.describe(run="run-3", target_epsilon=7.5), "budget")
        assert "the privacy budget of this data set is spent" in message
        assert "nothing is left" in message
        before = described.charged()
        refused(described.train(run="run-2"), "budget")
        refused(described.describe(run="run-4"), "budget")
        assert described.charged() == before
