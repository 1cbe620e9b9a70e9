"""The defects of the published code that masks have to do with; test_defects.py has the others, and says how."""

from dataclasses import replace

import pytest
import torch

from adadpigu_core import importance, local_training, masking
from adadpigu_core.parameters import ParameterLayout, assign, flatten


@pytest.fixture
def records(make_records):
    return make_records("mlp", 16)


@pytest.fixture
def model(make_model):
    return make_model("mlp")


def half_of(model):
    return torch.arange(ParameterLayout.of(model).num_parameters) % 2 == 0


# ---- 4. the unfreezing schedule is always asked for step 0, and only re-enables what is already enabled


def check_unfreezing_acts(train, model, records, schedule):
    """Over the rounds the mask grows from a fifth to everything, and what it lets in really moves."""
    d = ParameterLayout.of(model).num_parameters
    ranking = importance.rank(torch.rand(d, generator=torch.Generator().manual_seed(1)))
    retained, moved = [], []
    for current in range(5):
        mask = masking.mask_of(ranking, masking.retention_ratio(schedule, 0.2, 1.0, current / 4))
        retained.append(int(mask.sum()))
        moved.append(int((train(model, records, mask=mask).update != 0).sum()))
    assert moved == retained
    assert retained[0] == round(0.2 * d)
    assert retained[-1] == d
    assert retained == sorted(retained)
    assert len(set(retained)) > 2


def ask_for_step_zero(monkeypatch):
    original = masking.retention_ratio
    monkeypatch.setattr(masking, "retention_ratio", lambda *arguments: original(*arguments[:3], 0.0))


def enable_what_is_enabled(monkeypatch):
    original, enabled = masking.mask_of, []

    def stubborn(*arguments):
        enabled.append(original(*arguments))
        return enabled[-1] & enabled[0]

    monkeypatch.setattr(masking, "mask_of", stubborn)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
@pytest.mark.parametrize("defect", [ask_for_step_zero, enable_what_is_enabled])
def test_4_no_unfreezing(train, monkeypatch, model, records, schedule, defect):
    check_unfreezing_acts(train, model, records, schedule)
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check_unfreezing_acts(train, model, records, schedule)


# ---- 5. top-k uses the pruning rate where the retention ratio belongs


def check_the_mask_retains_the_most_important(ratio):
    scores = torch.randn(100, generator=torch.Generator().manual_seed(1))
    mask = masking.mask_of(importance.rank(scores), ratio)
    assert int(mask.sum()) == round(100 * ratio)
    assert scores[mask].min() > scores[~mask].max()


def prune_instead_of_retain(monkeypatch):
    original = masking.mask_of
    monkeypatch.setattr(masking, "mask_of", lambda ranking, ratio: original(ranking, 1 - ratio))


def retain_the_least_important(monkeypatch):
    original = importance.rank
    monkeypatch.setattr(importance, "rank", lambda scores: original(-scores))


def invert_the_mask(monkeypatch):
    original = masking.mask_of
    monkeypatch.setattr(masking, "mask_of", lambda *arguments: ~original(*arguments))


@pytest.mark.parametrize("ratio", [0.2, 0.6])
@pytest.mark.parametrize("defect", [prune_instead_of_retain, retain_the_least_important, invert_the_mask])
def test_5_inverted_sparsity(monkeypatch, ratio, defect):
    check_the_mask_retains_the_most_important(ratio)
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check_the_mask_retains_the_most_important(ratio)


# ---- 6. evaluation zeroes frozen weights that training runs with


def check_frozen_weights_stay_where_they_are(train, make_model, records):
    """The weights after a round, and what they predict, are those that training ran with."""
    model, expected = make_model("mlp"), make_model("mlp")
    start, frozen = flatten(model), ~half_of(model)
    assert bool((start[frozen] != 0).all())
    result = train(model, records, mask=~frozen, steps=3)
    assert torch.equal(flatten(model)[frozen], start[frozen])
    assign(expected, start + result.update)
    assert torch.allclose(model(records.features), expected(records.features), atol=1e-5)


def zero_frozen_weights_after_training(monkeypatch):
    original = local_training.train_round

    def zeroing(*arguments, **options):
        result = original(*arguments, **options)
        model, mask = arguments[0], arguments[4]
        assign(model, torch.where(mask, flatten(model), 0.0))
        return result

    monkeypatch.setattr(local_training, "train_round", zeroing)


def send_zero_for_frozen_weights(monkeypatch):
    original = local_training.train_round

    def zeroing(*arguments, **options):
        mask, start = arguments[4], flatten(arguments[0])
        result = original(*arguments, **options)
        return replace(result, update=torch.where(mask, result.update, -start))

    monkeypatch.setattr(local_training, "train_round", zeroing)


@pytest.mark.parametrize("defect", [zero_frozen_weights_after_training, send_zero_for_frozen_weights])
def test_6_frozen_weights_are_evaluated_as_zero(train, monkeypatch, make_model, records, defect):
    check_frozen_weights_stay_where_they_are(train, make_model, records)
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check_frozen_weights_stay_where_they_are(train, make_model, records)
