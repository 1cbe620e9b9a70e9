"""A model of which a part is not trained: the server says what that part is, and nothing else will do."""

import sys

import numpy as np
import pytest

import client.node
from adadpigu_core.messages import Description, Refusal, TrainReply
from adadpigu_core.models import ModelSpec, build, fingerprint
from adadpigu_core.parameters import ParameterLayout, flatten, flatten_fixed

NETWORK = """
from torch import nn

def net(input_shape, num_classes):
    model = nn.Sequential(nn.Linear(input_shape[0], 5), nn.Tanh(), nn.Linear(5, num_classes))
    model[0].requires_grad_(False)
    return model
"""
FIXED = np.linspace(-1, 1, 25, dtype=np.float32)  # 4 features x 5 units, and 5 biases


@pytest.fixture
def ask(node, tmp_path, monkeypatch):
    """Asks a deployed node for a round of such a model."""
    (tmp_path / "partly_frozen.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    spec = ModelSpec("partly_frozen:net", "relu", "none", (4,), 3)
    model = build(spec, seed=5)
    node.allowed["models"] = [fingerprint(spec)]
    assert isinstance(node.describe(model=spec, layout=ParameterLayout.of(model).fingerprint), Description)
    yield lambda **changes: node.train(model=spec, weights=flatten(model).numpy(), **changes)
    sys.modules.pop("partly_frozen", None)


def test_a_client_trains_on_what_it_is_sent(ask, monkeypatch):
    seen, train = [], client.node.train_round

    def watching(model, *arguments, **options):
        seen.append(flatten_fixed(model))
        return train(model, *arguments, **options)

    monkeypatch.setattr(client.node, "train_round", watching)
    reply = ask(fixed=FIXED)
    assert isinstance(reply, TrainReply), reply
    assert reply.update.shape == (5 * 3 + 3,)
    assert [fixed.tolist() for fixed in seen] == [FIXED.tolist()]


@pytest.mark.parametrize("fixed", [None, FIXED[:-1], np.append(FIXED, np.float32(0))], ids=["none", "short", "long"])
def test_its_own_draw_is_never_used(ask, node, fixed):
    reply = ask(fixed=fixed)
    assert isinstance(reply, Refusal)
    given = 0 if fixed is None else len(fixed)
    assert reply.message == f"fixed: the model has 25 values beside its trainable parameters, got {given}"
    assert node.charged() == ([], [])
