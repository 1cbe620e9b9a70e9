"""What travels between server and client, and the checks on it.

Messages are frozen dataclasses. ``encode`` turns one into named arrays and named values, which Flower carries as they
are; ``decode`` turns them back, and refuses an unknown key, a missing key, a wrong type, a wrong version, a number that
is not finite and a text that could not be printed, each by name. Field names are snake_case here and kebab-case on the
wire; nowhere else converts.

A client never sends anything but released values and public facts, so the texts of these errors, which speak of the
message alone, may travel. They quote no more of a message than fits on a line.
"""

import math
import re
import reprlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.accounting import LEAST_NOISE_MULTIPLIER, PHASES, Event
from adadpigu_core.adaptive_clipping import AdaptiveClipping
from adadpigu_core.augmentation import NONE as NO_AUGMENTATION
from adadpigu_core.exceptions import AdaDPIGUError, MessageError
from adadpigu_core.masking import RETAINED_AS
from adadpigu_core.models import ModelSpec
from adadpigu_core.noise_schedule import CONSTANT, NoiseSchedule
from adadpigu_core.printable import printable

PROTOCOL_VERSION = 1
_KIND = "kind"  # not the name of a field of any message

# What a plan, a task and a client can at most amount to. Far beyond any use; they bound what one message can cost.
MOST_STEPS = 1_000_000
_MOST_CLASSES = 10_000
_MOST_RECORDS = 10**12
# Below the one, noise is no privacy; calibration stays far from the other.
_MOST_NOISE_MULTIPLIER = 1e12
_MOST_LETTERS, _MOST_TEXT = 100, 300
_IDENTITY = re.compile(r"[0-9A-Za-z._-]{1,100}")

Array = NDArray[Any]
Scalar = bool | int | float | str
WireValue = Scalar | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class Wire:
    """A message taken apart: arrays and values by kebab-case name."""

    arrays: Mapping[str, Array]
    values: Mapping[str, WireValue]


@dataclass(frozen=True)
class DescribeRequest:
    """The server's plan, for the client to accept or refuse.

    Args:
        run: Identity of the run.
        code: Fingerprint of the server's code.
        model: What is trained.
        layout: Fingerprint of the parameter layout.
        sampling_probability: Of every private step.
        pretraining_steps: Private steps for importance.
        training_steps: Private steps of training.
        pretraining_share: Share of the budget for pretraining.
        target_epsilon: Largest budget that the server will make use of.
        target_delta: Its delta.
        noise_schedule: How the noise of training is to move from round to round.
        steps_per_round: Private steps of a round.
    """

    run: str
    code: str
    model: ModelSpec
    layout: str
    sampling_probability: float
    pretraining_steps: int
    training_steps: int
    pretraining_share: float
    target_epsilon: float
    target_delta: float
    noise_schedule: NoiseSchedule = CONSTANT
    steps_per_round: int = 1

    def __post_init__(self) -> None:
        steps = self.pretraining_steps + self.training_steps
        require(steps <= MOST_STEPS, "training-steps", f"a plan has at most {MOST_STEPS} steps, not {steps}")
        _require_names(run=self.run, code=self.code, layout=self.layout)
        _require_buildable(self.model)


@dataclass(frozen=True)
class Description:
    """A client's answer: public facts only.

    Args:
        name: Name of the client, for people.
        device: Where it trains: ``cpu`` or ``cuda``.
        data_set: Random identity of its data set.
        num_records: Declared number of records.
        target_epsilon: Budget that holds for this run: the smaller of the server's and the client's own.
        target_delta: Its delta.
        pretraining_noise_multiplier: Of every pretraining step.
        training_noise_multiplier: Of every step of the first training round; the schedule says how it goes on.
        spent: Everything that the ledger holds.
    """

    name: str
    device: str
    data_set: str
    num_records: int
    target_epsilon: float
    target_delta: float
    pretraining_noise_multiplier: float
    training_noise_multiplier: float
    spent: tuple[Event, ...]

    def __post_init__(self) -> None:
        for name in ("name", "device"):
            text = getattr(self, name)
            require(text == printable(text, _MOST_LETTERS), name, f"must be at most {_MOST_LETTERS} printable letters")
        require(bool(_IDENTITY.fullmatch(self.data_set)), "data-set", f"is not an identity: {_shown(self.data_set)}")
        require(1 <= self.num_records <= _MOST_RECORDS, "num-records", f"is out of range: {self.num_records}")
        require(self.target_epsilon > 0, "target-epsilon", f"must be positive, got {self.target_epsilon}")
        require(0 < self.target_delta < 1, "target-delta", f"must be in (0, 1), got {self.target_delta}")
        for phase in PHASES:
            noise = getattr(self, f"{phase}_noise_multiplier")
            enough = LEAST_NOISE_MULTIPLIER <= noise <= _MOST_NOISE_MULTIPLIER
            require(enough, f"{phase}-noise-multiplier", f"{noise} is no noise that a budget could allow")


@dataclass(frozen=True)
class TrainRequest:
    """One round of work.

    Args:
        run: Identity of the run.
        code: Fingerprint of the server's code.
        round: Number of the round, from 1, over both phases.
        phase: ``pretraining`` or ``training``.
        model: What is trained.
        weights: Weights to start from, float32 [d].
        mask: Packed mask, a bit a group, uint8 [groups / 8]; None if the client has it already.
        mask_id: Fingerprint of the mask; empty = everything is retained.
        gradient_mean: float32 [d]; None = 0.
        gradient_scale: float32 [groups of the clipping's granularity]; None = 1, or the client's own statistics.
        clipping: Settings of the statistics.
        client_statistics: Whether the client keeps the statistics.
        clipping_norm: C.
        steps: Private steps of this round.
        learning_rate: Of the local moves.
        importance_measure: Score to return; empty = none.
        spent: Everything that the server has seen of this client's ledger.
        views: Random views of a record, over which its gradient is the mean.
        augmentation: How they are made.
        fixed: What the model has beside its trainable weights, float32 [f]; None if there is nothing.
        mask_granularity: What is a group of the mask, one of ``masking.RETAINED_AS``.
    """

    run: str
    code: str
    round: int
    phase: str
    model: ModelSpec
    weights: Array
    mask: Array | None
    mask_id: str
    gradient_mean: Array | None
    gradient_scale: Array | None
    clipping: AdaptiveClipping
    client_statistics: bool
    clipping_norm: float
    steps: int
    learning_rate: float
    importance_measure: str
    spent: tuple[Event, ...] = ()
    views: int = 1
    augmentation: str = NO_AUGMENTATION
    fixed: Array | None = None
    mask_granularity: str = RETAINED_AS[0]

    def __post_init__(self) -> None:
        require(self.phase in PHASES, "phase", f"unknown value {_shown(self.phase)}")
        require(self.mask_granularity in RETAINED_AS, "mask-granularity", "must be one of " + ", ".join(RETAINED_AS))
        require(self.round >= 1, "round", f"must be at least 1, got {self.round}")
        require(self.steps >= 1, "steps", f"must be at least 1, got {self.steps}")
        require(self.clipping_norm > 0, "clipping-norm", f"must be positive, got {self.clipping_norm}")
        require(self.learning_rate > 0, "learning-rate", f"must be positive, got {self.learning_rate}")
        _require_names(run=self.run, code=self.code, **{"mask-id": self.mask_id})
        _require_buildable(self.model)
        require_vector(self.weights, "weights")
        mean, scale = self.gradient_mean, self.gradient_scale
        optional = ((self.fixed, "fixed"), (mean, "gradient-mean", len(self.weights)), (scale, "gradient-scale"))
        for array, *expected in optional:
            if array is not None:
                require_vector(array, *expected)
        require(scale is None or bool((scale > 0).all()), "gradient-scale", "must be positive everywhere")


@dataclass(frozen=True)
class TrainReply:
    """What a client releases in a round.

    Args:
        run: Identity of the run.
        round: Number of the round.
        phase: ``pretraining`` or ``training``.
        update: Change of the retained weights in flat order, float32 [k].
        importance: Scores, float32 [d]; None if none were asked for.
        data_set: Identity of the data set.
        spent: Everything that the ledger holds, this round included.
    """

    run: str
    round: int
    phase: str
    update: Array
    importance: Array | None
    data_set: str
    spent: tuple[Event, ...]

    def __post_init__(self) -> None:
        require(self.phase in PHASES, "phase", f"unknown value {_shown(self.phase)}")
        require_vector(self.update, "update")
        if self.importance is not None:
            require_vector(self.importance, "importance")


@dataclass(frozen=True)
class Refusal:
    """A client will not or cannot do what it was asked: a code and public facts.

    Args:
        code: ``code`` of the exception, or ``internal``.
        message: Public text; empty if the reason concerns records.
        data_set: Identity of the data set; empty if the ledger could not be opened.
        spent: Everything that the ledger holds.
    """

    code: str
    message: str
    data_set: str
    spent: tuple[Event, ...]


AnyMessage = DescribeRequest | Description | TrainRequest | TrainReply | Refusal
M = TypeVar("M")


def require(condition: bool, name: str, problem: str) -> None:
    """Raise a MessageError that names a field, unless a condition holds."""
    if not condition:
        raise MessageError(f"{name}: {problem}", f"{name}: {problem}")


def require_vector(array: Array, name: str, length: int | None = None) -> None:
    """Check that an array is a finite float32 vector, of a given length if one is given."""
    require(
        array.dtype == np.float32 and array.ndim == 1, name, f"must be float32 [n], got {array.dtype} {array.shape}"
    )
    require(length is None or len(array) == length, name, f"must have {length} entries, got {len(array)}")
    require(bool(np.isfinite(array).all()), name, "must be finite everywhere")


def _require_names(*, run: str, **texts: str) -> None:
    """Check what a client writes into its ledger and its log, where people read it on a terminal."""
    require(bool(_IDENTITY.fullmatch(run)), "run", f"is not an identity: {_shown(run)}")
    for name, text in texts.items():
        require(text == printable(text, _MOST_LETTERS), name, f"must be at most {_MOST_LETTERS} printable letters")


def _require_buildable(model: ModelSpec) -> None:
    require(
        model.num_classes <= _MOST_CLASSES,
        "model.num-classes",
        f"a task has at most {_MOST_CLASSES} classes, not {model.num_classes}",
    )


def _shown(value: object) -> str:
    """Quote a value that may be anything, in a few letters."""
    return reprlib.repr(value)


def encode(message: AnyMessage) -> Wire:
    """Take a message apart."""
    arrays: dict[str, Array] = {}
    values: dict[str, WireValue] = {_KIND: type(message).__name__, "protocol-version": PROTOCOL_VERSION}
    _encode(message, "", arrays, values)
    return Wire(arrays, values)


def _encode(message: Any, prefix: str, arrays: dict[str, Array], values: dict[str, WireValue]) -> None:
    for entry in fields(message):
        key = prefix + entry.name.replace("_", "-")
        value = getattr(message, entry.name)
        if value is None:
            continue
        if isinstance(value, np.ndarray):
            arrays[key] = value
        elif is_dataclass(value):
            _encode(value, f"{key}.", arrays, values)
        elif entry.name == "spent":
            for column in _EVENT_COLUMNS:
                values[f"{key}.{column.replace('_', '-')}"] = [getattr(event, column) for event in value]
        else:
            values[key] = list(value) if isinstance(value, tuple) else value


_EVENT_COLUMNS = {entry.name: get_type_hints(Event)[entry.name] for entry in fields(Event)}


def kind_of(wire: Wire) -> str:
    """Name of the class of a message that was taken apart; empty if it has none."""
    return str(wire.values.get(_KIND, ""))


def decode(wire: Wire, expected: type[M]) -> M:
    """Put a message together again, checking everything.

    Raises:
        MessageError: Naming what is wrong.
    """
    values, arrays = dict(wire.values), dict(wire.arrays)
    version = values.pop("protocol-version", None)
    require(
        version == PROTOCOL_VERSION,
        "protocol-version",
        f"this side speaks version {PROTOCOL_VERSION}, the other {_shown(version)}; run the same release on both",
    )
    kind = values.pop(_KIND, None)
    require(kind == expected.__name__, _KIND, f"expected {expected.__name__}, got {_shown(kind)}")
    message = _decode(expected, "", arrays, values)
    left = min([*arrays, *values], default="")
    require(not arrays and not values, printable(left, _MOST_LETTERS), "there is no such field")
    return message


def _decode(kind: type[M], prefix: str, arrays: dict[str, Array], values: dict[str, Any]) -> M:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        key = prefix + name.replace("_", "-")
        if is_dataclass(hint):
            found[name] = _decode(hint, f"{key}.", arrays, values)  # type: ignore[arg-type]  # it is a class
        elif name == "spent":
            found[name] = _decode_events(key, values)
        elif hint == Array or hint == Array | None:
            found[name] = arrays.pop(key, None)
            require(found[name] is not None or isinstance(hint, types.UnionType), key, "is missing")
            # NumPy reads a ZIP file as something else than an array
            require(isinstance(found[name], np.ndarray | None), key, "is not an array")
        else:
            found[name] = _value(key, hint, values)
    try:
        return kind(**found)
    except MessageError:
        raise
    except AdaDPIGUError as error:
        raise _malformed(f"{prefix}{error}") from error


def _value(key: str, hint: Any, values: dict[str, Any]) -> Any:
    require(key in values, key, "is missing")
    value = values.pop(key)
    if hint in (int, float, str, bool):
        return _scalar(key, hint, value)
    require(isinstance(value, list), key, f"must be a list, got {_shown(value)}")
    return tuple(_scalar(key, int, item) for item in value)


def _scalar(key: str, hint: type, value: Any) -> Any:
    require(type(value) is hint, key, f"must be {hint.__name__}, got {_shown(value)}")
    require(not isinstance(value, float) or math.isfinite(value), key, f"must be finite, got {value}")
    return value


def _decode_events(key: str, values: dict[str, Any]) -> tuple[Event, ...]:
    columns = {}
    for column, hint in _EVENT_COLUMNS.items():
        name = f"{key}.{column.replace('_', '-')}"
        items = values.pop(name, None)
        require(
            isinstance(items, list), name, "is missing" if items is None else f"must be a list, got {_shown(items)}"
        )
        columns[column] = [_scalar(name, hint, item) for item in items]
    require(len({len(items) for items in columns.values()}) == 1, key, "has columns of different lengths")
    try:
        return tuple(Event(*row) for row in zip(*columns.values(), strict=True))
    except AdaDPIGUError as error:
        raise _malformed(f"{key}: {error}") from error


def _malformed(text: str) -> MessageError:
    text = printable(text, _MOST_TEXT)
    return MessageError(text, text)
