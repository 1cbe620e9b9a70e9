"""What the server believes of what clients say they have spent."""

import json
import math

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.accounting import Event
from adadpigu_core.messages import Description
from server.tally import Account, Tally

FEWER, UNADMITTED = (
    "its ledger shows fewer releases than before: was a backup restored?",
    ("its ledger admits to fewer releases than have arrived"),
)


def events(pretraining=0, training=0):
    kinds = (("pretraining", 2.0, pretraining), ("training", 1.0, training))
    return tuple(Event(phase, noise, 0.1, count) for phase, noise, count in kinds if count)


def account(**changes):
    return Account(
        **{"data_set": "id", "name": "a", "num_records": 9, "target_epsilon": 8.0, "target_delta": 1e-5, **changes}
    )


def description(data_set="id", name="a", spent=(), **changes):
    facts = {"num_records": 9, "target_epsilon": 8.0, "target_delta": 1e-5, **changes}
    return Description(
        name=name,
        device="cpu",
        data_set=data_set,
        pretraining_noise_multiplier=2.0,
        training_noise_multiplier=1.0,
        spent=spent,
        **facts,
    )


class TestClaims:
    def test_the_largest_count_of_every_event_is_kept(self):
        one = account()
        for spent in (events(1), events(2, 5), events(3, 4)):
            one.claim(spent, fresh=False)
        assert one.events == events(3, 5)
        assert one.warnings == []

    def test_a_lost_reply_is_made_good_by_the_next(self):
        one = account()
        one.claim(events(1, 3))
        one.witness(Event("training", 1.0, 0.1, 1))
        assert (one.events, one.warnings) == (events(1, 3), [])

    def test_a_ledger_that_shrinks_is_flagged_once_and_still_counts(self):
        one = account()
        for spent in (events(1, 5), events(1, 4), events(1, 3), ()):
            one.claim(spent)
        assert (one.events, one.warnings) == (events(1, 5), [FEWER])

    def test_a_late_summary_may_show_less(self):
        one = account()
        one.claim(events(1, 5))
        one.claim(events(1, 4), fresh=False)
        assert one.warnings == []

    def test_what_has_arrived_counts_even_if_no_ledger_admits_to_it(self):
        one = account()
        for _ in range(3):
            one.claim(())
            one.witness(Event("training", 1.0, 0.1, 2))
        assert one.events == events(0, 6)
        assert (one.releases, one.warnings) == (3, [UNADMITTED, FEWER])

    def test_another_noise_than_described_is_flagged(self):
        one = account()
        one.claim((Event("training", 5.0, 0.1, 1),))
        one.witness(Event("training", 1.0, 0.1, 1))
        assert one.warnings == [UNADMITTED]
        assert one.epsilon > account(counts={("training", 5.0, 0.1): 1}).epsilon

    def test_equal_events_in_parts_are_one(self):
        one = account()
        one.claim((*events(0, 2), *events(0, 3)))
        assert one.events == events(0, 5)

    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8))
    def test_an_account_never_falls(self, claims):
        one, known = account(), (0, 0)
        for pretraining, training in claims:
            one.claim(events(pretraining, training))
            known = max(known[0], pretraining), max(known[1], training)
            assert one.events == events(*known)


class TestEpsilon:
    def test_is_recomputed_from_the_events(self):
        """With dp_accounting directly, on a grid of its own."""
        one = account()
        one.claim(events(10, 100))
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        for event in one.report()["events"]:
            sampled = dp_accounting.PoissonSampledDpEvent(
                event["sampling_probability"], dp_accounting.GaussianDpEvent(event["noise_multiplier"])
            )
            accountant.compose(sampled, event["count"])
        assert one.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-3)
        assert one.report()["epsilon"] == one.epsilon

    def test_beyond_the_budget_is_flagged(self):
        one = account(target_epsilon=0.5)
        one.claim(events(0, 100))
        assert one.report()["warnings"] == ["it has spent more than its budget"]

    @pytest.mark.parametrize(
        "spent",
        [
            (Event("training", 1.0, 0.1, 2**62),),
            (Event("training", 1.0, 0.1, 900_000), Event("pretraining", 1.0, 0.1, 900_000)),
            (Event("training", 1e300, 0.1),),
            (Event("training", 1.0, 1e-320),),
            tuple(Event("training", 1 + index / 1e4, 0.1) for index in range(501)),
        ],
    )
    def test_what_cannot_be_accounted_for_is_infinite(self, spent):
        one = account()
        one.claim(spent)
        assert (one.epsilon, one.events) == (math.inf, ())
        one.claim(events(1))  # nor is it forgotten
        assert one.epsilon == math.inf
        assert one.warnings == ["its ledger shows events that cannot be accounted for"]

    def test_kinds_that_come_bit_by_bit_are_too_many_as_well(self):
        one = account()
        for first in range(0, 1000, 100):
            one.claim([Event("training", 1 + (first + index) / 1e4, 0.1) for index in range(100)], fresh=False)
        assert len(one.counts) == 500
        assert one.epsilon == math.inf

    def test_arithmetic_that_fails_is_infinite(self, monkeypatch):
        def fails(*_):
            raise OverflowError("math range error")

        monkeypatch.setattr("server.tally.epsilon", fails)
        assert account().epsilon == math.inf


class TestTally:
    def test_an_account_is_opened_once_and_follows_its_client(self):
        tally = Tally()
        tally.open(description(spent=events(1)))
        tally.open(description(spent=events(1, 2), num_records=10, target_epsilon=4.0))
        (one,) = tally.accounts
        assert (one.events, one.num_records, one.target_epsilon) == (events(1, 2), 10, 4.0)

    def test_the_largest_epsilon(self):
        tally = Tally()
        assert tally.largest_epsilon == 0.0
        tally.open(description("1", spent=events(1)))
        tally.open(description("2", spent=events(1, 9)))
        assert tally.largest_epsilon == tally["2"].epsilon > tally["1"].epsilon

    def test_accounts_are_ordered_as_people_count(self):
        tally = Tally()
        names = ["client-10", "client-2", "b", "", "a", "7", "client-1"]
        for index, name in enumerate(names):
            tally.open(description(f"id-{index}", name))
        assert [entry.name for entry in tally.accounts] == ["", "7", "a", "b", "client-1", "client-2", "client-10"]

    def test_ids_are_names_unless_these_are_missing_or_shared(self):
        tally = Tally()
        for data_set, name in (("x", "a"), ("y", "a"), ("z", ""), ("u", "b")):
            tally.open(description(data_set, name))
        assert sorted(entry["id"] for entry in tally.report()) == ["b", "x", "y", "z"]

    def test_survives_a_checkpoint(self):
        tally = Tally()
        tally.open(description("x", spent=events(2, 3)))
        tally["x"].witness(Event("training", 1.0, 0.1, 4))
        tally.open(description("y", spent=(Event("training", 1.0, 0.1, 2**62),)))
        restored = Tally.restore(json.loads(json.dumps(tally.state())))
        assert restored.accounts == tally.accounts
        assert restored.report() == tally.report()
        restored["x"].witness(Event("training", 1.0, 0.1, 4))
        assert restored["x"].events == events(2, 8)

    def test_a_checkpoint_is_a_copy(self):
        tally = Tally()
        tally.open(description("x", spent=events(2)))
        state = json.dumps(tally.state())
        taken = tally.state()
        tally["x"].claim(())
        tally["x"].claim(events(5))
        assert json.dumps(taken) == state
