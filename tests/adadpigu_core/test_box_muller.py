import math
import sys

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from adadpigu_core import box_muller, loops
from adadpigu_core.sampling import SeededRandomness, SystemRandomness

WORDS = st.integers(0, 2**64 - 1)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Leave one of the two ways."""
    monkeypatch.setattr(box_muller, "_MANY", 0)
    if request.param == "compiled":
        monkeypatch.setattr(box_muller, "_transform", None)
    else:
        monkeypatch.setattr(box_muller, "_compiled", lambda: None)


def standard_normals(bits):
    return box_muller.standard_normals(bits, long_lived=True)


def exact(first, second):
    """The two variates of two words, in 50 digits."""
    with mpmath.workdps(50):
        one = mpmath.mpf(1)
        u = 1 - one * (first % 2**52) / 2**52
        if u < one / 2**20:
            u -= one * ((first >> 52) * 2**12 + (second >> 52)) / 2**76
        radius = mpmath.sqrt(-2 * mpmath.log(u))
        angle = 2 * mpmath.pi * (second % 2**52) / 2**52
        return radius * mpmath.cos(angle), radius * mpmath.sin(angle), radius


@settings(deadline=None, max_examples=300)
@given(WORDS, WORDS)
@example(0, 0)
@example(1, 1)
@example(2**52 - 1, 2**52 - 1)
@example(2**64 - 1, 2**64 - 1)
@example(2**64 - 2, 2**64 - 1)
@example(2**64 - 2**32, 2**60)  # where u gets more bits
@example(2**64 - 2**32 + 1, 2**60)
@example(2**52 - int(2**51.5), 5)  # where logarithms change from one binade to the next
@example(2**52 - int(2**51.5) - 1, 2**50 - 1)
def test_variates_are_those_of_the_formula(first, second):
    bits = np.array([first, second], dtype=np.uint64)
    cosine, sine, radius = exact(first, second)
    for transform in (loops.box_muller, box_muller._transform):
        values = np.empty(2)
        transform(bits, values)
        assert np.isfinite(values).all()
        assert abs(values[0] - cosine) <= 2e-15 * radius
        assert abs(values[1] - sine) <= 2e-15 * radius


@pytest.mark.parametrize("eighth", [k * 2**49 for k in range(8)])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_every_eighth_of_a_turn_joins_the_next(eighth, offset):
    test_variates_are_those_of_the_formula.hypothesis.inner_test(2**50, (eighth + offset) % 2**52)


def test_the_largest_variates_lie_on_many_circles(way):
    """All but the bits behind the point of a word are for the few that need them."""
    high = np.arange(4096, dtype=np.uint64) << np.uint64(52)
    first = np.full(4096, 2**52 - 1, dtype=np.uint64)
    radius = np.hypot(*standard_normals(np.concatenate([first | high, high[::-1]])).reshape(2, -1))
    assert len(np.unique(radius)) == 4096
    assert radius.max() == pytest.approx(math.sqrt(2 * 76 * math.log(2)), abs=0.9)
    largest = standard_normals(np.array([2**64 - 1, 0xFFF << 52], dtype=np.uint64))
    assert largest[0] == pytest.approx(math.sqrt(2 * 76 * math.log(2)), rel=1e-12)
    ordinary = np.full(4096, 12345, dtype=np.uint64)
    assert len(np.unique(standard_normals(np.concatenate([ordinary | high, high])))) == 2


def test_the_bits_are_left_as_they_are(way):
    bits = np.arange(100, dtype=np.uint64)
    standard_normals(bits)
    assert np.array_equal(bits, np.arange(100))


@pytest.mark.parametrize("size", [0, 2, 65_534, 65_536, 65_538, 200_000])
def test_variates_are_normal_and_independent(way, size):
    """Of a fixed stream, so that the result is always the same."""
    bits = np.random.SFC64(7).random_raw(size)
    values = standard_normals(bits)
    assert values.shape == (size,)
    assert values.dtype == np.float64
    if size < 1000:
        return
    assert stats.kstest(values, "norm").pvalue > 1e-3
    half = values[: len(values) // 2]
    for lag in (1, 32_768, len(half) // 3):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) * math.sqrt(size - lag) < 4


def test_a_stream_with_a_defect_is_found_out(way):
    """Negative control: one bit of the radius that is always set."""
    bits = np.random.SFC64(7).random_raw(200_000)
    values = standard_normals(bits | np.uint64(1 << 48))
    assert stats.kstest(values, "norm").pvalue < 1e-12


def test_the_variable_switches_machine_code_off(monkeypatch):
    fresh = box_muller._compiled.__wrapped__
    assert fresh() is not None
    monkeypatch.setenv(box_muller.VARIABLE, "0")
    assert fresh() is None


def test_without_numba_there_is_no_machine_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "adadpigu_core.loops", raising=False)
    assert box_muller._compiled.__wrapped__() is None


def test_without_a_place_for_machine_code_it_is_made_anew(monkeypatch):
    """As where neither the package nor a home folder can be written."""
    asked = []

    def njit(*, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(loops, "njit", njit)
    assert loops._compiled(abs) is abs
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("source", "size", "loaded"),
    [(SeededRandomness(1), 16_384, True), (SeededRandomness(1), 16_382, False), (SystemRandomness(), 100_000, False)],
)
def test_machine_code_is_loaded_where_it_pays(monkeypatch, source, size, loaded):
    """Not in the process of a message, which would take longer to load it than to draw what it needs."""
    asked = []
    monkeypatch.setattr(box_muller, "_compiled", lambda: asked.append(1))
    assert len(source.normal(size)) == size
    assert bool(asked) == loaded
