"""Nodes that come late, go, come back, or come twice."""

import threading
import time

import pytest
from flwr.app import Error

from adadpigu_core.exceptions import FederationError


class TestComingAndGoing:
    def test_a_node_that_comes_later_takes_part_from_then_on(self, kit):
        federation = kit.Federation([kit.Client("a"), kit.Client("b")])
        federation.grid.present.remove(11)
        federation.observer = lambda report: federation.grid.present.add(11) if report.round == 2 else None
        federation.run()
        assert [request.round for request in federation.clients[1].requests] == [4]  # described itself in round 3

    def test_a_node_that_is_gone_is_not_asked_until_it_is_back(self, kit):
        federation = kit.Federation([kit.Client("a"), kit.Client("b")])

        def come_and_go(report):
            federation.grid.present = {10} if report.round == 1 else {10, 11}

        federation.observer = come_and_go
        federation.run()
        assert [request.round for request in federation.clients[1].requests] == [1, 3, 4]
        assert [report.missing for report in federation.reports] == [0, 1, 0, 0]

    def test_the_run_stops_when_all_have_gone(self, kit):
        federation = kit.Federation([kit.Client("a")])
        federation.observer = lambda report: federation.grid.present.clear()
        with pytest.raises(FederationError, match="all clients have gone"):
            federation.run()
        assert federation.state.round == 1  # no round is wasted on nobody

    def test_the_run_waits_for_those_who_come_back(self, kit):
        federation = kit.Federation([kit.Client("a")], federation__start_timeout=5.0)

        def leave_for_a_moment(report):
            if report.round == 1:
                federation.grid.present.clear()
                threading.Timer(0.1, lambda: federation.grid.present.add(10)).start()

        federation.observer = leave_for_a_moment
        federation.run()
        assert [report.clients for report in federation.reports] == [1] * 4

    def test_a_lost_description_is_asked_for_again_and_does_not_hold_up_the_others(self, kit, monkeypatch):
        monkeypatch.setattr("server.strategy._DESCRIBE_SECONDS", 0.2)
        answers = iter([kit.LOST])
        forgetful = kit.Client("b", {0: lambda client, request: next(answers, client.description())})
        federation = kit.Federation([kit.Client("a"), forgetful], federation__num_rounds=6)
        federation.observer = lambda report: time.sleep(0.1)
        begun = time.monotonic()
        federation.run(timeout=30)
        assert time.monotonic() - begun < 10
        assert 0 < len(forgetful.requests) < 6

    def test_an_error_instead_of_a_description_is_no_refusal(self, kit, monkeypatch):
        monkeypatch.setattr("server.strategy._DESCRIBE_SECONDS", 0.0)
        answers = iter([Error(2, "not ready yet")])
        late = kit.Client("b", {0: lambda client, request: next(answers, client.description())})
        federation = kit.Federation([kit.Client("a"), late])
        federation.run()
        assert len(late.requests) >= 2

    def test_a_late_reply_that_arrives_while_a_newcomer_is_greeted_is_not_taken_for_a_description(self, kit):
        clients = [kit.Client("a"), kit.Client("b", {2: lambda c, r: kit.Later(c.release(r))}), kit.Client("c")]
        federation = kit.Federation(clients)
        federation.grid.present.remove(12)
        federation.observer = lambda report: federation.grid.present.add(12)
        federation.run(timeout=0.1)
        assert federation.strategy.cohort.refused == {}
        assert federation.account(1).releases == 4

    def test_a_late_reply_that_arrives_while_all_are_gone_is_late(self, kit):
        client = kit.Client("a", {1: lambda c, r: kit.Later(c.release(r), 50)})
        federation = kit.Federation([client], federation__start_timeout=5.0)

        def leave_for_a_moment(report):
            if report.round == 1:
                federation.grid.present.clear()
                federation.grid._round = 99
                threading.Timer(0.2, lambda: federation.grid.present.add(10)).start()

        federation.observer = leave_for_a_moment
        federation.run(timeout=0.05)
        assert [report.clients for report in federation.reports] == [0, 1, 1, 1]
        assert federation.account(0).releases == 4
        assert federation.state.importance.scores == {}

    def test_two_nodes_with_one_data_set_are_one_client(self, kit):
        clients = [kit.Client("a"), kit.Client("b")]
        clients[1].data_set = clients[0].data_set
        federation = kit.Federation(clients)
        federation.run()
        assert clients[1].requests == []
        (refusal,) = federation.strategy.cohort.refused.values()
        assert refusal.code == "duplicate"
        assert federation.account(0).releases == 4

    def test_a_node_that_comes_back_under_another_id_takes_its_place(self, kit):
        federation = kit.Federation([kit.Client("a")], federation__start_timeout=5.0)
        federation.grid.clients[77] = federation.clients[0]

        def restart(report):
            if report.round == 2:
                federation.grid.present = {77}

        federation.observer = restart
        federation.run()
        assert [report.clients for report in federation.reports] == [1] * 4
        assert (federation.account(0).releases, federation.account(0).warnings) == (4, [])
