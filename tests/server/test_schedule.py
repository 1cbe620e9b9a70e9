"""Phases, ratios and rankings of the rounds."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.configuration import parse
from adadpigu_core.masking import SCHEDULES
from server.schedule import Importance, Schedule


def plan(**changes):
    changes = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return Schedule(parse({"federation.num-rounds": 10, **changes}))


def ratios(schedule):
    return [schedule.ratio(number) for number in range(1, schedule.configuration.federation.num_rounds + 1)]


class TestSchedule:
    def test_phases(self):
        schedule = plan(pretraining__round_share=0.3)
        assert [schedule.phase(number) for number in range(1, 11)] == ["pretraining"] * 3 + ["training"] * 7

    def test_linear_by_hand(self):
        schedule = plan(pretraining__round_share=0.1, retention__period=0.5, retention__initial_ratio=0.6)
        # training is round 2 to 10; half of the eight steps between them is four
        expected = [1.0, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0]
        assert ratios(schedule) == pytest.approx(expected)

    @given(
        st.sampled_from([name for name in SCHEDULES if name != "constant"]),
        st.integers(2, 60),
        st.floats(0.01, 0.9),
        st.floats(0.05, 1),
        st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    )
    def test_grows_from_the_first_ratio_to_the_last(self, name, rounds, share, period, ends):
        schedule = plan(
            federation__num_rounds=rounds,
            pretraining__round_share=share,
            retention__schedule=name,
            retention__period=period,
            retention__initial_ratio=ends[0],
            retention__final_ratio=ends[1],
        )
        first = schedule.configuration.pretraining_rounds
        seen = ratios(schedule)
        assert seen[:first] == [1.0] * first
        training = seen[first:]
        assert training == sorted(training)
        assert training[-1] == pytest.approx(ends[1])
        if len(training) > 1:
            assert training[0] == pytest.approx(ends[0])
        assert all(ends[0] - 1e-9 <= ratio <= ends[1] + 1e-9 for ratio in training)

    def test_the_defect_of_the_published_code_would_show(self):
        """It always asked for step 0: then nothing is ever unfrozen."""
        schedule = plan(retention__initial_ratio=0.2, retention__period=0.5)
        assert len(set(ratios(schedule)[1:])) > 3
        stuck = [schedule.ratio(schedule.configuration.pretraining_rounds + 1) for _ in range(9)]
        assert len(set(stuck)) == 1

    def test_constant_ignores_the_final_ratio(self):
        schedule = plan(retention__schedule="constant", retention__initial_ratio=0.7, retention__final_ratio=0.1)
        assert ratios(schedule)[1:] == [0.7] * 9

    def test_without_pretraining_everything_is_trained_unless_at_random(self):
        settings = {"pretraining__round_share": 0.0, "retention__initial_ratio": 0.5, "retention__schedule": "constant"}
        assert ratios(plan(pretraining__ranking="random", **settings)) == [0.5] * 10
        assert ratios(plan(**{**settings, "retention__initial_ratio": 1.0})) == [1.0] * 10

    def test_one_round_is_for_training(self):
        schedule = plan(federation__num_rounds=1)
        assert (schedule.phase(1), schedule.ratio(1)) == ("training", 1.0)


class TestReranking:
    def test_is_due_after_every_so_many_rounds_of_training(self):
        schedule = plan(pretraining__round_share=0.3, retention__rerank_every=2)
        assert [number for number in range(1, 11) if schedule.reranks(number)] == [6, 8, 10]
        schedule = plan(pretraining__round_share=0.0, retention__rerank_every=3)
        assert [number for number in range(1, 11) if schedule.reranks(number)] == [4, 7, 10]
        assert not any(plan().reranks(number) for number in range(1, 11))

    @given(st.integers(0, 12), st.floats(0, 0.9), st.integers(2, 30))
    def test_never_in_pretraining_nor_before_anything_was_trained(self, every, share, rounds):
        schedule = plan(
            federation__num_rounds=rounds,
            pretraining__round_share=share,
            retention__rerank_every=every,
            retention__initial_ratio=1.0,
        )
        trained = 0
        for number in range(1, rounds + 1):
            training = schedule.phase(number) == "training"
            due = training and every > 0 and trained > 0 and trained % every == 0
            assert schedule.reranks(number) == due
            trained += training

    def test_without_pretraining_the_schedule_begins_with_the_first_ranking(self):
        settings = {"pretraining__round_share": 0.0, "retention__initial_ratio": 0.6, "retention__period": 0.5}
        schedule = plan(**settings, retention__rerank_every=2)
        # ranked from round 3 on; half of the seven steps from there is three and a half
        grown = [0.6 + 0.4 * min(1, step / 3.5) for step in range(8)]
        assert ratios(schedule) == pytest.approx([1.0, 1.0, *grown])

    def test_with_pretraining_the_share_is_what_it_was(self):
        assert ratios(plan(retention__rerank_every=2)) == ratios(plan())

    def test_scores_replace_what_pretraining_has_found(self):
        importance = Importance("consensus", 4, seed=0, signed=True)
        importance.add("a", torch.tensor([-9.0, 1.0, 0.0, 2.0]), 1.0)
        assert importance.mask("a", 0.5).tolist() == [True, False, False, True]
        importance.rerank(torch.tensor([-9.0, 0.1, 0.0, -1.0]))
        importance.add("a", torch.tensor([9.0, 0.0, 0.0, 0.0]), 1.0)
        assert importance.mask("a", 0.5).tolist() == [False, True, True, False]
        importance.rerank(torch.tensor([0.0, 0.0, 1.0, 2.0]))
        assert importance.mask("b", 0.5).tolist() == [False, False, True, True]

    def test_groups_are_ranked_by_their_mean(self):
        importance = Importance("consensus", 4, seed=0, group=torch.tensor([0, 1, 0, 1]))
        importance.rerank(torch.tensor([3.0, 2.0, -2.0, 1.0]))
        assert importance.mask("a", 0.5).tolist() == [False, True, False, True]


class TestConsensus:
    def test_scores_are_added_up_with_weights_and_ranked_once(self):
        importance = Importance("consensus", 4, seed=0)
        importance.add("a", torch.tensor([1.0, 0.0, 0.0, 5.0]), 1.0)
        importance.add("b", torch.tensor([0.0, 4.0, 0.0, -2.0]), 2.0)
        assert importance.mask("a", 0.25).tolist() == [False, True, False, False]  # 1, 8, 0, 1
        assert importance.mask("b", 0.5).tolist() == [True, True, False, False]  # a tie: index order
        assert importance.mask("never seen", 0.5) is importance.mask("a", 0.5)

    def test_everything_is_none(self):
        assert Importance("consensus", 4, seed=0).mask("a", 1.0) is None

    @given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=10))
    def test_masks_are_nested(self, shares):
        importance = Importance("consensus", 50, seed=0)
        importance.add("a", torch.rand(50, generator=torch.Generator().manual_seed(1)), 1.0)
        masks = [importance.mask("a", ratio) for ratio in sorted(shares)]
        for smaller, larger in itertools.pairwise(masks):
            assert bool((larger | ~smaller).all())
        assert [int(mask.sum()) for mask in masks] == [max(1, round(ratio * 50)) for ratio in sorted(shares)]

    def test_a_mask_for_another_ratio_is_another_mask(self):
        importance = Importance("consensus", 8, seed=0)
        importance.add("a", torch.arange(8.0), 1.0)
        sizes = [int(importance.mask("a", ratio).sum()) for ratio in (0.25, 0.5, 0.25)]
        assert sizes == [2, 4, 2]

    def test_nobody_has_released_anything(self, caplog):
        """The order of the layers would look like a ranking and be none."""
        importance = Importance("consensus", 1000, seed=3)
        mask = importance.mask("a", 0.5)
        assert int(mask.sum()) == 500
        assert 200 < int(mask[:500].sum()) < 300
        assert "at random" in caplog.text


class TestLocal:
    def test_every_data_set_has_its_own(self):
        importance = Importance("local", 4, seed=0)
        importance.add("a", torch.tensor([4.0, 3.0, 2.0, 1.0]), 1.0)
        importance.add("b", torch.tensor([1.0, 2.0, 3.0, 4.5]), 1.0)
        assert importance.mask("a", 0.25).tolist() == [True, False, False, False]
        assert importance.mask("b", 0.25).tolist() == [False, False, False, True]
        # a newcomer takes everyone's: 5, 5, 5, 5.5
        assert importance.mask("c", 0.5).tolist() == [True, False, False, True]

    def test_rounds_of_one_client_add_up(self):
        importance = Importance("local", 2, seed=0)
        importance.add("a", torch.tensor([1.0, 0.0]), 1.0)
        importance.add("a", torch.tensor([0.0, 3.0]), 1.0)
        assert importance.scores["a"].tolist() == [1.0, 3.0]


class TestRandom:
    def test_is_a_function_of_the_seed_and_of_nothing_else(self):
        masks = []
        for seed, scores in ((1, 0.0), (1, 9.0), (2, 0.0)):
            torch.manual_seed(math.floor(scores))
            importance = Importance("random", 100, seed=seed)
            importance.add("a", scores * torch.arange(100.0), 1.0)
            masks.append(importance.mask("a", 0.3))
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])
        assert [int(mask.sum()) for mask in masks] == [30] * 3
