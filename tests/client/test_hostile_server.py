"""A server that wants more: whatever it asks is refused or harmless, and the ledger holds what was released."""

import numpy as np
import pytest
import torch

from adadpigu_core import masking
from adadpigu_core.accounting import epsilon
from adadpigu_core.messages import Refusal, TrainReply

D = 15


def one_coordinate(index):
    mask = torch.arange(D) == index
    return {"mask": masking.pack(mask), "mask_id": masking.fingerprint(mask)}


WISHES = {
    "enormous scale": {"gradient_scale": np.full(2, 1e30, np.float32)},
    "largest scale": {"gradient_scale": np.full(2, np.finfo(np.float32).max)},
    "tiny scale": {"gradient_scale": np.full(2, 1e-30, np.float32)},
    "smallest scale": {"gradient_scale": np.full(2, np.float32(1e-45))},
    "uneven scale": {"gradient_scale": np.array([1e-20, 1e20], np.float32)},
    "enormous mean": {"gradient_mean": np.full(D, 1e30, np.float32)},
    "enormous weights": {"weights": np.full(D, 1e30, np.float32)},
    "enormous clipping norm": {"clipping_norm": 1e300},
    "tiny clipping norm": {"clipping_norm": 1e-300},
    "enormous rate": {"learning_rate": 1e300},
    "tiny rate": {"learning_rate": 1e-300},
    "one coordinate": one_coordinate(3),
    "one coordinate of a great scale": {**one_coordinate(3), "gradient_scale": np.array([1e10, 1.0], np.float32)},
}


@pytest.mark.parametrize("wish", WISHES)
def test_extreme_numbers_are_refused_or_charged(described, wish):
    reply = described.train(**WISHES[wish])
    charges, releases = described.charged()
    if isinstance(reply, Refusal):
        assert reply.code in ("message", "internal"), reply
        assert len(charges) == len(releases) <= 1
    else:
        assert (len(charges), len(releases)) == (1, 1)
        assert [event.count for event in reply.spent] == [1]
    again = described.train(**WISHES[wish])
    assert type(again) is type(reply)
    assert described.charged() == (charges, releases)


def test_a_mean_that_leaves_nothing_but_rounding_errors_is_refused_before_the_charge(described):
    before = described.charged()
    reply = described.train(gradient_mean=np.full(D, 1e6, np.float32))
    assert isinstance(reply, Refusal)
    assert reply.message.startswith("gradient-mean: over the scale it is 3.87e+06 times as long as the clipping norm")
    assert described.charged() == before


TERMINAL = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize("text", [TERMINAL, "one\nERROR all is lost", "x" * 10**6, "reconciled-\u202e"])
@pytest.mark.parametrize(
    ("ask", "field"), [("describe", "run"), ("describe", "layout"), ("train", "run"), ("train", "mask-id")]
)
def test_texts_cannot_write_on_the_owners_terminal(described, requests, caplog, ask, field, text):
    """Runs stand in the ledger, and a refusal says in the log what was asked for."""
    before = described.rows("plans"), described.charged()
    caplog.clear()
    reply = described.ask(getattr(requests, ask)(), {field: text})
    assert (type(reply), reply.code) == (Refusal, "message")
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert len(caplog.text) < 1000
    assert (described.rows("plans"), described.charged()) == before


def test_a_mask_that_isolates_a_coordinate_meets_noise_of_full_size(make_node, tmp_path):
    """Each coordinate has the noise of the whole clipping norm, however few are retained."""
    values = []
    for index in range(12):
        folder = tmp_path / str(index)
        folder.mkdir()
        node = make_node(folder=folder)
        # no record at all changes anything: all features and thus the gradients of the first layer's row are zero
        node.save(x=np.zeros((60, 4), np.float32), y=np.arange(60) % 3)
        description = node.describe()
        values.append(float(node.train(**one_coordinate(3)).update[0]))
    stddev = 0.5 * description.training_noise_multiplier / (0.5 * 60)
    assert 0.25 * stddev < float(np.std(values)) < 2.0 * stddev
    assert min(abs(value) for value in values) > 0


def test_any_number_of_rounds_ends_at_the_budget(described):
    numbers = [*range(1, 30), 10_000, 2**31 - 1]
    replies = [described.train(round=number) for number in numbers]
    released = [reply for reply in replies if isinstance(reply, TrainReply)]
    assert len(released) == 4
    assert {reply.message for reply in replies[4:6]} == {
        "round: the plan of this run has rounds 1 to 4, not 5",
        "round: the plan of this run has rounds 1 to 4, not 6",
    }
    spent = replies[-1].spent
    assert sum(event.count for event in spent) == len(released) == len(described.rows("charges"))
    assert epsilon(spent, 1e-5) <= 8.0


def test_any_number_of_runs_ends_at_the_budget(described):
    """Each new run is planned within what is left; a run that was planned before gets no more than that."""
    described.describe(run="run-0", training_steps=3)
    for number in range(2, 6):
        described.describe(run=f"run-{number}")
    for run in ("run-1", "run-0", *(f"run-{number}" for number in range(2, 6))):
        for number in range(1, 5):
            described.train(run=run, round=number)
    events = described.describe(run="run-9").spent
    assert epsilon(events, 1e-5) <= 8.0
    assert sum(event.count for event in events) == len(described.rows("charges"))
