"""A backup that was put back is noticed and made up for; nothing ever shrinks."""

import shutil

import pytest

from adadpigu_core.accounting import Event, Plan
from adadpigu_core.exceptions import LedgerError
from adadpigu_core.ledger import Ledger, Round, Target
from adadpigu_core.ledger_history import read
from adadpigu_core.reconciliation import check_complete, lacking, make_up

STEP = Event("training", 2.0, 0.5, 1)
OTHER = Event("training", 3.0, 0.5, 4)
TARGET = Target(8.0, 1e-5)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite", "site", "content") as opened:
        opened.record_plan("run", Plan(Event("pretraining", 2.0, 0.5, 0), Event("training", 2.0, 0.5, 9)), TARGET)
        yield opened


def test_lacking_compares_kind_by_kind():
    known = [Event("training", 2.0, 0.5, 5), OTHER]
    assert lacking([Event("training", 2.0, 0.5, 3)], known) == (Event("training", 2.0, 0.5, 2), OTHER)
    assert lacking(known, known) == ()
    assert lacking([*known, STEP], known) == ()


def test_a_ledger_that_holds_as_much_may_go_on(ledger):
    check_complete(ledger, ())
    ledger.charge(Round("run", 1), STEP, TARGET)
    check_complete(ledger, [STEP])


def test_an_old_copy_may_not_until_it_is_made_up_for(tmp_path, ledger):
    ledger.charge(Round("run", 1), STEP, TARGET)
    shutil.copy(ledger.path, tmp_path / "backup.sqlite")
    for number in (2, 3):
        ledger.charge(Round("run", number), STEP, TARGET)
    known, spent = ledger.events(), ledger.epsilon(1e-5)
    with Ledger(tmp_path / "backup.sqlite", "site", "content") as restored:
        with pytest.raises(LedgerError, match="2 releases that this client's ledger does not hold"):
            check_complete(restored, known)
        make_up(restored, lacking(restored.events(), known))
        check_complete(restored, known)
        assert restored.epsilon(1e-5) == spent


def test_making_up_knows_no_budget(ledger):
    make_up(ledger, [Event("training", 0.3, 1.0, 50)])
    assert ledger.epsilon(1e-5) > TARGET.epsilon
    (history,) = read(ledger.path)
    assert [*history.problems()] == []


class TestHistory:
    def test_holds_every_charge_in_order(self, ledger):
        for number in (1, 3):
            ledger.charge(Round("run", number, "code"), STEP, TARGET)
        ledger.store_release(ledger.charge(Round("run", 4), STEP, TARGET), b"payload", b"")
        (history,) = read(ledger.path)
        assert [(row.run, row.round, row.released) for row in history.charges] == [
            ("run", 1, False),
            ("run", 3, False),
            ("run", 4, True),
        ]
        assert history.events == ledger.events()
        assert (history.name, history.id, history.targets) == ("site", ledger.id, {"run": TARGET})
        assert [*history.problems()] == []
        assert "content" not in repr(history)

    def test_more_than_a_run_was_allowed_is_a_problem(self, ledger):
        ledger.charge(Round("run", 1), Event("training", 0.3, 1.0, 9), Target(1e3, 1e-5))
        (history,) = read(ledger.path)
        assert any("above its target 8" in problem for problem in history.problems())

    def test_a_charge_without_a_plan_is_a_problem(self, ledger):
        ledger.charge(Round("stranger", 1), STEP, TARGET)
        (history,) = read(ledger.path)
        assert any("without a plan" in problem for problem in history.problems())

    def test_reading_makes_nothing(self, tmp_path):
        with pytest.raises(LedgerError, match="there is no ledger here"):
            read(tmp_path / "none.sqlite")
        assert [*tmp_path.iterdir()] == []

    def test_a_copy_without_its_marker_stays_alone(self, tmp_path, ledger):
        copy = tmp_path / "copies" / "ledger.sqlite"
        copy.parent.mkdir()
        shutil.copy(ledger.path, copy)
        before = copy.read_bytes()
        assert read(copy)[0].id == ledger.id
        assert [*copy.parent.iterdir()] == [copy]
        assert copy.read_bytes() == before

    def test_a_ledger_that_is_gone_is_named_as_such(self, ledger):
        ledger.close()
        ledger.path.unlink()
        with pytest.raises(LedgerError, match="was here and is gone"):
            read(ledger.path)
