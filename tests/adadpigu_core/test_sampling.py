import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.sampling import SeededRandomness, SystemRandomness, poisson_sample

SOURCES = {"system": SystemRandomness, "seeded": lambda: SeededRandomness(7)}


class FixedUniforms:
    def __init__(self, values):
        self.values = np.array(values)

    def uniform(self, size):
        assert size == len(self.values)
        return self.values


def test_a_record_is_drawn_where_its_own_coin_says_so():
    drawn = poisson_sample(4, 0.5, FixedUniforms([0.49, 0.5, 0.0, 0.99]))
    assert drawn.tolist() == [0, 2]


def test_an_empty_sample_is_a_sample():
    drawn = poisson_sample(3, 0.1, FixedUniforms([0.2, 0.3, 0.4]))
    assert drawn.shape == (0,)
    assert drawn.dtype == np.int64


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_probability_one_draws_everything(source):
    assert poisson_sample(1000, 1.0, source()).tolist() == list(range(1000))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_no_records_give_an_empty_sample(source):
    assert poisson_sample(0, 0.5, source()).tolist() == []


@settings(deadline=None)
@given(st.integers(0, 200), st.floats(0.001, 1), st.integers(0, 2**32))
def test_a_sample_is_sorted_without_repetition(num_records, probability, seed):
    drawn = poisson_sample(num_records, probability, SeededRandomness(seed))
    assert np.all(np.diff(drawn) > 0)
    assert np.all((drawn >= 0) & (drawn < num_records))


def test_an_added_record_does_not_touch_the_coins_of_the_others():
    with_one_more = poisson_sample(101, 0.3, SeededRandomness(1))
    assert with_one_more[with_one_more < 100].tolist() == poisson_sample(100, 0.3, SeededRandomness(1)).tolist()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("size", [0, 1, 2, 7, 100])
def test_as_many_variates_as_asked_for(source, size):
    randomness = source()
    for draw in (randomness.uniform, randomness.normal):
        values = draw(size)
        assert values.shape == (size,)
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
    uniform = randomness.uniform(1000)
    assert ((uniform >= 0) & (uniform < 1)).all()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_torch_seeds_fit_and_differ(source):
    randomness = source()
    seeds = [randomness.torch_seed() for _ in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeded_randomness_repeats():
    for draw in ("uniform", "normal"):
        first, second = (getattr(SeededRandomness(1, 2, 3), draw)(20) for _ in range(2))
        assert np.array_equal(first, second)
    assert SeededRandomness(4).torch_seed() == SeededRandomness(4).torch_seed()


def test_seeded_randomness_is_the_same_on_every_machine():
    # a simulation's numbers depend on this
    assert SeededRandomness(1, 2, 3).uniform(2).tolist() == pytest.approx([0.8674537370637372, 0.19954021326068982])


# (1,) and (1, 0), and (2**32,) and (0, 1), are equal to numpy's SeedSequence
@pytest.mark.parametrize("other", [(1, 0), (1, 0, 0), (0, 1), (), (2,), (11,), (2**32 + 1,), (-1,)])
def test_different_keys_give_different_streams(other):
    ours, theirs = SeededRandomness(1).normal(50), SeededRandomness(*other).normal(50)
    assert not np.isin(ours, theirs).any()


def test_large_parts_of_a_key_are_not_split():
    assert not np.isin(SeededRandomness(2**32).normal(50), SeededRandomness(0, 1).normal(50)).any()


def test_a_key_is_made_of_integers():
    with pytest.raises(TypeError):
        SeededRandomness(0.5)
    assert np.array_equal(SeededRandomness(np.int64(3)).normal(5), SeededRandomness(3).normal(5))


def test_system_randomness_does_not_repeat():
    values = np.concatenate([SystemRandomness().normal(100) for _ in range(10)])
    assert len(set(values)) == 1000


@pytest.mark.parametrize("byte", [0x00, 0xFF], ids=["smallest", "largest"])
def test_system_randomness_is_in_range_at_its_ends(monkeypatch, byte):
    monkeypatch.setattr(os, "urandom", lambda size: bytes([byte]) * size)
    monkeypatch.setattr(
        SystemRandomness, "_bits", staticmethod(lambda size: np.full(size, byte * 0x0101010101010101, dtype=np.uint64))
    )
    randomness = SystemRandomness()
    assert randomness.uniform(3).tolist() == [0.0 if byte == 0 else 1 - 2.0**-53] * 3
    assert np.isfinite(randomness.normal(4)).all()
    assert 0 <= randomness.torch_seed() < 2**63


@pytest.mark.parametrize("size", [0, 1, 2, 3, 32_767, 32_768, 32_769, 70_001])
def test_system_randomness_draws_as_many_as_were_asked_for(size):
    values = SystemRandomness().normal(size)
    assert values.shape == (size,)
    assert len(set(values.tolist())) == size


def test_every_call_has_a_key_of_its_own(monkeypatch):
    """The key comes from the operating system at each call, so that a forked process repeats nothing."""
    keys, real = [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: keys.append(real(size)) or keys[-1])
    randomness = SystemRandomness()
    draws = [randomness.normal(4), randomness.uniform(4), randomness.normal(4)]
    assert [len(key) for key in keys] == [32] * 3
    assert len(set(keys)) == 3
    assert not np.array_equal(draws[0], draws[2])


def test_system_randomness_uses_all_53_bits():
    fine = SystemRandomness().uniform(2000) * 2.0**53
    assert np.array_equal(fine, np.round(fine))
    assert (fine % 2 == 1).any()
