"""What the owner of a node allows: nothing by default, and never more than the file says."""

import json
import os
import sys
from dataclasses import replace

import pytest

from adadpigu_core import factories, models
from adadpigu_core.accounting import Event, Plan
from adadpigu_core.exceptions import ConfigurationError, PolicyError
from adadpigu_core.ledger import Target
from adadpigu_core.messages import Description, Refusal, TrainReply
from adadpigu_core.models import ModelSpec
from adadpigu_core.provenance import code_fingerprint
from client.policy import Limits, load, template

CODE = "0.1.0+0123456789ab"
TARGET = Target(4.0, 1e-5)


@pytest.fixture
def write(tmp_path):
    """Write a policy with some text exchanged, and give its path."""

    def write(old="", new="", *, text=None):
        path = tmp_path / "policy.toml"
        whole = template("patients", TARGET, CODE) if text is None else text
        assert old in whole
        path.write_text(whole.replace(old, new) if old else whole)
        path.chmod(0o644)
        return path

    return write


def problems(path):
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert caught.value.public_message == "the node's own policy cannot be used"
    return str(caught.value)


def refused(reply):
    assert isinstance(reply, Refusal), reply
    assert reply.code == "policy", reply
    return reply.message


class TestFile:
    def test_the_one_that_init_writes_can_be_used(self, write):
        limits = load(write()).of("patients")
        assert limits == Limits(TARGET, 0.5, 0.5, 10, models=None, factories=False, code=frozenset({CODE}))

    @pytest.mark.parametrize("name", ['pa"ti\\ents', "npz:/data/site.npz", "Pläne\x7f\n"])
    def test_a_data_set_may_have_any_name(self, write, name):
        assert load(write(text=template(name, TARGET, CODE))).of(name).target == TARGET

    def test_each_data_set_has_its_own_budget(self, write):
        path = write("[limits]", '[data-sets."others"]\nepsilon = 1\ndelta = 1e-6\n\n[limits]')
        assert load(path).of("others").target == Target(1.0, 1e-6)
        assert load(path).of("patients").target == TARGET

    def test_a_data_set_without_a_budget_is_refused(self, write):
        with pytest.raises(ConfigurationError, match="no budget for the data set 'strangers'") as caught:
            load(write()).of("strangers")
        assert "strangers" not in caught.value.public_message

    def test_without_a_file_nothing_is_allowed(self, tmp_path):
        assert "'adadpigu policy init' writes one" in problems(tmp_path / "none.toml")

    @pytest.mark.parametrize("text", ["version = ", "\xff", "a = " + "[" * 2000])
    def test_what_is_not_toml(self, write, text):
        path = write(text="")
        path.write_bytes(text.encode("latin-1"))
        assert "is not TOML" in problems(path)

    @pytest.mark.skipif(os.name != "posix", reason="needs file modes")
    @pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
    def test_one_that_others_may_write_is_refused(self, write, mode):
        path = write()
        path.chmod(mode)
        assert "others may write this policy" in problems(path)

    @pytest.mark.skipif(os.name != "posix", reason="needs file modes")
    def test_one_that_others_may_exchange_is_refused(self, write):
        path = write()
        path.parent.chmod(0o777)
        assert f"exchange the policy {path}" in problems(path)

    @pytest.mark.parametrize(
        ("old", "new", "problem"),
        [
            ("version = 1", "version = 2", "version: this software knows version 1, not 2"),
            ("version = 1", "", "version: this software knows version 1, not None"),
            ("[limits]", "[limit]", "limit: there is no such table"),
            ("[limits]", "[limit]", "limits: this table is missing"),
            ('[data-sets."patients"]', "[patients]", "data-sets: name at least one"),
            ("epsilon = 4.0", "epsilon = 0", "epsilon: must be a number above 0, got 0"),
            ("epsilon = 4.0", "epsilon = inf", "epsilon: must be a number above 0, got inf"),
            ("epsilon = 4.0", "epsilon = nan", "epsilon: must be a number above 0, got nan"),
            ("epsilon = 4.0", "epsilon = true", "epsilon: must be"),
            ("epsilon = 4.0", "epsilon = '4'", "epsilon: must be"),
            ("epsilon = 4.0", "", 'data-sets."patients".epsilon: is missing; nothing is allowed by default'),
            ("delta = 1e-05", "delta = 1", "delta: must be a number between 0 and 1"),
            ("multiplier = 0.5", "multiplier = 0.0", "smallest-noise-multiplier: must be a number from 0.3"),
            ("probability = 0.5", "probability = 1.5", "largest-sampling-probability: must be"),
            ("per-round = 10", "per-round = 0", "largest-steps-per-round: must be a number from 1"),
            ("per-round = 10", "per-round = 2.5", "largest-steps-per-round: must be"),
            ("largest-steps-per-round = 10", "", "largest-steps-per-round: is missing"),
            ('models = "any"', 'models = "all"', 'models: must be "any" or a list'),
            ('models = "any"', "models = []", 'models: must be "any" or a list'),
            ('models = "any"', 'models = ["any"]', 'models: must be "any" or a list'),
            ('models = "any"', "models = [1]", 'models: must be "any" or a list'),
            (f'["{CODE}"]', '["0.1.0"]', 'code: must be "any" or a list'),
            ('models = "any"', 'model = "any"', "allowed.model: there is no such setting"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, write, old, new, problem):
        assert problem in problems(write(old, new))

    def test_all_problems_are_reported_at_once(self, write):
        text = problems(write(text='version = 1\n[limits]\n[allowed]\nmodels = "none"'))
        assert text.count("  * ") == 6


class TestLimits:
    def limits(self, **changes):
        return replace(Limits(TARGET, 1.0, 0.5, 10, None, False, None), **changes)

    def test_code(self):
        self.limits().check_code("anything")
        listed = self.limits(code=frozenset({CODE}))
        listed.check_code(CODE)
        with pytest.raises(PolicyError, match=r"does not allow the code 0\.1\.0\+ba"):
            listed.check_code("0.1.0+ba9876543210")

    def test_any_model_is_any_of_this_package(self):
        def never():
            raise AssertionError("nothing of it may even be looked at")

        self.limits().check_model("mlp", never)
        with pytest.raises(PolicyError, match="named by an import path"):
            self.limits().check_model("os:system", never)

    def test_a_list_of_models_allows_what_it_names(self):
        listed = self.limits(models=frozenset({"0" * 16}), factories=True)
        listed.check_model("own.nets:wide", lambda: "0" * 16)
        with pytest.raises(PolicyError, match=f"the model mlp with fingerprint {'1' * 16}"):
            listed.check_model("mlp", lambda: "1" * 16)

    def test_what_is_installed_here_is_not_told(self):
        def missing():
            raise ConfigurationError("not installed", "not installed")

        listed = self.limits(models=frozenset({"0" * 16}), factories=True)
        texts = set()
        for fingerprint in (missing, lambda: "1" * 16):
            with pytest.raises(PolicyError) as caught:
                listed.check_model("own.nets:wide", fingerprint)
            texts.add(caught.value.public_message)
        assert texts == {"the policy of this client does not allow the model own.nets:wide"}

    def test_noise_is_raised_and_never_lowered(self):
        plan = Plan(Event("pretraining", 0.7, 0.5, 1), Event("training", 3.0, 0.5, 2))
        assert self.limits().quieten(plan) == Plan(Event("pretraining", 1.0, 0.5, 1), plan.training)

    @pytest.mark.parametrize(
        ("event", "text"),
        [
            (Event("training", 0.9, 0.5, 1), "at least 1 now, and the plan of this run has 0.9"),
            (Event("training", 1.0, 0.6, 1), "a sampling probability of at most 0.5, not 0.6"),
            (Event("training", 1.0, 0.5, 11), "at most 10 steps a round, not 11"),
        ],
    )
    def test_a_round(self, event, text):
        with pytest.raises(PolicyError, match=text):
            self.limits().check_round(event)
        self.limits().check_round(Event("training", 1.0, 0.5, 10))


class TestNode:
    """The policy stands above whatever a server asks."""

    def test_without_a_policy_a_node_refuses(self, node):
        node.write_policy = lambda: node.policy.unlink(missing_ok=True)
        for ask in (node.describe, node.train):
            reply = ask()
            assert (reply.code, reply.message) == ("configuration", "the node's own policy cannot be used")
        assert not node.ledger.exists()

    def test_a_larger_sampling_probability_is_refused(self, node):
        node.limits["largest-sampling-probability"] = 0.4
        assert "at most 0.4, not 0.5" in refused(node.describe())
        assert node.rows("plans") == []

    def test_noise_is_raised_to_the_smallest_that_is_allowed(self, node):
        node.limits["smallest-noise-multiplier"] = 50.0
        reply = node.describe()
        assert (reply.pretraining_noise_multiplier, reply.training_noise_multiplier) == (50.0, 50.0)
        (event,) = node.train().spent
        assert event.noise_multiplier == 50.0

    @pytest.mark.parametrize(
        ("key", "value", "text"),
        [
            ("smallest-noise-multiplier", 50.0, "start a new run"),
            ("largest-sampling-probability", 0.1, "at most 0.1"),
            ("largest-steps-per-round", 1, "at most 1 steps a round, not 2"),
        ],
    )
    def test_a_policy_that_becomes_stricter_holds_at_once(self, node, key, value, text):
        node.describe(steps_per_round=2)
        node.limits[key] = value
        assert text in refused(node.train(steps=2))
        assert node.charged() == ([], [])

    def test_code_that_is_not_listed_is_refused(self, described):
        described.allowed["code"] = [CODE]
        assert f"does not allow the code {code_fingerprint()}" in refused(described.train())
        described.allowed["code"] = [CODE, code_fingerprint()]
        assert isinstance(described.train(), TrainReply)

    def test_a_model_that_is_not_listed_is_refused(self, node, requests):
        node.allowed["models"] = ["0" * 16]
        own = models.fingerprint(requests.spec)
        assert f"the model linear with fingerprint {own}" in refused(node.describe())
        node.allowed["models"] = [own]
        assert isinstance(node.describe(), Description)


FACTORY = """
from torch import nn
open({mark!r}, "a").close()

def net(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear({features}, num_classes))
"""


class TestOwnModel:
    """A model by import path is the node's own code, and not even imported before the policy allows it."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        folder = tmp_path / "path" / "hospital_networks"
        folder.mkdir(parents=True)
        self.mark = tmp_path / "imported"
        (folder / "__init__.py").write_text("")
        (folder / "nets.py").write_text(FACTORY.format(mark=str(self.mark), features=4))
        monkeypatch.syspath_prepend(folder.parent)
        for name in ("hospital_networks", "hospital_networks.nets"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        yield folder
        for name in ("hospital_networks", "hospital_networks.nets"):
            sys.modules.pop(name, None)

    SPEC = ModelSpec("hospital_networks.nets:net", "relu", "none", (4,), 3)

    def test_is_trained_if_it_is_listed(self, node, package):
        node.allowed["models"] = [models.fingerprint(self.SPEC)]
        assert not self.mark.exists()
        assert isinstance(node.describe(model=self.SPEC, layout=""), Description)
        assert self.mark.exists()
        assert isinstance(node.train(model=self.SPEC), TrainReply)

    @pytest.mark.parametrize("allowed", ["any", ["0" * 16]])
    def test_is_not_imported_otherwise(self, node, package, allowed, caplog):
        node.allowed["models"] = allowed
        message = refused(node.describe(model=self.SPEC, layout=""))
        assert message == "the policy of this client does not allow the model hospital_networks.nets:net"
        assert (models.fingerprint(self.SPEC) in caplog.text) == (allowed != "any")
        assert not self.mark.exists()

    def test_other_source_is_another_model(self, node, package):
        node.allowed["models"] = [models.fingerprint(self.SPEC)]
        (package / "more.py").write_text("import os")
        assert "does not allow" in refused(node.describe(model=self.SPEC, layout=""))
        assert not self.mark.exists()

    def test_one_that_is_not_installed(self, node, caplog):
        node.allowed["models"] = ["0" * 16]
        refused(node.describe(model=ModelSpec("not_here.nets:net", "relu", "none", (4,), 3), layout=""))
        assert "the package not_here is not installed on this machine" in caplog.text

    @pytest.mark.parametrize("name", ["sys:exit", "math:sin"])
    def test_compiled_code_has_no_fingerprint(self, name):
        with pytest.raises(ConfigurationError, match=r"not made of Python files|not installed"):
            factories.source_fingerprint(name)

    @pytest.mark.parametrize("name", ["os", ":x", "os:", "os.:x", "../x:y", "os:path.join", "os:x y", "a:" + "b" * 300])
    def test_what_is_no_import_path(self, name):
        assert not factories.is_factory(name)
        with pytest.raises(ConfigurationError, match="unknown model"):
            ModelSpec(name, "relu", "none", (4,), 3)

    def test_a_factory_that_fails_keeps_its_text_here(self, node, package, caplog):
        (package / "nets.py").write_text("def net(input_shape, num_classes):\n    raise RuntimeError('secret')")
        node.allowed["models"] = [models.fingerprint(self.SPEC)]
        reply = node.describe(model=self.SPEC, layout="")
        assert (reply.code, reply.message) == ("model", "model hospital_networks.nets:net: its factory fails")
        assert "secret" in caplog.text


def test_the_names_in_a_template_are_quoted():
    assert json.dumps("a.b") in template("a.b", TARGET, CODE)
