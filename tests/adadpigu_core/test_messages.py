"""Messages: there and back again, and every way in which one can be wrong, by name."""

import math
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.accounting import Event
from adadpigu_core.adaptive_clipping import GRANULARITIES, RULES, AdaptiveClipping
from adadpigu_core.exceptions import MessageError
from adadpigu_core.masking import RETAINED_AS
from adadpigu_core.messages import (
    MOST_STEPS,
    DescribeRequest,
    Description,
    Refusal,
    TrainReply,
    TrainRequest,
    Wire,
    decode,
    encode,
    kind_of,
)
from adadpigu_core.models import ModelSpec

MODEL = ModelSpec("linear", "relu", "none", (3,), 2)
SPENT = (Event("pretraining", 2.0, 0.1, 3), Event("training", 1.0, 0.1, 4))
WEIGHTS = np.arange(8, dtype=np.float32)
MESSAGES = [
    DescribeRequest("run", "code", MODEL, "layout", 0.1, 10, 90, 0.1, 8.0, 1e-5),
    Description("a name", "cpu", "id-1", 100, 8.0, 1e-5, 2.0, 1.0, SPENT),
    TrainRequest(
        run="run",
        code="code",
        round=3,
        phase="training",
        model=MODEL,
        weights=WEIGHTS,
        mask=np.array([255], np.uint8),
        mask_id="id",
        gradient_mean=WEIGHTS,
        gradient_scale=np.ones(2, np.float32),
        clipping=AdaptiveClipping("energy"),
        client_statistics=False,
        clipping_norm=1.0,
        steps=2,
        learning_rate=0.5,
        importance_measure="",
    ),
    TrainReply("run", 3, "training", WEIGHTS, WEIGHTS, "id-1", SPENT),
    Refusal("budget", "nothing is left", "id-1", SPENT),
]
KINDS = [type(message) for message in MESSAGES]
BY_KIND = dict(zip(KINDS, MESSAGES, strict=True))

words = st.text(st.characters(codec="utf-8"), max_size=20)
identities = st.from_regex(r"[0-9A-Za-z._-]{1,30}", fullmatch=True)
lines = st.from_regex(r"[a-zü 0-9+.]{0,100}", fullmatch=True)
positive = st.floats(1e-300, 1e300)
probabilities = st.floats(1e-12, 1)
noises = st.floats(0.3, 1e12)
vectors = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9).map(
    lambda values: np.array(values, np.float32)
)
events = st.lists(
    st.builds(
        Event, st.sampled_from(["pretraining", "training"]), st.floats(0, 1e12), probabilities, st.integers(0, 2**60)
    ),
    max_size=4,
).map(tuple)
models = st.builds(
    ModelSpec,
    st.sampled_from(["linear", "mlp"]),
    st.sampled_from(["relu", "tanh"]),
    st.just("none"),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.integers(2, 10_000),
)
STRATEGIES = {
    DescribeRequest: st.builds(
        DescribeRequest,
        identities,
        lines,
        models,
        lines,
        *(st.floats(allow_nan=False, allow_infinity=False),),
        *(st.integers(-10, MOST_STEPS // 2),) * 2,
        *(st.floats(allow_nan=False, allow_infinity=False),) * 3,
    ),
    Description: st.builds(
        Description,
        st.from_regex(r"[a-zü 0-9]{0,100}", fullmatch=True),
        st.sampled_from(["cpu", "cuda"]),
        identities,
        st.integers(1, 10**12),
        positive,
        st.floats(1e-300, 0.999),
        noises,
        noises,
        events,
    ),
    TrainRequest: vectors.flatmap(
        lambda weights: st.builds(
            TrainRequest,
            run=identities,
            code=lines,
            round=st.integers(1, 2**62),
            phase=st.sampled_from(["pretraining", "training"]),
            model=models,
            weights=st.just(weights),
            mask=st.none() | st.binary(max_size=3).map(lambda bits: np.frombuffer(bits, np.uint8)),
            mask_id=lines,
            gradient_mean=st.none() | st.just(weights),
            gradient_scale=st.none() | vectors.map(lambda scale: np.abs(scale) + np.float32(0.5)),
            clipping=st.builds(
                AdaptiveClipping,
                st.sampled_from(RULES),
                st.sampled_from(GRANULARITIES),
                st.floats(0, 0.99),
                st.floats(0.01, 1),
                st.floats(0, 1),
                st.booleans(),
            ),
            client_statistics=st.booleans(),
            clipping_norm=positive,
            steps=st.integers(1, 2**62),
            learning_rate=positive,
            importance_measure=words,
            mask_granularity=st.sampled_from(RETAINED_AS),
        )
    ),
    TrainReply: st.builds(
        TrainReply,
        words,
        st.integers(),
        st.sampled_from(["pretraining", "training"]),
        vectors,
        st.none() | vectors,
        words,
        events,
    ),
    Refusal: st.builds(Refusal, words, words, words, events),
}


def equal(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if is_dataclass(one):
        return all(equal(getattr(one, entry.name), getattr(other, entry.name)) for entry in fields(one))
    return one == other


def changed(kind, /, **changes):
    """A message on the wire with entries changed; None leaves one out."""
    wire = encode(BY_KIND[kind])
    arrays, values = dict(wire.arrays), dict(wire.values)
    for name, value in changes.items():
        key = name.replace("__", ".").replace("_", "-")
        arrays.pop(key, None)
        values.pop(key, None)
        if value is not None:
            (arrays if isinstance(value, np.ndarray) else values)[key] = value
    return Wire(arrays, values)


def refused(kind, wire):
    """What a decoder says of a wire that it refuses; the text is public."""
    with pytest.raises(MessageError) as error:
        decode(wire, kind)
    assert error.value.public_message == str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


def keys(kind):
    wire = encode(BY_KIND[kind])
    return [key for key in (*wire.arrays, *wire.values) if key not in ("kind", "protocol-version")]


EVERY_KEY = [(kind, key) for kind in KINDS for key in keys(kind)]


class TestRoundTrip:
    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_gives_back_what_was_sent(self, kind, data):
        message = data.draw(STRATEGIES[kind])
        wire = encode(message)
        assert kind_of(wire) == kind.__name__
        assert equal(decode(wire, kind), message)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_wire_is_kebab_case_and_of_simple_types(self, kind):
        wire = encode(BY_KIND[kind])
        for key, value in {**wire.arrays, **wire.values}.items():
            assert key == key.lower()
            assert "_" not in key
            for item in value if isinstance(value, list) else [value]:
                assert isinstance(item, bool | int | float | str | np.generic | np.ndarray)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_field_takes_the_place_of_the_envelope(self, kind):
        """A refusal has a field ``message``; were that the name of the kind as well, no refusal could be read."""
        names = {entry.name.replace("_", "-") for entry in fields(kind)}
        assert names.isdisjoint({"kind", "protocol-version"})
        assert encode(BY_KIND[kind]).values["kind"] == kind.__name__

    def test_what_is_optional_may_be_left_out(self):
        message = decode(changed(TrainRequest, mask=None, gradient_mean=None, gradient_scale=None), TrainRequest)
        assert (message.mask, message.gradient_mean, message.gradient_scale) == (None, None, None)
        assert decode(changed(TrainReply, importance=None), TrainReply).importance is None

    def test_decoding_leaves_the_wire_as_it_is(self):
        wire = encode(BY_KIND[TrainRequest])
        assert equal(decode(wire, TrainRequest), decode(wire, TrainRequest))


class TestEveryKey:
    @pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
    def test_that_is_missing_is_named(self, kind, key):
        optional = {
            name.replace("_", "-")
            for name, hint in get_type_hints(kind).items()
            if type(None) in getattr(hint, "__args__", ())
        }
        if key not in optional:
            assert refused(kind, changed(kind, **{key: None})) == f"{key}: is missing"

    @pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
    def test_of_another_type_is_named(self, kind, key):
        wire = encode(BY_KIND[kind])
        own = {**wire.arrays, **wire.values}[key]
        for value in (True, 3, 0.5, "text", b"bytes", [True], ["a", 1], np.ones((2, 2), np.float32), np.ones(8)):
            if type(value) is type(own) and not isinstance(own, list | np.ndarray):
                continue
            if isinstance(own, np.ndarray) and key == "mask" and isinstance(value, np.ndarray):
                continue  # the client, which knows the number of parameters, checks masks
            assert key in refused(kind, changed(kind, **{key: value}))

    @pytest.mark.parametrize(
        ("kind", "key"), [pair for pair in EVERY_KEY if type({**encode(BY_KIND[pair[0]]).values}.get(pair[1])) is float]
    )
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_that_is_not_finite_is_named(self, kind, key, value):
        assert refused(kind, changed(kind, **{key: value})) == f"{key}: must be finite, got {value}"

    @pytest.mark.parametrize("kind", KINDS)
    def test_that_does_not_exist_is_named(self, kind):
        assert refused(kind, changed(kind, loss=0.1)) == "loss: there is no such field"
        assert refused(kind, changed(kind, gradient=WEIGHTS)) == "gradient: there is no such field"
        text = refused(kind, changed(kind, **{"\x1b[2J" + "x" * 10**6: 1}))
        assert text.isprintable()

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_the_envelope_is_named(self, kind):
        for version in (0, 2, "1", None, [1] * 10**5):
            assert refused(kind, changed(kind, protocol_version=version)).startswith(
                "protocol-version: this side speaks"
            )
        for name in ("Message", "", None, 3, "x" * 10**6, *(other.__name__ for other in KINDS if other is not kind)):
            assert refused(kind, changed(kind, kind=name)).startswith(f"kind: expected {kind.__name__}, got ")


ARRAYS = [
    *((TrainRequest, key) for key in ("weights", "gradient-mean", "gradient-scale")),
    *((TrainReply, key) for key in ("update", "importance")),
]


class TestArrays:
    @pytest.mark.parametrize(("kind", "key"), ARRAYS)
    @pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.bool_, np.complex64, ">f4", "S4"])
    def test_of_another_dtype(self, kind, key, dtype):
        text = refused(kind, changed(kind, **{key: np.ones(8).astype(dtype)}))
        assert text.startswith(f"{key}: must be float32 [n], got ")

    @pytest.mark.parametrize(("kind", "key"), ARRAYS)
    @pytest.mark.parametrize("shape", [(), (8, 1), (2, 2, 2)])
    def test_of_other_dimensions(self, kind, key, shape):
        text = refused(kind, changed(kind, **{key: np.ones(shape, np.float32)}))
        assert text == f"{key}: must be float32 [n], got float32 {shape}"

    @pytest.mark.parametrize(("kind", "key"), ARRAYS)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_that_are_not_finite(self, kind, key, value):
        array = np.ones(8, np.float32)
        array[5] = value
        assert refused(kind, changed(kind, **{key: array})) == f"{key}: must be finite everywhere"

    def test_of_lengths_that_do_not_fit(self):
        assert (
            refused(TrainRequest, changed(TrainRequest, gradient_mean=WEIGHTS[:5]))
            == "gradient-mean: must have 8 entries, got 5"
        )

    @pytest.mark.parametrize("value", [0.0, -1.0])
    def test_of_scales_that_are_not_positive(self, value):
        array = np.array([1.0, value], np.float32)
        assert refused(TrainRequest, changed(TrainRequest, gradient_scale=array)).startswith(
            "gradient-scale: must be pos"
        )

    def test_that_are_no_arrays(self):
        wire = encode(BY_KIND[TrainReply])
        archive = Wire({**wire.arrays, "update": object()}, wire.values)
        assert refused(TrainReply, archive) == "update: is not an array"


class TestNumbers:
    @pytest.mark.parametrize(
        ("kind", "key", "value"),
        [
            (DescribeRequest, "training-steps", MOST_STEPS),
            (DescribeRequest, "training-steps", 2**62),
            (DescribeRequest, "model.num-classes", 1),
            (DescribeRequest, "model.num-classes", 2**40),
            (TrainRequest, "model.num-classes", 2**40),
            (TrainRequest, "round", 0),
            (TrainRequest, "steps", 0),
            (TrainRequest, "clipping-norm", 0.0),
            (TrainRequest, "learning-rate", -1.0),
            (TrainRequest, "phase", "testing"),
            (TrainRequest, "clipping.decay", 1.0),
            (TrainRequest, "clipping.rule", "x" * 10**6),
            (TrainRequest, "model.name", "x" * 10**6),
            (TrainReply, "phase", "x" * 10**6),
            (Description, "num-records", 0),
            (Description, "num-records", 2**62),
            (Description, "target-epsilon", 0.0),
            (Description, "target-delta", 1.0),
            (Description, "training-noise-multiplier", 0.0),
            (Description, "pretraining-noise-multiplier", 1e300),
            (Description, "data-set", ""),
            (Description, "data-set", "a b"),
            (Description, "data-set", "x" * 10**6),
            (Description, "name", "x" * 101),
            (Description, "name", "two\nlines"),
            (Description, "device", "\x1b[2J"),
        ],
    )
    def test_out_of_range_are_named(self, kind, key, value):
        text = refused(kind, changed(kind, **{key: value}))
        assert text.replace("_", "-").startswith(key.partition(".")[0])
        assert key.rpartition(".")[2] in text.replace("_", "-") or "unknown model" in text

    def test_whole_numbers_are_no_booleans(self):
        assert refused(TrainRequest, changed(TrainRequest, steps=True)) == "steps: must be int, got True"
        assert (
            refused(TrainRequest, changed(TrainRequest, client_statistics=1))
            == "client-statistics: must be bool, got 1"
        )

    def test_values_are_checked_when_a_message_is_made_as_well(self):
        with pytest.raises(MessageError, match="update: must be finite"):
            TrainReply("run", 1, "training", np.full(3, np.nan, np.float32), None, "id", ())


class TestSpent:
    @pytest.mark.parametrize("kind", [Description, TrainReply, Refusal])
    def test_columns_of_different_lengths(self, kind):
        for column, value in {
            "phase": ["training"],
            "noise-multiplier": [1.0] * 3,
            "sampling-probability": [],
            "count": [],
        }.items():
            assert (
                refused(kind, changed(kind, **{f"spent.{column}": value})) == "spent: has columns of different lengths"
            )

    @pytest.mark.parametrize("kind", [Description, TrainReply, Refusal])
    @pytest.mark.parametrize(
        ("column", "bad"),
        [
            ("phase", "testing"),
            ("phase", "x" * 10**6),
            ("noise-multiplier", -1.0),
            ("noise-multiplier", math.nan),
            ("sampling-probability", 0.0),
            ("sampling-probability", 1.5),
            ("count", -1),
            ("count", 1.0),
            ("count", True),
        ],
    )
    def test_events_that_make_no_sense(self, kind, column, bad):
        own = encode(BY_KIND[kind]).values[f"spent.{column}"]
        assert refused(kind, changed(kind, **{f"spent.{column}": [own[0], bad]})).startswith("spent")

    def test_nothing_spent_is_nothing(self):
        empty = {f"spent.{column}": [] for column in ("phase", "noise-multiplier", "sampling-probability", "count")}
        assert decode(changed(Refusal, **empty), Refusal).spent == ()
