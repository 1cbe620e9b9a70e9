"""Clients that lie, or are broken: each may lose its own place, and nothing else."""

import io
import time
import zipfile

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from adadpigu_core.accounting import Event
from adadpigu_core.messages import encode
from server.aggregation import largest_norm
from server.wire import to_content

NAN = np.float32(np.nan)
HUGE = (Event("training", 0.2, 1.0, 100_000),)


def vector(length, value=0.1, dtype=np.float32):
    return np.full(length, value, dtype)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("update.npy", b"no array")
    return buffer.getvalue()


def raw(content, data, stype="numpy.ndarray"):
    """Replace the bytes of the update by any others."""
    content["arrays"]["update"] = Array("float32", (4,), stype, data)
    return content


def saved(array, **settings):
    buffer = io.BytesIO()
    np.save(buffer, array, **settings)
    return buffer.getvalue()


# What a client sends in round 2, in which half of its eight coordinates are retained.
REPLIES = {
    "another run": lambda c, r, kit: c.release(r, run="elsewhere"),
    "an earlier round": lambda c, r, kit: c.release(r, round=1),
    "a later round": lambda c, r, kit: c.release(r, round=3),
    "a negative round": lambda c, r, kit: c.release(r, round=-2),
    "the other phase": lambda c, r, kit: c.release(r, phase="pretraining"),
    "no phase at all": lambda c, r, kit: kit.altered(c.release(r), phase="testing"),
    "too short": lambda c, r, kit: c.release(r, update=vector(3)),
    "too long": lambda c, r, kit: c.release(r, update=vector(8)),
    "empty": lambda c, r, kit: c.release(r, update=vector(0)),
    "not a number": lambda c, r, kit: kit.altered(c.release(r), update=vector(4, NAN)),
    "infinite": lambda c, r, kit: kit.altered(c.release(r), update=vector(4, np.inf)),
    "huge": lambda c, r, kit: c.release(r, update=vector(4, 3e38)),
    "longer than clipping allows": lambda c, r, kit: c.release(r, update=vector(4, 20.0)),
    "of doubles": lambda c, r, kit: kit.altered(c.release(r), update=vector(4, dtype=np.float64)),
    "of complex numbers": lambda c, r, kit: kit.altered(c.release(r), update=vector(4, dtype=np.complex64)),
    "two-dimensional": lambda c, r, kit: kit.altered(c.release(r), update=np.zeros((2, 2), np.float32)),
    "a scalar": lambda c, r, kit: kit.altered(c.release(r), update=np.zeros((), np.float32)),
    "without update": lambda c, r, kit: kit.altered(c.release(r), update=None),
    "with one more array": lambda c, r, kit: kit.altered(c.release(r), gradient=vector(4)),
    "with one more value": lambda c, r, kit: kit.altered(c.release(r), loss=0.3),
    "update as text": lambda c, r, kit: kit.altered(c.release(r), update="0.1"),
    "round as text": lambda c, r, kit: kit.altered(c.release(r), round="2"),
    "run as bytes": lambda c, r, kit: kit.altered(c.release(r), run=b"\x00"),
    "run as a long list": lambda c, r, kit: kit.altered(c.release(r), run=[1] * 100_000),
    "other protocol": lambda c, r, kit: kit.altered(c.release(r), protocol_version=2),
    "kind of a request": lambda c, r, kit: kit.altered(c.release(r), kind="TrainRequest"),
    "kind of anything": lambda c, r, kit: kit.altered(c.release(r), kind="x" * 100_000),
    "no kind": lambda c, r, kit: kit.altered(c.release(r), kind=None),
    "a description": lambda c, r, kit: c.description(),
    "spent of uneven columns": lambda c, r, kit: kit.altered(c.release(r), spent__count=[1, 2, 3]),
    "spent less than nothing": lambda c, r, kit: kit.altered(c.release(r), spent__count=[-5, 1]),
    "spent without noise": lambda c, r, kit: kit.altered(c.release(r), spent__noise_multiplier=[-1.0, 1.0]),
    "spent on a name": lambda c, r, kit: kit.altered(c.release(r), spent__phase=["x" * 10**5, "training"]),
    "empty records": lambda c, r, kit: RecordDict({"arrays": ArrayRecord(), "values": ConfigRecord()}),
    "no records": lambda c, r, kit: RecordDict(),
    "other records": lambda c, r, kit: RecordDict({"metrics": MetricRecord({"loss": 0.1})}),
    "one record more": lambda c, r, kit: RecordDict({**to_content(encode(c.release(r))), "x": MetricRecord()}),
    "damaged bytes": lambda c, r, kit: raw(kit.altered(c.release(r)), b"\x93NUMPY\x01\x00"),
    "no bytes": lambda c, r, kit: raw(kit.altered(c.release(r)), b""),
    "cut short": lambda c, r, kit: raw(kit.altered(c.release(r)), saved(vector(4))[:-1]),
    "an archive": lambda c, r, kit: raw(kit.altered(c.release(r)), zipped()),
    "half an archive": lambda c, r, kit: raw(kit.altered(c.release(r)), zipped()[:20]),
    "a pickle": lambda c, r, kit: raw(kit.altered(c.release(r)), saved(np.array([{}]), allow_pickle=True)),
    "more than there is": lambda c, r, kit: raw(
        kit.altered(c.release(r)), saved(vector(4)).replace(b"(4,), }" + b" " * 12, b"(4000000000000,), }")
    ),
    "of a foreign type": lambda c, r, kit: raw(kit.altered(c.release(r)), b"", stype="torch"),
    "another's data set": lambda c, r, kit: c.release(r, data_set="another"),
}


class TestReplies:
    @pytest.mark.parametrize("name", REPLIES)
    def test_what_cannot_be_used_is_left_out(self, kit, name):
        clients = [kit.Client("honest"), kit.Client("liar", {2: lambda c, r: REPLIES[name](c, r, kit)}, value=0.7)]
        alone = kit.Federation([kit.Client("honest"), kit.Client("b", {2: lambda c, r: kit.LOST}, value=0.7)])
        federation = kit.Federation(clients)
        federation.run()
        alone.run(timeout=0.05)
        assert [report.clients for report in federation.reports] == [2, 1, 2, 2]
        np.testing.assert_array_equal(federation.state.optimiser.weights, alone.state.optimiser.weights)
        assert (federation.account(0).events, federation.account(0).warnings) == (clients[0].spent, [])
        assert federation.strategy.cohort.refused == {}

    @pytest.mark.parametrize("name", ["huge", "no kind", "another run", "another's data set"])
    def test_who_keeps_sending_it_is_left_alone(self, kit, name):
        script = dict.fromkeys(range(2, 9), lambda c, r: REPLIES[name](c, r, kit))
        federation = kit.Federation([kit.Client("honest"), kit.Client("liar", script)], federation__num_rounds=8)
        federation.run()
        assert len(federation.clients[1].requests) == 4
        (refusal,) = federation.strategy.cohort.refused.values()
        assert refusal.code == "message"
        assert len(refusal.message) <= 300

    @pytest.mark.parametrize(
        "scores", [None, np.arange(7.0, dtype=np.float32), vector(8, NAN), vector(8, dtype=np.float64)]
    )
    def test_pretraining_without_a_score_for_each_coordinate_is_left_out(self, kit, scores):
        script = {1: lambda c, r: kit.altered(c.release(r), importance=scores)}
        federation = kit.Federation([kit.Client("honest"), kit.Client("liar", script)])
        federation.run()
        assert [report.clients for report in federation.reports] == [1, 2, 2, 2]
        assert federation.state.importance.scores[""].tolist() == [2500 / 4 * score for score in range(8)]

    def test_scores_in_training_are_ignored(self, kit):
        script = {2: lambda c, r: c.release(r, importance=vector(8, 100.0))}
        federation = kit.Federation([kit.Client("a", script)])
        federation.run()
        assert federation.state.importance.scores[""].tolist() == [2500 / 4 * score for score in range(8)]

    def test_text_of_a_client_is_short_and_printable_wherever_it_shows(self, kit, caplog):
        text = "\x1b[2J\nfine\u202e" * 1000
        script = dict.fromkeys((2, 3, 4), lambda c, r: c.refusal(text, text))
        federation = kit.Federation([kit.Client("honest"), kit.Client("liar", script)])
        federation.run()
        (refusal,) = federation.strategy.cohort.refused.values()
        for shown in (refusal.code, refusal.message, *(record.getMessage() for record in caplog.records)):
            assert len(shown) < 400
            assert shown.isprintable()


DESCRIPTIONS = {
    "no records": {"num_records": 0},
    "negative records": {"num_records": -100},
    "more records than the world": {"num_records": 2**62},
    "records as float": {"num_records": 1e3},
    "no noise": {"training_noise_multiplier": 0.0},
    "hardly any noise": {"training_noise_multiplier": 1e-300},
    "negative noise": {"training_noise_multiplier": -1.0},
    "noise that is no number": {"training_noise_multiplier": float("nan")},
    "infinite noise": {"pretraining_noise_multiplier": float("inf")},
    "endless noise": {"pretraining_noise_multiplier": 1e300},
    "delta of nothing": {"target_delta": 0.0},
    "delta of everything": {"target_delta": 1.0},
    "negative delta": {"target_delta": -1e-5},
    "no budget": {"target_epsilon": 0.0},
    "a negative budget": {"target_epsilon": -8.0},
    "no data set": {"data_set": ""},
    "a path for a data set": {"data_set": "../../checkpoint"},
    "an endless data set": {"data_set": "x" * 100_000},
    "a name of many digits": {"name": "9" * 10_000},
    "a name with escapes": {"name": "\x1b[2Jclient"},
    "a device of two lines": {"device": "cpu\ncuda"},
    "spent of uneven columns": {"spent__count": [1]},
    "not a description": {"kind": "TrainReply"},
}


class TestDescriptions:
    @pytest.mark.parametrize("name", DESCRIPTIONS)
    def test_that_make_no_sense_are_refused(self, kit, name):
        script = {0: lambda c, r: kit.altered(c.description(), **DESCRIPTIONS[name])}
        federation = kit.Federation([kit.Client("honest"), kit.Client("liar", script)])
        federation.run()
        assert federation.clients[1].requests == []
        assert [account.name for account in federation.state.tally.accounts] == ["honest"]
        assert [refusal.code for refusal in federation.strategy.cohort.refused.values()] == ["message"]
        assert [report.clients for report in federation.reports] == [1] * 4

    def test_a_name_of_digits_is_a_name(self, kit):
        federation = kit.Federation([kit.Client("9" * 100), kit.Client("client-007"), kit.Client("")])
        federation.run()
        assert [entry["id"] for entry in federation.state.tally.report()][-1] == "client-007"

    @pytest.mark.parametrize(
        "spent",
        [
            (Event("training", 1.0, 0.5, 2**62),),
            (Event("training", 1e300, 0.5, 3),),
            (Event("training", 1.0, 1e-320, 3),),
            (Event("training", 0.0, 0.5, 3),),
            tuple(Event("training", 1 + index / 1e5, 0.5) for index in range(20_000)),
        ],
        ids=["count", "noise", "sampling", "no noise", "kinds"],
    )
    def test_events_that_nobody_can_account_for_have_an_infinite_epsilon(self, kit, spent):
        script = dict.fromkeys((0,), lambda c, r: c.description(spent=spent))
        script |= dict.fromkeys((1, 2, 3, 4), lambda c, r: c.release(r, spent=(*spent, *c.spent)))
        federation = kit.Federation([kit.Client("honest"), kit.Client("liar", script)])
        begun = time.process_time()
        federation.run()
        assert time.process_time() - begun < 5
        assert federation.account(1).epsilon == float("inf")
        assert "it has spent more than its budget" in federation.account(1).report()["warnings"]
        assert federation.account(0).warnings == []


class TestWordsAboutOthers:
    """Whatever names another's data set touches nobody's account."""

    def victim(self, federation):
        return federation.account(0).events, federation.account(0).warnings, federation.account(0).releases

    @pytest.mark.parametrize("number", [0, 1, 2, 3])
    def test_a_refusal(self, kit, number):
        honest = kit.Client("honest")
        script = {number: lambda c, r: c.refusal("internal", data_set=honest.data_set, spent=HUGE)}
        federation = kit.Federation([honest, kit.Client("liar", script)])
        federation.run()
        assert self.victim(federation) == (honest.spent, [], 4)

    @pytest.mark.parametrize("late", [False, True])
    def test_a_reply(self, kit, late):
        honest = kit.Client("honest")

        def lie(client, request):
            reply = client.release(request, data_set=honest.data_set, spent=HUGE)
            return kit.Later(reply) if late else reply

        federation = kit.Federation([honest, kit.Client("liar", {2: lie})])
        federation.run(timeout=0.1)
        assert self.victim(federation) == (honest.spent, [], 4)

    def test_a_description(self, kit):
        honest = kit.Client("honest")
        liar = kit.Client("liar", {0: lambda c, r: c.description(data_set=honest.data_set, spent=HUGE, num_records=9)})
        federation = kit.Federation([honest, liar])
        federation.run()
        assert self.victim(federation) == (honest.spent, [], 4)
        assert (federation.account(0).name, federation.account(0).num_records) == ("honest", 100)

    def test_late_words_of_one_who_was_left_alone(self, kit):
        honest = kit.Client("honest")
        script = {
            1: lambda c, r: kit.Later(c.release(r, data_set=honest.data_set, spent=HUGE), 2),
            2: lambda c, r: c.refusal("budget"),
        }
        federation = kit.Federation([honest, kit.Client("liar", script)])
        federation.run(timeout=0.1)
        assert self.victim(federation) == (honest.spent, [], 4)

    def test_late_words_about_oneself_still_count(self, kit):
        script = {1: lambda c, r: kit.Later(c.release(r), 2), 2: lambda c, r: c.refusal("budget", spent=())}
        federation = kit.Federation([kit.Client("honest"), kit.Client("b", script)])
        federation.run(timeout=0.1)
        assert federation.account(1).events == federation.clients[1].spent != ()
        assert federation.account(1).releases == 1

    def test_the_check_would_find_it(self, kit, monkeypatch):
        """Negative control: with claims booked where the client says, the victim's account does change."""
        honest = kit.Client("honest")
        federation = kit.Federation([honest, kit.Client("liar", {2: lambda c, r: c.refusal(spent=HUGE)})])
        cohort, tally = federation.strategy.cohort, federation.state.tally
        monkeypatch.setattr(cohort, "refused_round", lambda node, said, fresh: tally[honest.data_set].claim(said.spent))
        federation.run()
        assert self.victim(federation) != (honest.spent, [], 4)


class TestLargestNorm:
    @pytest.mark.parametrize(
        ("sampling", "noise", "scale"), [(0.5, 0.0, 1.0), (0.01, 3.0, 1.0), (1.0, 0.5, 7.0), (1.0, 500.0, 1.0)]
    )
    def test_honest_releases_stay_below_by_far(self, sampling, noise, scale):
        """Every record drawn at the clipping norm, in one direction, plus noise."""
        generator, records, d, norm = np.random.default_rng(0), 200, 500, 2.0
        batch = sampling * records
        most = largest_norm(
            clipping_norm=norm,
            sampling_probability=sampling,
            noise_stddev=noise * norm / batch,
            num_retained=d,
            scale=scale,
        )
        for _ in range(200):
            total = np.zeros(d)
            total[0] = norm * generator.binomial(records, sampling)
            released = scale * (total + generator.normal(size=d) * noise * norm) / batch
            assert np.linalg.norm(released) < most / 2
