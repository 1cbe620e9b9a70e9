"""A deployed client under a front end and with views: named in the task, checked by the policy, charged as ever."""

import numpy as np
import pytest
import torch

import client.site
from adadpigu_core import front_ends
from adadpigu_core.kept_features import FOLDER_VARIABLE
from adadpigu_core.models import ModelSpec, build, fingerprint
from adadpigu_core.parameters import ParameterLayout, flatten
from client.site import site

SPEC = ModelSpec("linear", "relu", "none", (1, 8, 8), 3, features="scattering")


@pytest.fixture
def images(node):
    generator = np.random.default_rng(0)
    np.savez(node.data, x=generator.random((30, 8, 8), dtype=np.float32), y=np.arange(30) % 3)
    return node


def asked(spec=SPEC, **more):
    weights = flatten(build(spec, seed=0)).numpy()
    return {"model": spec, "weights": weights, **more}


def described(node, spec=SPEC):
    return node.describe(model=spec, layout=ParameterLayout.of(build(spec, seed=0)).fingerprint)


def test_the_network_sees_the_features(images):
    assert type(described(images)).__name__ == "Description"
    reply = images.train(**asked())
    assert len(reply.update) == 3 * (81 * 2 * 2 + 1)


def test_a_client_that_owns_records_keeps_no_features_on_disk(images, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setenv(FOLDER_VARIABLE, str(kept))
    described(images)
    images.train(**asked())
    assert not kept.exists()


def test_simulated_clients_take_their_share_of_what_is_kept(tmp_path, monkeypatch):
    settings = {"task.dataset": "digits", "federation.num-clients": 3, "runtime.output": str(tmp_path)}
    node = {"partition-id": 1, "num-partitions": 3, "simulation": True}
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    forget()
    own = site(node, settings, 1)
    wanted = own.under("scattering")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    forget()
    for _ in range(2):  # made, then read
        found = site(node, settings, 1).under("scattering")
        assert torch.allclose(found.features, wanted.features, atol=1e-5)
        assert torch.equal(found.labels, wanted.labels)
        assert len(list((tmp_path / "kept").iterdir())) == 1
        forget()
    assert site(node, settings, 1).under("raw") is own.records


def forget():
    """As a new process would, which still holds the records."""
    client.site._features_of.cache_clear()
    client.site._all_features.cache_clear()


def test_views_are_drawn_by_the_client_and_cost_no_more(images):
    raw = ModelSpec("linear", "relu", "none", (1, 8, 8), 3)
    described(images, raw)
    plain = images.train(**asked(raw))
    several = images.train(**asked(raw, round=2, views=4, augmentation="shifts"))
    assert [event.noise_multiplier for event in plain.spent] == [several.spent[0].noise_multiplier]
    assert sum(event.count for event in several.spent) == 2 * plain.spent[0].count


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"views": 1000, "augmentation": "shifts"}, "views"),
        ({"views": 2}, "views"),
        ({"augmentation": "rotations"}, "rotations"),
        ({"model.features": "magic"}, "magic"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_is_charged(images, requests, changes, names):
    raw = ModelSpec("linear", "relu", "none", (1, 8, 8), 3)
    described(images, raw)
    reply = images.ask(requests.train(**asked(raw)), changes)
    assert type(reply).__name__ == "Refusal"
    assert names in reply.message
    assert reply.spent == ()


def test_a_front_end_has_a_fingerprint_of_its_own_and_raw_models_keep_theirs():
    raw = ModelSpec("linear", "relu", "none", (1, 8, 8), 3)
    assert fingerprint(SPEC) != fingerprint(raw)
    # as in releases without front ends, so that policies go on to hold
    assert fingerprint(ModelSpec("mnist-cnn", "relu", "group", (1, 28, 28), 10)) == "86ba9c02f77eae85"


def test_the_features_are_those_of_the_front_end():
    raw = torch.rand(2, 1, 8, 8)
    assert front_ends.features("scattering", raw).shape[1:] == SPEC.feature_shape == (81, 2, 2)
