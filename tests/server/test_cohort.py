"""Who takes part."""

from dataclasses import replace

import pytest

from adadpigu_core.accounting import Event
from adadpigu_core.messages import Description, Refusal, encode
from server.cohort import Cohort
from server.tally import Tally

DESCRIPTION = Description("a", "cpu", "id-a", 9, 8.0, 1e-5, 2.0, 1.0, ())
SPENT = (Event("training", 1.0, 0.5, 7),)


def described(data_set, **changes):
    return encode(replace(DESCRIPTION, data_set=data_set, **changes))


@pytest.fixture
def cohort():
    """Nodes 1 and 2 take part; 3 is there and has not said anything."""
    cohort = Cohort(Tally())
    assert cohort.newcomers([3, 1, 2]) == [1, 2, 3]
    cohort.admit(1, described("id-1"))
    cohort.admit(2, described("id-2"))
    return cohort


class TestAdmission:
    def test_members_are_ordered_by_node_whoever_came_first(self):
        cohort = Cohort(Tally())
        for node in (5, 3, 9):
            cohort.admit(node, described(f"id-{node}"))
        assert [member.node for member in cohort] == [3, 5, 9]
        assert (len(cohort), cohort.get(5).node, cohort.get(6)) == (3, 5, None)

    def test_newcomers_are_those_who_have_not_answered(self, cohort):
        cohort.admit(3, encode(Refusal("data", "", "", ())))
        assert cohort.newcomers([1, 2, 3, 4]) == [4]

    def test_only_those_who_are_there_are_present(self, cohort):
        cohort.newcomers([2, 7])
        assert [member.node for member in cohort.present] == [2]
        assert len(cohort) == 2

    def test_whatever_is_no_description_is_a_refusal(self, cohort):
        wire = encode(DESCRIPTION)
        cohort.admit(3, replace(wire, values={**wire.values, "num-records": "many"}))
        assert cohort.refused[3] == Refusal("message", "num-records: must be int, got 'many'", "", ())

    def test_an_answer_that_comes_twice_changes_nothing(self, cohort):
        cohort.admit(1, described("id-1", spent=SPENT))
        cohort.admit(1, encode(Refusal("budget", "", "id-1", ())))
        assert (len(cohort), cohort.refused) == (2, {})
        cohort.admit(3, encode(Refusal("budget", "", "", ())))
        cohort.admit(3, described("id-3"))
        assert (len(cohort), list(cohort.refused)) == (2, [3])


class TestTwins:
    def test_the_second_is_refused_while_the_first_is_there(self, cohort):
        cohort.admit(3, described("id-1", spent=SPENT))
        assert cohort.refused[3].code == "duplicate"
        assert "node 1" in cohort.refused[3].message
        assert cohort.get(1) is not None

    def test_the_second_takes_the_place_of_one_who_is_gone(self):
        tally = Tally()
        cohort = Cohort(tally)
        cohort.newcomers([1])
        cohort.admit(1, described("id-1"))
        cohort.newcomers([2])
        cohort.admit(2, described("id-1", spent=SPENT))
        assert [member.node for member in cohort] == [2]
        assert len(tally.accounts) == 1
        assert tally["id-1"].events == SPENT
        assert cohort.known(1).description.data_set == "id-1"
        # the first comes back, and is now the second
        assert cohort.newcomers([1, 2]) == [1]
        cohort.admit(1, described("id-1"))
        assert cohort.refused[1].code == "duplicate"


class TestRefusals:
    @pytest.mark.parametrize(("code", "times"), [("internal", 3), ("message", 3), ("budget", 1), ("model", 1)])
    def test_patience_has_an_end(self, cohort, code, times):
        for _ in range(times):
            assert cohort.get(1) is not None
            cohort.refused_round(1, Refusal(code, "no", "id-1", ()))
        assert cohort.get(1) is None
        assert cohort.known(1) is not None
        assert list(cohort.refused) == [1]

    def test_a_refusal_means_that_the_mask_may_be_lost(self, cohort):
        cohort.get(1).mask_id = "abc"
        cohort.refused_round(1, Refusal("internal", "", "id-1", ()))
        assert cohort.get(1).mask_id == ""

    def test_of_nodes_that_nobody_knows_mean_nothing(self, cohort):
        cohort.refused_round(77, Refusal("budget", "", "id-1", SPENT))
        assert cohort.refused == {}

    def test_text_is_made_fit_to_print(self, cohort):
        cohort.refuse(1, Refusal("c" * 1000, "\x1b[31m\n" + "m" * 1000, "id-1", ()))
        refusal = cohort.refused[1]
        assert (len(refusal.code), len(refusal.message)) == (30, 300)
        assert refusal.message.isprintable()


class TestClaims:
    """A summary counts for the sender's own data set, whatever it says."""

    @pytest.fixture
    def tally(self):
        return Tally()

    @pytest.fixture
    def cohort(self, tally):
        cohort = Cohort(tally)
        for node in (1, 2):
            cohort.newcomers([1, 2])
            cohort.admit(node, described(f"id-{node}"))
        return cohort

    def test_ones_own_counts(self, cohort, tally):
        cohort.refused_round(1, Refusal("internal", "", "id-1", SPENT))
        assert tally["id-1"].events == SPENT

    def test_also_after_one_was_left_alone(self, cohort, tally):
        cohort.refuse(1, Refusal("budget", "", "id-1", ()))
        cohort.refused_round(1, Refusal("internal", "", "id-1", SPENT))
        assert tally["id-1"].events == SPENT

    @pytest.mark.parametrize("data_set", ["id-2", "id-3", "", "\x00"])
    def test_anothers_does_not(self, cohort, tally, data_set):
        before = tally.report()
        cohort.refused_round(1, Refusal("internal", "", data_set, SPENT))
        cohort.refuse(1, Refusal("budget", "", data_set, SPENT))
        cohort.admit(3, encode(Refusal("budget", "", data_set, SPENT)))
        cohort.admit(4, described("id-2", spent=SPENT))
        assert tally.report() == before

    def test_a_ledger_that_cannot_be_opened_is_no_ledger_that_shrinks(self, cohort, tally):
        cohort.refused_round(1, Refusal("internal", "", "id-1", SPENT))
        cohort.refused_round(1, Refusal("ledger", "", "", ()))
        assert tally["id-1"].warnings == []

    def test_a_late_refusal_may_show_less(self, cohort, tally):
        cohort.refused_round(1, Refusal("internal", "", "id-1", SPENT))
        cohort.refused_round(1, Refusal("internal", "", "id-1", ()), fresh=False)
        assert tally["id-1"].warnings == []
