import math
from dataclasses import replace

import pytest

from adadpigu_core.accounting import PRETRAINING, TRAINING, Event, PlanShape, calibrate, epsilon, fits
from adadpigu_core.exceptions import BudgetError, ConfigurationError, LedgerError, MessageError
from adadpigu_core.ledger import Ledger, Round, Target

# Without sampling, accounting takes milliseconds.
EVENT = Event(TRAINING, 10.0, 1.0, 5)
TARGET = Target(4.0, 1e-5)
PLAN = calibrate(PlanShape(1.0, 2, 20, 0.1), TARGET.epsilon, TARGET.delta)


# --- what a ledger remembers ------------------------------------------------------------------------------------------


def test_a_new_ledger_is_empty(ledger):
    assert ledger.events() == ()
    assert ledger.epsilon(1e-5) == 0
    assert ledger.plan("run") is None
    assert ledger.target("run") is None
    assert ledger.memory("run") is None
    assert ledger.stored_release(Round("run", 1)) is None


def test_everything_survives_being_closed(path, release):
    with Ledger(path, "site", "content") as ledger:
        identity = ledger.id
        ledger.record_plan("run", PLAN, TARGET)
        release(ledger, 1)
    with Ledger(path, "site", "content") as ledger:
        assert ledger.id == identity
        assert ledger.events() == (EVENT,)
        assert ledger.plan("run") == PLAN
        assert ledger.target("run") == TARGET
        assert ledger.stored_release(Round("run", 1)) == b"release 1"
        assert ledger.memory("run") == b"memory 1"


def test_epsilon_composes_all_runs_and_phases(ledger):
    other = Event(PRETRAINING, 20.0, 1.0, 3)
    ledger.charge(Round("first", 1), EVENT, TARGET)
    ledger.charge(Round("second", 1), other, TARGET)
    ledger.charge(Round("second", 2), EVENT, TARGET)
    assert ledger.events() == (other, replace(EVENT, count=10))
    assert ledger.events(other_than_run="second") == (EVENT,)
    assert ledger.events(other_than_run="third") == ledger.events()
    assert ledger.epsilon(1e-5) == epsilon(ledger.events(), 1e-5)


def test_data_sets_in_one_file_are_apart(path, counts):
    with Ledger(path, "site", "content") as one, Ledger(path, "other", "other content") as two:
        charge = one.charge(Round("run", 1), EVENT, TARGET)
        assert one.id != two.id
        assert two.events() == ()
        two.charge(Round("run", 1), EVENT, TARGET)
        assert counts(one) == counts(two) == 5
        with pytest.raises(LedgerError):  # a charge of one data set pays for nothing of another
            two.store_release(charge, b"payload", b"")
        assert one.store_release(charge, b"payload", b"") == b"payload"
        assert two.stored_release(Round("run", 1)) is None


def test_a_path_may_be_a_string_with_any_characters(tmp_path, release, counts):
    path = tmp_path / "a folder" / "100%?#&;" / "ledger é.sqlite"
    with Ledger(str(path), "site", "content") as ledger:
        release(ledger, 1)
    assert path.is_file()
    with Ledger(path, "site", "content") as ledger:
        assert counts(ledger) == 5


# --- records and names ------------------------------------------------------------------------------------------------


def test_records_that_were_added_go_on_with_the_same_budget(path, release, counts):
    with Ledger(path, "site", "content") as ledger:
        release(ledger, 1)
        identity = ledger.id
    with Ledger(path, "site", "content and more") as ledger:
        assert counts(ledger) == 5
        assert ledger.id == identity


@pytest.mark.parametrize("content", ["content", "content and more"])
def test_the_same_records_under_another_name_are_noticed(path, content):
    Ledger(path, "site", "content").close()
    Ledger(path, "site", "content and more").close()
    with pytest.raises(LedgerError, match=r"known as data set 'site', not 'fresh'.*use the name 'site'"):
        Ledger(path, "fresh", content)
    Ledger(path, "fresh", "something else").close()


# --- plans ------------------------------------------------------------------------------------------------------------


def test_the_first_plan_of_a_run_stays(ledger):
    other = calibrate(PlanShape(1.0, 0, 5, 0.1), 1.0, 1e-5)
    assert ledger.record_plan("run", PLAN, TARGET) == PLAN
    assert ledger.record_plan("run", other, Target(1.0, 1e-5)) == PLAN
    assert ledger.target("run") == TARGET
    assert ledger.record_plan("other run", other, Target(1.0, 1e-5)) == other


@pytest.mark.parametrize(
    "values", [(math.nan, 1e-5), (0.0, 1e-5), (-1.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)]
)
def test_a_target_must_be_one(values):
    with pytest.raises(ConfigurationError, match="target"):
        Target(*values)


# --- charging ---------------------------------------------------------------------------------------------------------


def test_a_charge_is_on_the_disk_before_anything_is_computed(ledger, path):
    ledger.charge(Round("run", 1), EVENT, TARGET)
    with Ledger(path, "site", "content") as another:
        assert another.events() == (EVENT,)


def test_a_charge_pays_for_its_event_only_and_as_often_as_charged(ledger):
    charge = ledger.charge(Round("run", 1), EVENT, TARGET)
    one = replace(EVENT, count=1)
    for other in (
        replace(one, noise_multiplier=9.0),
        replace(one, sampling_probability=0.5),
        replace(one, phase=PRETRAINING),
        replace(EVENT, count=6),
    ):
        with pytest.raises(LedgerError, match="nothing is released"):
            charge(other)
    charge(replace(EVENT, count=3))
    charge(one)
    charge(one)
    with pytest.raises(LedgerError, match="nothing is released"):
        charge(one)


def charge_until_refused(ledger, rounds):
    for charged, round_ in enumerate(rounds):
        try:
            ledger.charge(round_, EVENT, TARGET)
        except BudgetError as error:
            return charged, error
    raise AssertionError("never refused")


def test_a_round_beyond_the_budget_is_refused_and_leaves_no_trace(ledger, counts):
    charged, error = charge_until_refused(ledger, [Round("run", number) for number in range(1, 1000)])
    assert "does not allow this round: epsilon would be" in str(error)
    assert error.public_message == str(error)
    assert counts(ledger) == 5 * charged > 0
    assert fits(ledger.events(), TARGET.epsilon, TARGET.delta)
    assert not fits((*ledger.events(), EVENT), TARGET.epsilon, TARGET.delta)
    ledger.charge(Round("run", charged + 1), EVENT, Target(math.inf, 1e-5))  # its owner may go on


def test_all_runs_share_the_budget(ledger):
    charge_until_refused(ledger, [Round(str(run), 1) for run in range(1000)])
    with pytest.raises(BudgetError):
        ledger.charge(Round("new", 1), EVENT, TARGET)
    assert 0 < ledger.epsilon(TARGET.delta) <= TARGET.epsilon


def test_a_whole_plan_can_be_charged(ledger):
    ledger.record_plan("run", PLAN, TARGET)
    steps = [replace(event, count=1) for event in PLAN.events for _ in range(event.count)]
    for number, event in enumerate(steps, start=1):
        ledger.charge(Round("run", number), event, TARGET)
    with pytest.raises(BudgetError):
        ledger.charge(Round("run", len(steps) + 1), steps[-1], TARGET)


def test_a_round_is_charged_once(ledger, counts):
    first = ledger.charge(Round("run", 1), EVENT, TARGET)
    again = ledger.charge(Round("run", 1), EVENT, TARGET)
    assert again.charge_id == first.charge_id
    assert counts(ledger) == 5
    again(EVENT)


@pytest.mark.parametrize("changes", [{"count": 4}, {"count": 6}, {"noise_multiplier": 11.0}, {"phase": PRETRAINING}])
def test_a_charged_round_cannot_become_another(ledger, changes):
    ledger.charge(Round("run", 1), EVENT, TARGET)
    with pytest.raises(MessageError, match="round 1 was charged for"):
        ledger.charge(Round("run", 1), replace(EVENT, **changes), TARGET)
    assert ledger.events() == (EVENT,)


def test_rounds_may_be_skipped_but_not_made_up_for(ledger):
    ledger.charge(Round("run", 5), EVENT, TARGET)
    with pytest.raises(MessageError, match="round 4 lies in the past: round 5 was charged already"):
        ledger.charge(Round("run", 4), EVENT, TARGET)
    ledger.charge(Round("another run", 4), EVENT, TARGET)


@pytest.mark.parametrize("number", [0, -1, 2**31, 2**70, 1.0, math.nan])
def test_a_round_number_must_be_one(number):
    with pytest.raises(MessageError, match="round"):
        Round("run", number)


def test_a_charge_for_nothing_is_refused(ledger):
    with pytest.raises(ConfigurationError, match="count"):
        ledger.charge(Round("run", 1), replace(EVENT, count=0), TARGET)


# --- releases ---------------------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_same_release(ledger, release, counts):
    assert release(ledger, 1) == b"release 1"
    assert ledger.stored_release(Round("run", 1)) == b"release 1"
    assert release(ledger, 1, b"a second draw") == b"release 1"
    assert counts(ledger) == 5


def test_an_empty_release_is_a_release(ledger):
    charge = ledger.charge(Round("run", 1), EVENT, TARGET)
    assert ledger.store_release(charge, b"", b"") == b""
    assert ledger.store_release(charge, b"a second draw", b"later") == b""
    assert ledger.stored_release(Round("run", 1)) == b""
    assert ledger.memory("run") == b""


def test_a_later_release_replaces_the_earlier_for_good(ledger, release):
    old = ledger.charge(Round("run", 1), EVENT, TARGET)
    ledger.store_release(old, b"old", b"old memory")
    release(ledger, 2)
    assert ledger.stored_release(Round("run", 1)) is None
    assert ledger.memory("run") == b"memory 2"
    with pytest.raises(MessageError, match="round 1 lies in the past"):
        ledger.store_release(old, b"old again", b"old memory")
    with pytest.raises(MessageError, match="round 1 lies in the past"):
        ledger.charge(Round("run", 1), EVENT, TARGET)
    assert ledger.stored_release(Round("run", 1)) is None
    assert ledger.stored_release(Round("run", 2)) == b"release 2"
    assert ledger.memory("run") == b"memory 2"


def test_the_release_of_a_round_can_be_had_until_the_next_one_is_released(ledger, release):
    release(ledger, 1)
    ledger.charge(Round("run", 2), EVENT, TARGET)
    assert ledger.stored_release(Round("run", 1)) == b"release 1"
    assert ledger.memory("run") == b"memory 1"


def test_a_round_that_is_still_computed_when_a_later_one_is_charged_is_lost(ledger):
    slow = ledger.charge(Round("run", 1), EVENT, TARGET)
    fast = ledger.charge(Round("run", 2), EVENT, TARGET)
    for _ in range(2):  # before and after the later round is released
        with pytest.raises(MessageError, match="round 1 lies in the past: round 2 was charged already"):
            ledger.store_release(slow, b"late", b"")
        assert ledger.store_release(fast, b"in time", b"") == b"in time"
    assert ledger.stored_release(Round("run", 1)) is None


def test_runs_keep_their_releases_apart(ledger, release):
    release(ledger, 1, b"one", run="first")
    release(ledger, 1, b"two", run="second")
    assert ledger.stored_release(Round("first", 1)) == b"one"
    assert ledger.stored_release(Round("second", 1)) == b"two"
