"""The strategy with clients that answer, are late, refuse, fail or stay away; hostile ones are in test_reception.py."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error
from flwr.supercore.task_identity import TaskIdentity

from adadpigu_core.accounting import Event
from adadpigu_core.adaptive_clipping import RunningStatistics
from adadpigu_core.exceptions import FederationError
from adadpigu_core.models import build
from adadpigu_core.parameters import flatten


def moves(federation, kit):
    """How far every weight has come from where it started."""
    return (federation.state.optimiser.weights - flatten(build(kit.SPEC, seed=0))).numpy()


class TestHonestClients:
    def test_every_round_is_run_and_tallied(self, kit):
        federation = kit.Federation([kit.Client("a"), kit.Client("b")])
        result = federation.run()
        facts = [(report.round, report.phase, report.clients, report.missing) for report in federation.reports]
        assert facts == [(1, "pretraining", 2, 0), *((number, "training", 2, 0) for number in (2, 3, 4))]
        for index in range(2):
            account = federation.account(index)
            assert (account.releases, account.warnings) == (4, [])
            assert account.events == federation.clients[index].spent
            assert federation.reports[-1].epsilon == account.epsilon
        trained = result.arrays.to_torch_state_dict()
        assert torch.equal(torch.cat([value.ravel() for value in trained.values()]), federation.state.optimiser.weights)

    def test_the_model_moves_by_hand_computed_steps_under_the_mask(self, kit):
        """Importance 0 ... 7 and ratio 0.5: round 2 trains coordinates 4 to 7 only; the others train all."""
        federation = kit.Federation([kit.Client("a", value=0.1), kit.Client("b", value=0.3)])
        federation.run()
        np.testing.assert_allclose(moves(federation, kit), [0.6] * 4 + [0.8] * 4, rtol=1e-5)
        assert [report.retained for report in federation.reports] == [1.0, 0.5, 1.0, 1.0]

    def test_precision_weighs_by_inverse_variance(self, kit):
        one, other = kit.Client("a", value=0.0, noise=(1.0, 1.0)), kit.Client("b", value=1.0, noise=(2.0, 2.0))
        federation = kit.Federation([one, other], retention__initial_ratio=1.0)
        federation.run()
        np.testing.assert_allclose(moves(federation, kit), [4 * 1 / 5] * 8, rtol=1e-5)

    def test_a_mask_is_sent_only_when_it_changes(self, kit):
        federation = kit.Federation([kit.Client("a")], retention__schedule="constant")
        federation.run()
        requests = federation.clients[0].requests
        assert [request.mask is not None for request in requests] == [False, True, False, False]
        assert len({request.mask_id for request in requests[1:]}) == 1
        assert requests[0].mask_id == ""

    def test_arrays_are_shared_by_all_who_are_asked_the_same(self, kit):
        federation = kit.Federation([kit.Client(name) for name in "abc"])
        federation.run()
        for number in (1, 2, 3, 4):
            contents = [m.content for m in federation.grid.pushed if m.metadata.group_id == str(number)]
            assert len({id(content.array_records["arrays"]) for content in contents}) == 1

    def test_each_is_told_what_is_known_of_its_own_ledger(self, kit):
        federation = kit.Federation([kit.Client("a"), kit.Client("b")])
        federation.run()
        for client in federation.clients:
            counts = [sum(event.count for event in request.spent) for request in client.requests]
            assert counts == [0, 1, 2, 3]

    def test_nothing_is_evaluated_by_clients(self, kit):
        federation = kit.Federation([kit.Client("a")])
        federation.run()
        assert {m.metadata.message_type for m in federation.grid.pushed} == {"query.describe", "train"}
        strategy = federation.strategy
        assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), federation.grid)) == []
        assert strategy.aggregate_evaluate(1, []) is None

    @pytest.mark.parametrize(("every", "rounds"), [(1, [0, 1, 2, 3, 4]), (3, [0, 3, 4])])
    def test_evaluation_on_public_data_is_as_often_as_configured_and_last(self, kit, every, rounds):
        seen = []
        federation = kit.Federation([kit.Client("a")], runtime__evaluate_every=every)
        federation.run(evaluate_fn=lambda number, arrays: seen.append(number))
        assert seen == rounds

    def test_local_rankings_give_local_masks_and_a_mean_for_each_coordinate(self, kit):
        def other_order(client, request):
            return client.release(request, importance=np.arange(kit.D, dtype=np.float32)[::-1].copy())

        clients = [kit.Client("a", value=0.1), kit.Client("b", {1: other_order}, value=0.3), kit.Client("c", value=0.3)]
        settings = {"pretraining__ranking": "local", "retention__schedule": "constant", "federation__num_rounds": 2}
        federation = kit.Federation(clients, pretraining__round_share=0.5, **settings)
        federation.run()
        masks = [client.masks[client.requests[1].mask_id] for client in clients]
        assert masks[0].tolist() == masks[2].tolist() == [False] * 4 + [True] * 4
        assert masks[1].tolist() == [True] * 4 + [False] * 4
        pretraining = (0.1 + 0.3 + 0.3) / 3
        np.testing.assert_allclose(
            moves(federation, kit), [pretraining + 0.3] * 4 + [pretraining + (0.1 + 0.3) / 2] * 4, rtol=1e-5
        )
        assert federation.reports[-1].retained == 1.0


class TestStatistics:
    def test_of_the_server_come_from_aggregated_releases_alone(self, kit, configure):
        layers = np.array([0.3] * 6 + [0.9] * 2, np.float32)
        script = dict.fromkeys((2, 3, 4), lambda c, r: c.release(r, update=c.value * layers))
        clients = [kit.Client("a", script, value=1.0), kit.Client("b", script, value=3.0, noise=(1.0, 3.0))]
        federation = kit.Federation(clients, retention__initial_ratio=1.0, adaptive_clipping__owner="server")
        federation.run()
        # by hand: weights 1 and 1/9, B = 50, one step of rate 1
        weights = np.array([1.0, 1 / 9])
        update = torch.from_numpy(layers) * float(weights @ [1.0, 3.0] / weights.sum())
        noise = float(np.sqrt(weights**2 @ [(1 / 50) ** 2, (3 / 50) ** 2]) / weights.sum())
        expected = RunningStatistics.neutral(configure().adaptive_clipping.clipping, kit.LAYOUT)
        everything = torch.ones(kit.D, dtype=torch.bool)
        for number in (2, 3, 4):  # the pretraining round teaches nothing
            scale = expected.standardisation(everything).scale
            np.testing.assert_allclose(clients[0].requests[number - 1].gradient_scale, scale[[0, 6]], rtol=1e-5)
            expected = expected.updated(-update, noise * scale, everything)
        assert float(scale[6]) > 2 * float(scale[0])
        for name, value in expected.state().items():
            np.testing.assert_allclose(federation.state.statistics.state()[name], value, rtol=1e-5)
        assert clients[0].requests[0].gradient_scale is None

    def test_of_clients_stay_with_clients(self, kit, configure):
        federation = kit.Federation([kit.Client("a")], adaptive_clipping__owner="client")
        federation.run()
        neutral = RunningStatistics.neutral(configure().adaptive_clipping.clipping, kit.LAYOUT)
        for name, value in neutral.state().items():
            assert torch.equal(federation.state.statistics.state()[name], value)
        requests = federation.clients[0].requests
        assert all(request.client_statistics and request.gradient_scale is None for request in requests)

    def test_a_group_is_sent_the_scale_of_its_retained_coordinates(self, kit):
        """The first coordinate of each row is frozen; the scale that the statistics give it means nothing."""

        def release(client, request):
            if request.phase == "pretraining":
                scores = np.array([0, 1, 1, 0, 1, 1, 0, 0], np.float32)
                return client.release(request, importance=scores)
            return client.release(request, update=np.array([0.1, 0.1, 0.5, 0.5], np.float32))

        settings = {"adaptive_clipping__granularity": "row", "retention__schedule": "constant"}
        federation = kit.Federation([kit.Client("a", dict.fromkeys(range(1, 5), release))], **settings)
        federation.run()
        given = federation.strategy._expected.standardisation
        sent = federation.clients[0].requests[-1].gradient_scale
        assert given.mask.tolist() == [False, True, True, False, True, True, False, False]
        assert sent[:2].tolist() == [given.scale[1], given.scale[4]]
        assert sent[1] > 2 * sent[0]
        assert sent[2] == 1  # all of the bias is frozen


class TestRepliesThatDoNotCome:
    def test_a_lost_reply_is_made_good_by_the_next(self, kit):
        def lose(client, request):
            client.release(request)
            return kit.LOST

        federation = kit.Federation([kit.Client("a"), kit.Client("b", {2: lose}, value=2.0)])
        federation.run(timeout=0.1)
        assert [(report.clients, report.missing) for report in federation.reports] == [(2, 0), (1, 1), (2, 0), (2, 0)]
        account = federation.account(1)
        assert account.events == federation.clients[1].spent  # four releases, though three have arrived
        assert (account.releases, account.warnings) == (3, [])

    def test_a_round_without_any_reply_leaves_the_model_as_it_is(self, kit):
        lost = dict.fromkeys((2, 3), lambda client, request: kit.LOST)
        federation = kit.Federation([kit.Client("a", lost)], retention__initial_ratio=1.0)
        federation.run(timeout=0.1)
        np.testing.assert_allclose(moves(federation, kit), [0.2] * 8, rtol=1e-5)
        assert [report.clients for report in federation.reports] == [1, 0, 0, 1]

    @pytest.mark.parametrize("rounds", [1, 2, 9])
    def test_a_late_reply_counts_in_the_tally_and_not_in_the_model(self, kit, rounds):
        clients = [kit.Client("a"), kit.Client("b", {2: lambda c, r: kit.Later(c.release(r), rounds)}, value=0.5)]
        federation = kit.Federation(clients, retention__initial_ratio=1.0)
        federation.run(timeout=0.1)
        np.testing.assert_allclose(moves(federation, kit), [3 * 0.3 + 0.1] * 8, rtol=1e-5)
        account = federation.account(1)
        assert account.releases == (4 if rounds < 9 else 3)
        assert account.events == clients[1].spent
        assert account.warnings == []

    def test_the_last_late_replies_are_waited_for_a_little(self, kit, monkeypatch):
        monkeypatch.setattr("server.strategy._SETTLE_SECONDS", 5.0)  # ends as soon as the reply is there
        release = threading.Timer(0.15, lambda: setattr(federation.grid, "_round", 5))

        def after_the_timeout(client, request):
            release.start()
            return kit.Later(client.release(request))

        clients = [kit.Client("a"), kit.Client("b", {4: after_the_timeout})]
        federation = kit.Federation(clients)
        federation.strategy._wait = lambda *_: time.sleep(0.01)
        federation.run(timeout=0.1)
        release.join()
        assert federation.account(1).events == clients[1].spent

    def test_late_importance_and_late_masks_change_nothing(self, kit):
        late = kit.Client("b", {1: lambda c, r: kit.Later(c.release(r, importance=np.full(kit.D, 9, np.float32)))})
        federation = kit.Federation([kit.Client("a"), late])
        federation.run(timeout=0.1)
        assert (
            federation.clients[0].masks[federation.clients[0].requests[1].mask_id].tolist() == [False] * 4 + [True] * 4
        )
        alone = kit.Federation([kit.Client("a")])
        alone.run()
        (scores,), (expected,) = (each.state.importance.scores.values() for each in (federation, alone))
        assert torch.equal(scores, expected)

    def test_a_reply_that_comes_twice_counts_once(self, kit):
        federation = kit.Federation([kit.Client("a")], retention__initial_ratio=1.0)
        pull = federation.grid.pull_messages
        federation.grid.pull_messages = lambda ids: [message for message in pull(ids) for _ in range(2)]
        federation.run()
        np.testing.assert_allclose(moves(federation, kit), [0.4] * 8, rtol=1e-5)
        assert federation.account(0).releases == 4

    def test_an_error_of_flower_costs_the_round_only(self, kit):
        errors = {2: lambda client, request: Error(2, "secret\x1b[31m" * 1000)}
        federation = kit.Federation([kit.Client("a"), kit.Client("b", errors)])
        federation.run()
        assert [(r.clients, r.missing, r.refused) for r in federation.reports][1] == (1, 1, 0)
        assert len(federation.strategy.cohort) == 2


class TestRefusals:
    def test_a_node_that_refuses_may_come_back(self, kit):
        refuse = dict.fromkeys((2, 3), lambda client, request: client.refusal())
        federation = kit.Federation([kit.Client("a"), kit.Client("b", refuse)], federation__num_rounds=8)
        federation.run()
        assert [report.clients for report in federation.reports] == [2, 1, 1, 2, 2, 2, 2, 2]
        assert [report.refused for report in federation.reports] == [0, 1, 1, 0, 0, 0, 0, 0]
        assert federation.strategy.cohort.refused == {}

    def test_a_late_one_may_show_a_smaller_ledger_and_is_no_refusal_of_this_round(self, kit):
        late = {2: lambda client, request: kit.Later(client.refusal(spent=()))}
        federation = kit.Federation([kit.Client("a"), kit.Client("b", late)])
        federation.run(timeout=0.05)
        assert federation.account(1).warnings == []
        assert [(r.clients, r.missing, r.refused) for r in federation.reports][1:] == [(1, 1, 0), (2, 0, 0), (2, 0, 0)]

    def test_refusals_must_be_in_a_row_to_count(self, kit):
        refuse = dict.fromkeys((2, 3, 5, 6), lambda client, request: client.refusal())
        federation = kit.Federation([kit.Client("a"), kit.Client("b", refuse)], federation__num_rounds=8)
        federation.run()
        assert federation.strategy.cohort.refused == {}

    @pytest.mark.parametrize(
        ("code", "asked"), [("internal", 3), ("ledger", 3), ("message", 3), ("budget", 1), ("data", 1)]
    )
    def test_after_a_while_or_for_good_reasons_a_node_is_left_alone(self, kit, code, asked):
        refuse = dict.fromkeys(range(2, 9), lambda client, request: client.refusal(code, "no"))
        federation = kit.Federation([kit.Client("a"), kit.Client("b", refuse)], federation__num_rounds=8)
        federation.run()
        assert len(federation.clients[1].requests) == 1 + asked
        assert [(r.code, r.message) for r in federation.strategy.cohort.refused.values()] == [(code, "no")]

    def test_a_mask_is_sent_again_to_who_has_lost_it(self, kit):
        refuse = {3: lambda client, request: client.refusal("unknown-mask", "mask: send it")}
        federation = kit.Federation([kit.Client("a", refuse), kit.Client("b")], retention__schedule="constant")
        federation.run()
        sent = [[request.mask is not None for request in client.requests] for client in federation.clients]
        assert sent == [[False, True, False, True], [False, True, False, False]]

    def test_the_run_ends_when_all_have_refused(self, kit):
        refuse = {2: lambda client, request: client.refusal("budget", "all is spent")}
        federation = kit.Federation([kit.Client("a", refuse)])
        with pytest.raises(FederationError, match="all is spent"):
            federation.run()
        assert federation.state.round == 2
        assert federation.account(0).events == federation.clients[0].spent

    def test_who_refuses_to_describe_itself_is_not_asked_again(self, kit):
        federation = kit.Federation([kit.Client("a"), kit.Client("b", {0: lambda c, r: c.refusal("data")})])
        federation.run()
        assert federation.clients[1].requests == []
        assert len(federation.state.tally.accounts) == 1
        described = [m for m in federation.grid.pushed if m.metadata.message_type == "query.describe"]
        assert len(described) == 2

    def test_nobody_at_all(self, kit):
        federation = kit.Federation([kit.Client("a", {0: lambda client, request: client.refusal("budget")})])
        with pytest.raises(FederationError, match="code 'budget'"):
            federation.run()
        federation = kit.Federation([kit.Client("a")])
        federation.grid.present.clear()
        with pytest.raises(FederationError, match="none has registered in time"):
            federation.run()


class TestInterface:
    def test_the_number_of_rounds_is_part_of_the_privacy_plan(self, kit):
        federation = kit.Federation([kit.Client("a")])
        with pytest.raises(FederationError, match="made for 4 rounds"):
            federation.strategy.start(federation.grid, ArrayRecord(), num_rounds=5)

    def test_bytes_are_counted(self, kit):
        federation = kit.Federation([kit.Client("a")])
        federation.run()
        up = [report.bytes_up for report in federation.reports]
        assert 0 < up[0] < up[1] < up[2] < up[3]
        assert federation.state.bytes_down > 4 * 4 * kit.D

    def test_the_task_identity_is_that_of_the_fixture(self):
        assert TaskIdentity.run_id == 1

    def test_a_step_beyond_all_numbers_is_not_taken(self, kit):
        """An honest client, but a rate with which nothing stays finite."""
        clients = [kit.Client("a", value=1e30)]
        federation = kit.Federation(clients, optimiser__server_learning_rate=1e30, optimiser__local_learning_rate=1e32)
        federation.run()
        assert bool(federation.state.optimiser.weights.isfinite().all())
        assert all(value == 0 for value in moves(federation, kit))
        assert federation.account(0).releases == 4
        assert math.isfinite(federation.reports[-1].epsilon)
        assert Event("training", 1.0, 0.5, 3) in federation.account(0).events
