"""What a message of a stranger can cost: time in proportion to its size, and a line of text."""

import contextlib
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.exceptions import MessageError
from adadpigu_core.messages import Refusal, Wire, decode, encode
from adadpigu_core.printable import printable


def events(n):
    columns = {"phase": "training", "noise-multiplier": 1.0, "sampling-probability": 0.5, "count": 1}
    return {f"spent.{column}": [value] * n for column, value in columns.items()}


@pytest.mark.parametrize(
    "changes",
    [
        events,
        lambda n: {f"field-{index}": 1 for index in range(n)},
        lambda n: {"message": "x" * 100 * n},
        lambda n: {"code": ["x"] * 10 * n},
    ],
    ids=["events", "fields", "text", "list"],
)
def test_decoding_is_linear(changes):
    """Ten times the size would be a hundred times the time if it were quadratic."""

    def seconds(n):
        wire = encode(Refusal("budget", "", "id", ()))
        wire, best = Wire(wire.arrays, {**wire.values, **changes(n)}), math.inf
        for _ in range(3):
            begun = time.perf_counter()
            with contextlib.suppress(MessageError):
                decode(wire, Refusal)
            best = min(best, time.perf_counter() - begun)
        return best

    assert seconds(30_000) < 40 * seconds(3_000) + 0.05


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("", 10, ""),
        ("Klinik Süd 1", 20, "Klinik Süd 1"),
        ("a\nb\tc", 10, "a b c"),
        ("\x1b[31m", 10, " [31m"),
        ("x" * 11, 10, "x" * 7 + "..."),
        ("x" * 10, 10, "x" * 10),
    ],
)
def test_printable(text, most, expected):
    assert printable(text, most) == expected


@given(st.text(), st.integers(3, 50))
def test_what_is_printable_is_one_short_line(text, most):
    shown = printable(text, most)
    assert len(shown) <= most
    assert shown.isprintable()
    assert printable(shown, most) == shown
