"""Settings: defaults, checks that name the key, and the way through TOML and back."""

import math
import tomllib
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adadpigu_core.configuration as module
from adadpigu_core import settings_file
from adadpigu_core.configuration import Configuration, flatten, parse, to_toml
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.home import run_folder
from adadpigu_core.messages import MOST_STEPS, printable
from adadpigu_core.settings_file import read_toml

DEFAULTS = flatten(Configuration())
ENTRIES = dict(module._entries())


def problems(flat):
    """What is wrong with settings, as lines; none if they are fine."""
    try:
        parse(flat)
    except ConfigurationError as error:
        return [line.removeprefix("  * ") for line in str(error).splitlines()[1:]]
    return []


def allowed(key):
    """Values that a setting may have."""
    limits, default = ENTRIES[key].metadata, DEFAULTS[key]
    if limits["choices"]:
        return st.sampled_from(limits["choices"])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, str):
        known = {"task.dataset": ["digits", "npz:ü", "csv:ü#ä"], "task.model": ["auto", "mlp", "own.nets:wide"]}
        return st.sampled_from(known[key]) if key in known else st.text(st.characters(codec="utf-8"))
    low, high = max(limits["least"], limits["above"]), min(limits["most"], limits["below"])
    if isinstance(default, int):
        most = 1000 if key.startswith("federation") else 2**63 - 1
        return st.integers(int(low), most if math.isinf(high) else int(high))
    return st.floats(
        low,
        None if math.isinf(high) else high,
        exclude_min=math.isfinite(limits["above"]),
        exclude_max=math.isfinite(limits["below"]),
        allow_nan=False,
        allow_infinity=False,
        allow_subnormal=False,
    )


@st.composite
def configurations(draw):
    flat = {key: draw(allowed(key)) for key in draw(st.sets(st.sampled_from(sorted(DEFAULTS))))}
    ends = [flat.get(f"retention.{name}-ratio", DEFAULTS[f"retention.{name}-ratio"]) for name in ("initial", "final")]
    flat["retention.initial-ratio"], flat["retention.final-ratio"] = min(ends), max(ends)
    if flat.get("pretraining.round-share") == 0:
        flat["pretraining.ranking"] = "random"
        if flat.get("method") == "paper":  # it ranks by what pretraining finds, and needs some
            del flat["method"]
    if flat.get("pretraining.ranking", "consensus") != "consensus":
        flat["retention.rerank-every"] = 0
    if flat.get("training.augmentation", "none") == "none":
        flat["training.views"] = 1
    else:
        flat["task.features"] = "raw"
    if flat.get("federation.clients"):
        flat["federation.partition"] = "iid"
    return parse(flat)


class TestDefaults:
    def test_nothing_given_is_the_defaults(self):
        assert parse({}) == parse(DEFAULTS) == Configuration()

    def test_every_setting_is_listed_with_a_meaning(self):
        listed = list(module.settings())
        assert [(key, default) for key, default, *_ in listed] == list(DEFAULTS.items())
        assert all(meaning and "\n" not in meaning for *_, meaning in listed)
        allowed = {key: values for key, _, values, _ in listed}
        assert allowed["task.activation"] == "relu, tanh"
        assert allowed["privacy.target-delta"] == "above 0 and below 1"
        assert allowed["runtime.output"] == allowed["runtime.tensorboard"] == "", "nothing to choose from"
        assert len(listed) == 2 + sum(  # seed and method stand by themselves
            len(fields(entry.default)) for entry in fields(Configuration) if not entry.metadata
        )

    def test_keys_are_what_flower_carries(self):
        for key, value in DEFAULTS.items():
            assert key == key.lower()
            assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
            assert type(value) in (bool, int, float, str)

    def test_is_frozen(self):
        with pytest.raises(FrozenInstanceError):
            Configuration().privacy.target_epsilon = 100.0


class TestProblems:
    def test_all_are_reported_at_once_with_their_keys(self):
        flat = {
            "privacy.target-epsilon": -1,
            "privacy.target_delta": 1e-5,
            "federation.num-rounds": 2.5,
            "retention.schedule": "sometimes",
            "adaptive-clipping.centre": 1,
            "nonsense": 3,
        }
        found = problems(flat)
        assert sorted(line.split(":")[0] for line in found) == sorted(flat)
        with pytest.raises(ConfigurationError, match=r"^6 setting\(s\) cannot be used"):
            parse(flat)

    def test_an_unknown_key_has_a_hint(self):
        assert problems({"privacy.target-epsilom": 1.0}) == [
            "privacy.target-epsilom: there is no such setting; did you mean privacy.target-epsilon?"
        ]
        assert problems({"xyz": 1.0}) == ["xyz: there is no such setting; 'adadpigu settings' lists all keys"]

    @pytest.mark.parametrize("key", DEFAULTS)
    def test_values_of_other_types_are_refused_by_name(self, key):
        kind = type(DEFAULTS[key])
        others = [
            value for value in (True, 1, 1.5, "text", None, [1], {}, b"x", 2**70, -(2**70)) if type(value) is not kind
        ]
        for value in others:
            if kind is float and type(value) is int and abs(value) < 2**63:
                continue  # 4 is as good as 4.0
            found = problems({key: value})
            assert len(found) == 1, value
            assert found[0].startswith(f"{key}: ")

    @pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) in (int, float)])
    def test_numbers_out_of_range_are_refused_by_name(self, key):
        limits, kind = ENTRIES[key].metadata, type(DEFAULTS[key])
        outside = [
            limits["above"],
            limits["least"] - 1,
            limits["most"] + 1,
            limits["below"],
            math.nan,
            math.inf,
            -math.inf,
        ]
        for value in outside:
            if kind is int and not math.isfinite(value):
                continue
            found = problems({key: kind(value)})
            assert len(found) == 1, value
            assert found[0].startswith(f"{key}: {kind(value)} is out of range; it must be ")

    @pytest.mark.parametrize("key", [key for key, entry in ENTRIES.items() if entry.metadata["choices"]])
    def test_choices_are_listed(self, key):
        (found,) = problems({key: "none of these"})
        assert found == f"{key}: 'none of these' is none of {', '.join(ENTRIES[key].metadata['choices'])}"

    @pytest.mark.parametrize("key", ["privacy.target-epsilon", "federation.num-clients"])
    def test_a_number_of_ten_thousand_digits(self, key):
        (found,) = problems({key: 10**10_000})
        assert found.startswith(key)
        assert len(found) < 200

    def test_a_long_value_is_not_repeated(self):
        (found,) = problems({"seed": "x" * 10**6})
        assert len(found) < 200

    def test_text_that_cannot_be_written_is_refused(self):
        assert problems({"runtime.output": "runs/\udcff"}) == [
            "runtime.output: 'runs/\\udcff' cannot be written as UTF-8"
        ]

    def test_an_int_is_a_float(self):
        value = parse({"privacy.target-epsilon": 4}).privacy.target_epsilon
        assert (value, type(value)) == (4.0, float)

    @given(st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())))
    def test_whatever_is_given_every_key_of_it_is_named(self, flat):
        found = problems(flat)
        assert len(found) == len(flat)
        assert sorted(line.rpartition(": ")[0] for line in found) == sorted(printable(key, 100) for key in flat)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_each_of_several_bad_values_is_named(self, data):
        keys = data.draw(st.sets(st.sampled_from(sorted(DEFAULTS)), min_size=1))
        found = problems(dict.fromkeys(keys, (1, 2)))
        assert sorted(line.split(": ")[0] for line in found) == sorted(keys)


class TestContradictions:
    def test_coordinates_are_never_frozen_again(self):
        assert [line.split(":")[0] for line in problems({"task.weights": "public-digits"})] == ["task.weights"]
        assert problems({"task.weights": "public-digits", "task.dataset": "mnist"}) == []
        assert problems({"task.weights": "start.npz"}) == []
        flat = {"retention.initial-ratio": 0.6, "retention.final-ratio": 0.5}
        assert [line.split(":")[0] for line in problems(flat)] == ["retention.final-ratio"]
        assert problems({**flat, "retention.schedule": "constant"}) == []

    def test_a_ranking_needs_pretraining(self):
        flat = {"pretraining.round-share": 0.0}
        assert [line.split(":")[0] for line in problems(flat)] == ["pretraining.round-share"]
        assert problems({**flat, "pretraining.ranking": "random"}) == []
        assert problems({**flat, "retention.initial-ratio": 1.0}) == []
        anew = {**flat, "retention.rerank-every": 10, "federation.num-rounds": 11}
        assert problems(anew) == []
        (never,) = problems({**anew, "federation.num-rounds": 10})
        assert "retention.rerank-every below federation.num-rounds" in never

    @pytest.mark.parametrize("ranking", ["local", "random", "public", "oracle"])
    def test_only_a_consensus_is_ranked_anew(self, ranking):
        flat = {"pretraining.ranking": ranking, "retention.rerank-every": 5}
        (found,) = problems(flat)
        assert found.startswith(f"retention.rerank-every: needs pretraining.ranking = consensus, not {ranking}; ")
        assert found.endswith("rerank-every = 0")
        assert problems({**flat, "pretraining.ranking": "consensus"}) == []
        assert problems({**flat, "retention.rerank-every": 0}) == []
        assert problems({**flat, "method": "paper"}) == []

    def test_a_plan_has_an_end(self):
        flat = {"federation.num-rounds": MOST_STEPS, "federation.local-steps": 2}
        assert [line.split(":")[0] for line in problems(flat)] == ["federation.num-rounds"]

    @pytest.mark.parametrize("name", ["imagenet", "", "npz", "Digits"])
    def test_a_data_set_that_nobody_knows(self, name):
        (found,) = problems({"task.dataset": name})
        assert found.startswith(f"task.dataset: {name!r} is none of digits, ")
        assert problems({"task.dataset": "npz:mine.npz"}) == []

    def test_are_reported_with_unknown_keys(self):
        assert len(problems({"nonsense": 1, "pretraining.round-share": 0.0, "task.dataset": "x"})) == 3


class TestRoundTrips:
    @settings(max_examples=150, deadline=None)
    @given(configurations())
    def test_flatten_and_parse(self, configuration):
        assert parse(flatten(configuration)) == configuration

    @settings(max_examples=150, deadline=None)
    @given(configurations())
    def test_toml(self, configuration):
        text = to_toml(configuration)
        flat = dict(settings_file._flat(tomllib.loads(text)))
        assert flat == flatten(configuration)
        assert parse(flat) == configuration

    @pytest.mark.parametrize(
        "text", ['"', "\\", "\x7f", "\x00", "\x1f", "\n", "\u2028", "ü", "\U0001f600", "]\nseed = 1"]
    )
    def test_awkward_text(self, tmp_path, text):
        configuration = parse({"runtime.output": f"a{text}b"})
        path = tmp_path / "config.toml"
        path.write_text(to_toml(configuration), encoding="utf-8", newline="")
        assert parse(read_toml(path)) == configuration

    def test_a_file_of_nested_tables(self, tmp_path):
        path = tmp_path / "config.toml"
        path.write_text("seed = 3\n[privacy]\ntarget-epsilon = 2\n[retention]\nschedule = 'step'\n")
        configuration = parse(read_toml(path))
        expected = Configuration(seed=3)
        expected = replace(expected, privacy=replace(expected.privacy, target_epsilon=2.0))
        assert configuration == replace(expected, retention=replace(expected.retention, schedule="step"))

    @pytest.mark.parametrize(
        "content",
        [b"seed = ", b"\xff\xfe", b"[a]\n[a]\n", b"seed = " + b"9" * 5000, b"a = " + b"[" * 50_000, None],
        ids=["half", "latin", "twice", "endless", "nested", "missing"],
    )
    def test_a_file_that_cannot_be_read_is_named(self, tmp_path, content):
        path = tmp_path / "config.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"config\.toml: "):
            read_toml(path)

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_toml(tmp_path)


class TestDerived:
    @pytest.mark.parametrize(
        ("rounds", "share", "expected"),
        [(100, 0.1, 10), (10, 0.01, 1), (10, 0.99, 9), (1, 0.5, 0), (2, 0.1, 1), (10, 0.0, 0), (7, 0.5, 4)],
    )
    def test_pretraining_rounds(self, rounds, share, expected):
        flat = {"federation.num-rounds": rounds, "pretraining.round-share": share, "pretraining.ranking": "random"}
        configuration = parse({**flat, "federation.local-steps": 3})
        assert configuration.pretraining_rounds == expected
        shape = configuration.plan_shape
        assert (shape.pretraining_steps, shape.training_steps) == (3 * expected, 3 * (rounds - expected))

    @given(configurations())
    def test_always_one_round_is_left_to_train(self, configuration):
        assert 0 <= configuration.pretraining_rounds < configuration.federation.num_rounds

    def test_clipping(self):
        flat = {"adaptive-clipping.rule": "paper", "adaptive-clipping.decay": 0.5, "adaptive-clipping.centre": True}
        clipping = parse(flat).adaptive_clipping.clipping
        assert (clipping.rule, clipping.decay, clipping.centre, clipping.floor) == ("paper", 0.5, True, 0.05)

    def test_run_folder(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.delenv("ADADPIGU_HOME", raising=False)
        assert run_folder(Configuration(), 7) == Path("/home/me/.adadpigu/runs/flwr-7")
        monkeypatch.setenv("ADADPIGU_HOME", "~/elsewhere")
        assert run_folder(Configuration(), 7) == Path("/home/me/elsewhere/runs/flwr-7")
        assert run_folder(parse({"runtime.output": "~/runs/x"}), 7) == Path("/home/me/runs/x")
        assert run_folder(parse({"runtime.output": "runs/x"}), 7) == Path("runs/x")
