import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.exceptions import ConfigurationError, MessageError
from adadpigu_core.masking import NUM_STEPS, SCHEDULES, fingerprint, mask_of, pack, retention_ratio, unpack

ratios = st.floats(1e-3, 1)
progress = st.floats(-0.5, 2)


@given(st.sampled_from(SCHEDULES), ratios, ratios, progress, progress)
def test_a_schedule_never_decreases_and_stays_between_its_ends(schedule, one, other, sooner, later):
    initial, final = sorted((one, other))
    sooner, later = sorted((sooner, later))
    first = retention_ratio(schedule, initial, final, sooner)
    second = retention_ratio(schedule, initial, final, later)
    assert first <= second
    assert initial <= first <= final * (1 + 1e-12)
    assert initial <= second <= final * (1 + 1e-12)


@given(st.sampled_from(SCHEDULES), ratios, ratios)
def test_a_schedule_reaches_its_ends(schedule, one, other):
    initial, final = sorted((one, other))
    assert retention_ratio(schedule, initial, final, 0) == initial
    last = initial if schedule == "constant" else final
    assert retention_ratio(schedule, initial, final, 1) == pytest.approx(last)
    assert retention_ratio(schedule, initial, final, 5) == retention_ratio(schedule, initial, final, 1)
    assert retention_ratio(schedule, initial, final, -1) == initial


def test_the_shapes_between_the_ends():
    def quarters(schedule):
        return [retention_ratio(schedule, 0.2, 1.0, time / 4) for time in range(5)]

    assert quarters("constant") == pytest.approx([0.2] * 5)
    assert quarters("linear") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    half = np.sqrt(0.5) / 2
    assert quarters("cosine") == pytest.approx([0.2, 0.2 + 0.8 * (0.5 - half), 0.6, 0.2 + 0.8 * (0.5 + half), 1.0])
    assert quarters("step") == pytest.approx([0.2, 0.2 + 0.8 / 5, 0.2 + 0.8 * 2 / 5, 0.2 + 0.8 * 3 / 5, 1.0])


def test_steps_are_equal_and_start_on_time():
    # 3/5 and the like are not exact in binary: a step must not come one round late for it
    values = [retention_ratio("step", 0.5, 1.0, step / NUM_STEPS) for step in range(NUM_STEPS + 1)]
    assert np.diff(values) == pytest.approx([0.1] * NUM_STEPS)
    assert 7 * (1 / 35) * 5 < 1
    rounds = [retention_ratio("step", 0.5, 1.0, i * (1 / 35)) for i in range(36)]
    assert rounds == pytest.approx([0.5 + 0.1 * (i // 7) for i in range(36)])


@pytest.mark.parametrize(("initial", "final"), [(0.6, 0.5), (0, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_ratios_that_shrink_or_leave_the_range_are_refused(initial, final):
    with pytest.raises(ConfigurationError, match="retention"):
        retention_ratio("linear", initial, final, 0.5)


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"retention\.schedule.*'sudden'.*cosine"):
        retention_ratio("sudden", 0.5, 1.0, 0.5)


def test_a_mask_retains_the_first_of_the_ranking():
    ranking = torch.tensor([3, 0, 4, 1, 2])
    assert mask_of(ranking, 0.4).tolist() == [True, False, False, True, False]
    assert mask_of(ranking, 1.0).tolist() == [True] * 5


@given(st.integers(1, 300), ratios, ratios, st.integers(0, 1000))
def test_masks_are_nested_and_have_the_right_size(d, one, other, seed):
    ranking = torch.from_numpy(np.random.default_rng(seed).permutation(d))
    small, large = (mask_of(ranking, ratio) for ratio in sorted((one, other)))
    assert small.dtype == torch.bool
    assert not (small & ~large).any()
    for mask, ratio in ((small, min(one, other)), (large, max(one, other))):
        assert int(mask.sum()) == max(1, round(ratio * d))


def test_at_least_one_coordinate_is_retained():
    assert mask_of(torch.tensor([2, 1, 0]), 1e-6).tolist() == [False, False, True]


@given(st.lists(st.booleans(), min_size=1, max_size=100).filter(any))
def test_packing_loses_nothing(flags):
    mask = torch.tensor(flags)
    bits = pack(mask)
    assert bits.dtype == np.uint8
    assert bits.shape == (-(-len(flags) // 8),)
    assert torch.equal(unpack(bits, len(flags)), mask)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.data())
def test_a_mask_of_groups_takes_a_bit_a_group(sizes, data):
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(sum(sizes))]
    flags = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)).filter(any))
    mask = torch.tensor(flags)[group]
    bits = pack(mask, group)
    assert bits.shape == (-(-len(sizes) // 8),)
    assert torch.equal(unpack(bits, len(sizes), group), mask)


def test_bits_for_another_number_of_groups_are_refused():
    group = torch.arange(20) // 10
    with pytest.raises(MessageError, match="does not hold 2 groups"):
        unpack(np.array([255, 128], dtype=np.uint8), 2, group)
    with pytest.raises(MessageError, match="between 1 and 2 groups"):
        unpack(np.array([0b00100000], dtype=np.uint8), 2, group)


@pytest.mark.parametrize(
    ("bits", "num_parameters"),
    [
        (np.array([255], dtype=np.uint8), 9),
        (np.array([255, 255, 255], dtype=np.uint8), 9),
        (np.array([], dtype=np.uint8), 9),
        (np.array([[255, 128]], dtype=np.uint8), 9),
        (np.array([255, 128], dtype=np.int64), 9),
        (np.array([127, 1], dtype=np.int8), 9),
        (np.array([1.0, 1.0]), 9),
        (np.array([True, True]), 9),
    ],
    ids=["short", "long", "empty", "matrix", "int64", "int8", "float", "bool"],
)
def test_bits_of_another_shape_or_type_are_refused(bits, num_parameters):
    with pytest.raises(MessageError, match="does not hold 9 coordinates") as caught:
        unpack(bits, num_parameters)
    assert caught.value.public_message == str(caught.value)


@pytest.mark.parametrize(
    "bits", [[255, 0b10000001], [0, 0b01000000], [0, 0]], ids=["stray bit", "only a stray bit", "nothing retained"]
)
def test_bits_that_retain_nothing_or_too_much_are_refused(bits):
    with pytest.raises(MessageError, match="between 1 and 9"):
        unpack(np.array(bits, dtype=np.uint8), 9)


def test_a_fingerprint_tells_masks_apart():
    masks = [torch.arange(20) < k for k in range(1, 21)]
    assert len({fingerprint(mask) for mask in masks}) == 20
    assert fingerprint(masks[3]) == fingerprint(masks[3].clone())
