"""What adaptive clipping learns from releases, and the scales and the mean that it makes of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core.adaptive_clipping import GRANULARITIES, AdaptiveClipping, RunningStatistics, Standardisation
from adadpigu_core.exceptions import MessageError
from adadpigu_core.parameters import ParameterLayout

# two matrices, two vectors: 6 + 2 + 4 + 2 coordinates
LAYOUT = ParameterLayout(("a.weight", "a.bias", "b.weight", "b.bias"), ((2, 3), (2,), (2, 2), (2,)))
D = LAYOUT.num_parameters
ALL = torch.ones(D, dtype=torch.bool)
NO_NOISE = torch.zeros(D)
LAYERS = torch.tensor([0] * 6 + [1] * 2 + [2] * 4 + [3] * 2)
ROWS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])


def learnt(settings, releases, mask=ALL, noise_stddev=NO_NOISE):
    statistics = RunningStatistics.neutral(settings, LAYOUT)
    for released in releases:
        statistics = statistics.updated(torch.where(mask, released, 0.0), noise_stddev, mask)
    return statistics


def random_releases(count, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * (2 * torch.rand(D, generator=generator) - 1))
    return list(sizes * torch.randn(count, D, generator=generator))


def mean_square(values, mask):
    return float(values[mask].double().square().mean())


# ---- no rule


def test_no_rule_is_the_identity_whatever_was_released():
    statistics = learnt(AdaptiveClipping(rule="none", centre=True), random_releases(5))
    given_ = statistics.standardisation(ALL)
    identity = Standardisation.identity(D)
    assert torch.equal(given_.mean, identity.mean)
    assert torch.equal(given_.scale, identity.scale)
    assert torch.equal(given_.mask, identity.mask)


# ---- the energy rule: what is estimated


def test_energy_is_unbiased_and_centring_would_count_noise_as_signal():
    """What the energy rule estimates, and the trap that it avoids."""
    layout = ParameterLayout(("noise", "signal"), ((20_000,), (20_000,)))
    signal = torch.cat([torch.zeros(20_000), torch.full((20_000,), 0.3)])
    noise_stddev, decay, steps = 2.0, 0.8, 60
    mask = torch.ones(40_000, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    statistics = RunningStatistics.neutral(AdaptiveClipping(rule="energy", decay=decay, centre=True), layout)
    centred = []  # what E[(ghat - a)^2] - noise^2 says of the coordinates without signal
    for step in range(steps):
        released = signal + noise_stddev * torch.randn(40_000, generator=generator)
        if step >= 20:
            deviation = (released - statistics.mean)[:20_000].double().square()
            centred.append(float(deviation.mean()) - noise_stddev**2)
        statistics = statistics.updated(released, torch.full((40_000,), noise_stddev), mask)
    energy = statistics.moment / statistics.weight
    # mean of 20,000 squares over about (1 + decay) / (1 - decay) = 9 steps: standard deviation 4 * sqrt(2 / 180000)
    tolerance = 5 * noise_stddev**2 * math.sqrt(2 / (20_000 * (1 + decay) / (1 - decay)))
    assert float(energy[0]) == pytest.approx(0.0, abs=tolerance)
    assert float(energy[1]) == pytest.approx(0.09, abs=tolerance * 1.1)
    # the negative control: the noise in the running mean, noise^2 (1 - decay) / (1 + decay), is taken for signal
    assert sum(centred) / len(centred) == pytest.approx(noise_stddev**2 * (1 - decay) / (1 + decay), rel=0.1)
    assert sum(centred) / len(centred) > 5 * tolerance


def test_the_known_noise_is_taken_off_per_coordinate():
    noise_stddev = torch.linspace(0.1, 2.0, D)
    statistics = RunningStatistics.neutral(AdaptiveClipping(rule="energy", granularity="coordinate"), LAYOUT)
    released = (noise_stddev.square() + 9).sqrt()
    learnt_ = statistics.updated(released, noise_stddev, ALL)
    assert torch.allclose(learnt_.moment / learnt_.weight, torch.full((D,), 9.0, dtype=torch.float64), rtol=1e-5)


def test_the_running_mean_of_the_energy_is_not_drawn_to_zero_at_the_start():
    statistics = learnt(AdaptiveClipping(rule="energy", granularity="coordinate", decay=0.9), [torch.full((D,), 2.0)])
    assert torch.allclose(statistics.moment / statistics.weight, torch.full((D,), 4.0, dtype=torch.float64))


def test_the_energy_decays():
    settings = AdaptiveClipping(rule="energy", granularity="coordinate", decay=0.5)
    statistics = learnt(settings, [torch.full((D,), 1.0), torch.full((D,), 3.0)])
    expected = (0.25 * 1 + 0.5 * 9) / 0.75
    assert torch.allclose(statistics.moment / statistics.weight, torch.full((D,), expected, dtype=torch.float64))


@pytest.mark.parametrize("noise_stddev", [5.0, 1.0])
def test_without_visible_signal_the_scale_is_one(noise_stddev):
    released = torch.ones(D)
    statistics = learnt(AdaptiveClipping(rule="energy"), [released], noise_stddev=torch.full((D,), noise_stddev))
    assert statistics.standardisation(ALL).scale.tolist() == [1] * D


# ---- the energy rule: what is made of it


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(GRANULARITIES),
    st.floats(0, 1),
    st.floats(0.001, 1),
    st.floats(0, 4),
    st.lists(st.booleans(), min_size=D, max_size=D).filter(any),
    st.integers(0, 1000),
)
def test_the_mean_square_of_the_scale_over_retained_coordinates_is_one(
    granularity, shrinkage, floor, spread, flags, seed
):
    mask = torch.tensor(flags)
    chosen = AdaptiveClipping(rule="energy", granularity=granularity, shrinkage=shrinkage, floor=floor)
    statistics = learnt(chosen, random_releases(3, seed, spread), mask)
    for later in (mask, ALL):
        scale = statistics.standardisation(later).scale
        assert scale.dtype == torch.float32
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
        assert mean_square(scale, later) == pytest.approx(1, rel=1e-5)


@given(st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=20)
def test_the_unit_of_the_gradient_does_not_matter(unit):
    chosen = AdaptiveClipping(rule="energy", granularity="row")
    releases = random_releases(3)
    one = learnt(chosen, releases).standardisation(ALL).scale
    other = learnt(chosen, [unit * released for released in releases]).standardisation(ALL).scale
    assert torch.allclose(one, other, rtol=1e-4)


def test_the_scale_has_a_floor():
    released = torch.full((D,), 1e-9)
    released[LAYERS == 2] = 7.0
    scale = learnt(AdaptiveClipping(rule="energy", floor=0.1), [released]).standardisation(ALL).scale
    # before normalisation: 7 on 4 of 14 coordinates, mean 2, floor 0.2
    size = math.sqrt((4 * 7**2 + 10 * 0.2**2) / 14)
    expected = torch.where(LAYERS == 2, 7 / size, 0.2 / size)
    assert torch.allclose(scale, expected)


@pytest.mark.parametrize("granularity", ["layer", "row", "coordinate"])
def test_where_noise_explains_the_differences_all_scales_are_one(granularity):
    torch.manual_seed(0)
    chosen = AdaptiveClipping(rule="energy", granularity=granularity)
    worst = []
    for _ in range(20):
        releases = [0.1 + torch.randn(D) for _ in range(10)]
        scale = learnt(chosen, releases, noise_stddev=torch.ones(D)).standardisation(ALL).scale
        worst.append(float((scale - 1).abs().max()))
    # without the pull, estimates of a few coordinates are off by more than themselves
    assert sorted(worst)[len(worst) // 2] < 0.3


def test_differences_beyond_the_noise_are_kept():
    torch.manual_seed(0)
    signal = torch.where(LAYERS == 2, 7.0, 1.0)
    releases = [signal + 0.1 * torch.randn(D) for _ in range(10)]
    chosen = AdaptiveClipping(rule="energy", granularity="layer")
    scale = learnt(chosen, releases, noise_stddev=torch.full((D,), 0.1)).standardisation(ALL).scale
    assert float(scale[LAYERS == 2][0] / scale[0]) == pytest.approx(7, rel=0.1)


def test_negative_energy_is_at_the_floor():
    released, noise_stddev = torch.full((D,), 30.0), torch.full((D,), 1.0)
    released[LAYERS == 0], noise_stddev[LAYERS == 0] = 3.0, 5.0
    statistics = learnt(AdaptiveClipping(rule="energy", floor=0.5), [released], noise_stddev=noise_stddev)
    assert statistics.moment[0] < 0
    scale = statistics.standardisation(ALL).scale
    # 0 on 6 coordinates and about 30 on 8: mean 30 * 8 / 14, floor half of it
    assert float(scale[0] / scale[-1]) == pytest.approx(0.5 * 8 / 14, rel=1e-3)


def test_the_floor_is_a_share_of_the_mean_over_retained_coordinates():
    released = torch.full((D,), 1e-9)
    released[0], released[LAYERS == 2] = 1.0, 100.0
    chosen = AdaptiveClipping(rule="energy", granularity="coordinate", floor=0.1)
    mask = LAYERS == 0
    scale = learnt(chosen, [released]).standardisation(mask).scale
    # 1 on one coordinate of 6: mean 1 / 6; the large ones are not retained
    assert float(scale[1] / scale[0]) == pytest.approx(0.1 / 6)


def test_granularity_says_what_shares_a_scale():
    released = torch.arange(1.0, D + 1)
    squares = released.double().square()
    for granularity, index in (("layer", LAYERS), ("row", ROWS), ("coordinate", torch.arange(D))):
        chosen = AdaptiveClipping(rule="energy", granularity=granularity, floor=1e-6)
        scale = learnt(chosen, [released]).standardisation(ALL).scale
        pooled = torch.stack([squares[index == group].mean() for group in index]).sqrt()
        expected = pooled / pooled.square().mean().sqrt()
        assert torch.allclose(scale, expected.float()), granularity


def test_only_retained_coordinates_are_pooled():
    mask = torch.ones(D, dtype=torch.bool)
    mask[1:6] = False  # of the first layer only the first coordinate is retained
    released = torch.ones(D)
    released[0] = 4.0
    scale = learnt(AdaptiveClipping(rule="energy"), [released], mask).standardisation(mask).scale
    assert float(scale[0] / scale[-1]) == pytest.approx(4)
    # the same if the others were retained before
    chosen = AdaptiveClipping(rule="energy", granularity="coordinate", shrinkage=1.0)
    scale = learnt(chosen, [released]).standardisation(mask).scale
    assert float(scale[0] / scale[-1]) == pytest.approx(4)


@pytest.mark.parametrize("granularity", ["row", "coordinate"])
@pytest.mark.parametrize(("retained", "noise"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.5)])
def test_full_shrinkage_is_the_layer(granularity, retained, noise):
    mask = torch.rand(D, generator=torch.Generator().manual_seed(3)) < retained
    releases, noise_stddev = random_releases(4), torch.full((D,), noise)
    fine = AdaptiveClipping(rule="energy", granularity=granularity, shrinkage=1.0)
    coarse = AdaptiveClipping(rule="energy", granularity="layer")
    one = learnt(fine, releases, mask, noise_stddev).standardisation(mask).scale
    other = learnt(coarse, releases, mask, noise_stddev).standardisation(mask).scale
    assert torch.allclose(one[mask], other[mask], rtol=1e-5)
    assert not torch.allclose(one[mask], torch.ones(1), rtol=0.01)


def test_half_shrinkage_is_half_way():
    released = torch.full((D,), 2.0)
    released[:6] = torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])  # the layer's energy is 5
    chosen = AdaptiveClipping(rule="energy", granularity="row", shrinkage=0.5)
    scale = learnt(chosen, [released]).standardisation(ALL).scale
    assert float(scale[0] / scale[-1]) == pytest.approx(math.sqrt((1 + 5) / 2) / 2)
    assert float(scale[5] / scale[-1]) == pytest.approx(math.sqrt((9 + 5) / 2) / 2)


# ---- the mean


def test_the_mean_is_a_running_mean_and_off_by_default():
    releases = [torch.full((D,), 1.0), torch.full((D,), 2.0)]
    off = learnt(AdaptiveClipping(rule="energy", decay=0.9), releases)
    assert off.standardisation(ALL).mean.tolist() == [0] * D
    on = learnt(AdaptiveClipping(rule="energy", decay=0.9, centre=True), releases)
    assert torch.allclose(on.standardisation(ALL).mean, torch.full((D,), 0.9 * 0.1 + 0.1 * 2))


# ---- progressive unfreezing


@pytest.mark.parametrize("rule", ["energy", "paper"])
@pytest.mark.parametrize("released_there", [0.0, 5.0])
def test_statistics_of_frozen_coordinates_do_not_move(rule, released_there):
    chosen = AdaptiveClipping(rule=rule, granularity="coordinate", centre=True)
    before = learnt(chosen, random_releases(3))
    mask = torch.arange(D) % 3 == 0
    released = torch.where(mask, torch.ones(D), released_there)
    after = before.updated(released, torch.ones(D), mask)
    for name in ("mean", "moment", "weight"):
        old, new = getattr(before, name), getattr(after, name)
        assert torch.equal(old[~mask], new[~mask]), name
        if name != "weight":
            assert bool((old[mask] != new[mask]).all()), name


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_statistics_of_groups_without_a_retained_coordinate_do_not_move(granularity):
    before = learnt(AdaptiveClipping(rule="energy", granularity=granularity), random_releases(3))
    mask = LAYERS == 0
    after = before.updated(torch.ones(D), NO_NOISE, mask)
    kept = 2 if granularity == "row" else 1
    assert torch.equal(before.moment[kept:], after.moment[kept:])
    assert torch.equal(before.weight[kept:], after.weight[kept:])
    assert bool((before.moment[:kept] != after.moment[:kept]).all())


def test_a_coordinate_that_enters_takes_the_scale_of_its_layer_and_mean_zero():
    mask = torch.ones(D, dtype=torch.bool)
    mask[2:6] = False
    released = torch.full((D,), 3.0)
    released[0], released[1] = 2.0, 4.0
    chosen = AdaptiveClipping(rule="energy", granularity="coordinate", centre=True)
    given_ = learnt(chosen, [released], mask).standardisation(ALL)
    own = given_.scale / given_.scale[-1] * 3
    assert own[:2].tolist() == pytest.approx([2, 4])
    assert own[2:6].tolist() == pytest.approx([math.sqrt((4 + 16) / 2)] * 4)
    assert given_.mean[2:6].tolist() == [0] * 4
    assert mean_square(given_.scale, ALL) == pytest.approx(1, rel=1e-5)


def test_a_layer_that_enters_takes_the_scale_of_what_is_known():
    mask = LAYERS != 2
    released = torch.full((D,), 3.0)
    released[LAYERS == 0] = 1.0
    for granularity in GRANULARITIES:
        chosen = AdaptiveClipping(rule="energy", granularity=granularity)
        scale = learnt(chosen, [released], mask).standardisation(ALL).scale
        overall = math.sqrt((6 * 1 + 4 * 9) / 10)
        assert (scale[LAYERS == 2] / scale[0]).tolist() == pytest.approx([overall] * 4), granularity


def test_a_mask_of_unknown_coordinates_only_has_scale_one():
    mask = LAYERS == 0
    statistics = learnt(AdaptiveClipping(rule="energy"), [torch.full((D,), 3.0)], mask)
    assert statistics.standardisation(~mask).scale.tolist() == [1] * D


# ---- the paper's rule


def test_the_papers_rule_in_numbers():
    statistics = learnt(AdaptiveClipping(rule="paper", decay=0.9), [torch.full((D,), 2.0)])
    # mean 0.1 * 2, deviation 1.8, variance 0.999 * 1 + 0.001 * 1.8^2
    given_ = statistics.standardisation(ALL)
    assert given_.mean.tolist() == pytest.approx([0.2] * D)
    assert given_.scale.tolist() == pytest.approx([math.sqrt(1.00224)] * D)
    given_ = statistics.updated(torch.full((D,), -1.0), NO_NOISE, ALL).standardisation(ALL)
    # mean 0.9 * 0.2 - 0.1, deviation 1.08
    assert given_.mean.tolist() == pytest.approx([0.08] * D)
    assert given_.scale.tolist() == pytest.approx([math.sqrt(0.999 * 1.00224 + 0.001 * 1.08**2)] * D)


def test_the_papers_rule_is_per_coordinate_and_knows_nothing_of_the_noise():
    released = torch.arange(float(D))
    for granularity in GRANULARITIES:
        chosen = AdaptiveClipping(rule="paper", granularity=granularity)
        noisy = learnt(chosen, [released], noise_stddev=torch.full((D,), 100.0)).standardisation(ALL)
        assert torch.equal(noisy.scale, learnt(chosen, [released]).standardisation(ALL).scale)
        assert len(set(noisy.scale.tolist())) == D


def test_the_papers_variance_is_clamped():
    chosen = AdaptiveClipping(rule="paper", decay=0.0)
    large = learnt(AdaptiveClipping(rule="paper"), [torch.full((D,), 1e9)]).standardisation(ALL).scale
    assert large.tolist() == pytest.approx([1e3] * D)
    still = learnt(chosen, [torch.zeros(D)] * 20_000).standardisation(ALL).scale
    assert still.tolist() == pytest.approx([1e-3] * D)


# ---- across rounds


@pytest.mark.parametrize("rule", ["energy", "paper"])
def test_statistics_go_on_from_their_state(rule):
    chosen = AdaptiveClipping(rule=rule, granularity="row", centre=True)
    releases = random_releases(6)
    whole = learnt(chosen, releases).standardisation(ALL)
    resumed = RunningStatistics.neutral(chosen, LAYOUT).restored(learnt(chosen, releases[:3]).state())
    for released in releases[3:]:
        resumed = resumed.updated(released, NO_NOISE, ALL)
    assert torch.equal(resumed.standardisation(ALL).scale, whole.scale)
    assert torch.equal(resumed.standardisation(ALL).mean, whole.mean)


def test_the_state_of_another_granularity_is_refused():
    state = learnt(AdaptiveClipping(rule="energy", granularity="row"), random_releases(1)).state()
    other = RunningStatistics.neutral(AdaptiveClipping(rule="energy", granularity="layer"), LAYOUT)
    with pytest.raises(MessageError, match="granularity"):
        other.restored(state)
    with pytest.raises(MessageError, match="granularity"):
        RunningStatistics.neutral(AdaptiveClipping(rule="energy", granularity="row"), LAYOUT).restored(
            {name: value for name, value in state.items() if name != "weight"}
        )
