"""Masks that are ranked anew during training: what is asked for, round by round."""

import copy

import numpy as np
import pytest
import torch

from adadpigu_core.grouping import groups
from adadpigu_core.models import build
from adadpigu_core.parameters import flatten
from server import app
from server.run_folder import RunFolder
from server.schedule import Importance

# gradients of the eight coordinates: a weight of 2 x 3, and a bias
TRUTH = np.array([0.0, 0.1, 0.9, 0.2, 0.3, 0.8, 0.6, 0.7], np.float32)
WRONG = np.array([0.5, 0.5, 0.6, 0.2, 0.2, 0.55, 0.4, 0.4], np.float32)
SETTINGS = {
    "pretraining__measure": "drift",
    "retention__schedule": "constant",
    "federation__num_rounds": 8,
    "adaptive_clipping__rule": "none",
}


def misled(kit, name="a", **facts):
    """A client whose pretraining misjudges the first two coordinates, and whose training shows the true gradients."""

    def release(client, request):
        gradient = WRONG if request.phase == "pretraining" else TRUTH * (1 + 0.1 * np.sin(request.round))
        update = -request.learning_rate * request.steps * gradient[client.masks[request.mask_id]]
        return client.release(request, update=update.astype(np.float32))

    return kit.Client(name, dict.fromkeys(range(1, 20), release), **facts)


def trained(kit, clients, **settings):
    federation = kit.Federation(clients, **{**SETTINGS, **settings})
    federation.run(timeout=0.1)
    return federation


def masks(client):
    return [client.masks[request.mask_id].tolist() for request in client.requests]


def releases(kit, client, rate=1.0):
    """What a lone client released in each round, as gradients [d], nan where it released nothing."""
    gradients = []
    for request in client.requests:
        gradient = np.full(kit.D, np.nan)
        mask = client.masks[request.mask_id]
        truth = WRONG if request.phase == "pretraining" else TRUTH * (1 + 0.1 * np.sin(request.round))
        gradient[mask] = truth[mask]
        gradients.append(gradient)
    return gradients


def expected_mask(gradients, noises, retained, group=None):
    """Slow and by definition: the best groups by the mean of ((sum)^2 - noise) / rounds^2 plus its deviation."""
    energies, variances = [], []
    for j in range(len(gradients[0])):
        seen = [(g[j], n) for g, n in zip(gradients, noises, strict=True) if not np.isnan(g[j])]
        total, noise = sum(g for g, _ in seen), sum(n**2 for _, n in seen)
        energies.append((total**2 - noise) / len(seen) ** 2)
        variances.append(2 * noise**2 / len(seen) ** 4)
    group = list(range(len(energies))) if group is None else group
    means = {}
    for g in dict.fromkeys(group):
        own = [j for j in range(len(group)) if group[j] == g]
        deviation = np.sqrt(sum(variances[j] for j in own)) / len(own)
        means[g] = sum(energies[j] for j in own) / len(own) + deviation
    chosen: set[int] = set()
    for best in sorted(means, key=lambda g: -means[g]):
        if sum(own in chosen | {best} for own in group) > retained:
            break
        chosen.add(best)
    return [own in chosen for own in group]


@pytest.mark.parametrize("granularity", ["coordinate", "row", "column"])
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_masks_are_those_of_a_slow_oracle(kit, granularity, rate):
    client = misled(kit)
    settings = {"retention__granularity": granularity, "optimiser__local_learning_rate": rate}
    trained(kit, [client], retention__rerank_every=2, **settings)
    asked, gradients = masks(client), releases(kit, client)
    noises = [2.0 / 50] * 2 + [1.0 / 50] * 6  # sigma C / (q n)
    group = groups(kit.LAYOUT, granularity).tolist()
    assert asked[:2] == [[True] * 8] * 2
    assert asked[2] == asked[3] == expected_mask(gradients[:2], noises[:2], 4, group)
    for ranked in (4, 6):
        assert asked[ranked] == asked[ranked + 1] == expected_mask(gradients[:ranked], noises[:ranked], 4, group)


def test_what_pretraining_got_wrong_is_put_right(kit):
    """Ranked once, the mask stays wrong; ranked anew, it ends with the four that matter, whichever came first."""
    strongest = (TRUTH >= 0.6).tolist()
    once, anew = misled(kit), misled(kit)
    trained(kit, [once])
    trained(kit, [anew], retention__rerank_every=1)
    wrong = (WRONG >= 0.5).tolist()
    assert wrong[0]
    assert wrong != strongest
    assert masks(once)[2:] == [wrong] * 6
    assert masks(anew)[2] == wrong
    assert masks(anew)[-1] == strongest
    without = misled(kit)
    trained(kit, [without], pretraining__round_share=0.0, retention__rerank_every=2)
    assert masks(without) == [[True] * 8] * 2 + [strongest] * 6


def test_bad_luck_does_not_last(kit):
    """By the energy alone, what was left out with an estimate below zero would be left out for ever."""
    client = kit.Client("a", dict.fromkeys(range(1, 9), lambda c, r: c.release(r)), value=0.0)
    trained(kit, [client], retention__rerank_every=1, retention__initial_ratio=0.75)
    seen = masks(client)[2:]
    assert seen[0] == [True] * 6 + [False] * 2
    assert seen[1] == [True] * 4 + [False] * 2 + [True] * 2
    assert {sum(mask) for mask in seen} == {6}


def test_a_coordinate_that_is_dropped_keeps_its_weight(kit):
    client, weights = misled(kit), []
    federation = kit.Federation(
        [client],
        lambda _: weights.append(federation.state.optimiser.weights.numpy()),
        **SETTINGS,
        pretraining__round_share=0.0,
        retention__rerank_every=2,
        optimiser__momentum=0.9,
    )
    federation.run()
    weak = TRUTH < 0.6
    for later in weights[2:]:
        np.testing.assert_array_equal(later[weak], weights[1][weak])
    assert np.all(weights[-1][~weak] != weights[1][~weak])
    assert not np.array_equal(weights[1], flatten(build(kit.SPEC, seed=0)).numpy())


def test_bits_travel_only_when_the_mask_is_another(kit):
    client = misled(kit)
    trained(kit, [client], pretraining__round_share=0.0, retention__rerank_every=2)
    # ranked three times, with the same outcome
    assert [request.mask is not None for request in client.requests] == [False, False, True] + [False] * 5


def test_two_clients_are_ranked_by_the_mean_of_their_releases(kit):
    """Each alone would rank otherwise; together the coordinates in which they agree come first."""

    def only(part):
        def release(client, request):
            gradient = np.where(part, 1.0, np.where(np.arange(kit.D) < 4, 0.7, -0.1))
            return client.release(request, update=-gradient[client.masks[request.mask_id]].astype(np.float32))

        return dict.fromkeys(range(1, 9), release)

    one = kit.Client("a", only(np.isin(np.arange(8), (4, 5))))
    other = kit.Client("b", only(np.isin(np.arange(8), (6, 7))))
    trained(kit, [one, other], pretraining__round_share=0.0, retention__rerank_every=1)
    assert masks(one) == masks(other)
    assert masks(one)[1:] == [[True] * 4 + [False] * 4] * 7


class TestRoundsThatFail:
    def test_a_mask_that_comes_back_after_a_lost_reply_is_sent_again(self, kit):
        """The node may have forgotten it for the one whose answer was lost."""
        client = misled(kit)
        federation = kit.Federation([client], **SETTINGS)
        strategy, state = federation.strategy, federation.state
        first, second = torch.arange(8.0), torch.arange(8.0).flip(0)
        lose = {4: lambda *_: kit.LOST}
        client.script = {**client.script, **lose}
        scores = {3: first, 4: second, 5: first}
        configure = strategy.configure_train

        def ranked(number, *rest):
            if number in scores:
                state.importance.rerank(scores[number])
            return configure(number, *rest)

        strategy.configure_train = ranked
        federation.run(timeout=0.1)
        ids = [request.mask_id for request in client.requests]
        assert ids[2] == ids[4] != ids[3]
        assert [request.mask is not None for request in client.requests][2:6] == [True, True, True, False]

    def test_ranks_by_what_there_is(self, kit):
        """Rounds without any reply teach nothing, and everything is trained until something is known."""
        client = misled(kit)
        client.script = {**client.script, **dict.fromkeys((2, 3), lambda *_: kit.LOST)}
        trained(kit, [client], pretraining__round_share=0.0, retention__rerank_every=3)
        assert masks(client)[3:] == [(TRUTH >= 0.6).tolist()] * 5

    def test_if_nothing_was_released_the_order_of_the_layers_is_no_ranking(self, kit, caplog):
        client = misled(kit)
        client.script = {**client.script, **dict.fromkeys((1, 2), lambda *_: kit.LOST)}
        trained(kit, [client], pretraining__round_share=0.0, retention__rerank_every=2)
        asked = masks(client)
        assert "at random" in caplog.text
        assert asked[2] != [True] * 4 + [False] * 4
        assert sum(asked[2]) == 4


def test_the_first_ranking_is_by_the_measure_that_was_asked_for(kit):
    """Scores of single releases rank at the start of training, and drift from then on."""
    client = misled(kit)
    scored = dict(client.script)
    scored[1] = scored[2] = lambda c, r: c.release(r, update=-WRONG, importance=np.arange(8, dtype=np.float32))
    client.script = scored
    trained(kit, [client], pretraining__measure="magnitude", retention__rerank_every=3)
    assert masks(client)[2] == [False] * 4 + [True] * 4
    noises = [2.0 / 50] * 2 + [1.0 / 50] * 3
    assert masks(client)[5] == expected_mask(releases(kit, client)[:5], noises, 4)


def test_soft_masks_learn_the_same_releases_before_they_are_shrunk(kit):
    plain, soft = misled(kit), misled(kit)
    settings = {"pretraining__round_share": 0.0, "retention__rerank_every": 2}
    one = trained(kit, [plain], **settings)
    other = trained(kit, [soft], **settings, shrinkage__rule="drift")
    assert masks(plain) == masks(soft)
    assert torch.equal(one.state.drift.total, other.state.drift.total)
    assert torch.equal(other.state.drift.total, other.state.shrinkage.drift.total)


def test_without_it_nothing_is_kept(kit):
    federation = trained(kit, [misled(kit)])
    assert not [name for name in federation.state.dump()[0] if name.startswith("drift")]


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_goes_on_bit_by_bit(kit, stop, share):
    settings = {**SETTINGS, "pretraining__round_share": share, "retention__rerank_every": 2}
    settings |= {"retention__schedule": "linear", "retention__initial_ratio": 0.25, "optimiser__momentum": 0.9}
    whole = misled(kit)
    whole.data_set = "data-set"
    finished = kit.Federation([whole], **settings)
    kept = []
    finished.observer = lambda report: kept.append((finished.state.dump(), copy.deepcopy(whole)))
    finished.run()
    checkpoint, client = kept[stop - 1]
    resumed = kit.Federation([client], checkpoint=checkpoint, **settings)
    resumed.run()
    assert masks(client) == masks(whole)
    for name, value in finished.state.dump()[0].items():
        np.testing.assert_array_equal(resumed.state.dump()[0][name], value, strict=True)


def test_forgetting_that_scores_are_energies_would_show(kit):
    """Negative control: squared once more, as sums of updates are, negative energies rank among the first."""
    federation = kit.Federation([misled(kit)], **SETTINGS, retention__rerank_every=2)
    energies = torch.tensor([-0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.8])
    federation.state.importance.rerank(energies)
    checkpoint = federation.state.dump()
    good = kit.Federation([misled(kit)], checkpoint=checkpoint, **SETTINGS, retention__rerank_every=2).state
    assert good.importance.mask("any", 0.25).tolist() == [False, True, True] + [False] * 5
    checkpoint[1]["importance_settled"] = False
    bad = kit.Federation([misled(kit)], checkpoint=checkpoint, **SETTINGS, retention__rerank_every=2).state
    assert bad.importance.mask("any", 0.25).tolist() == [True] + [False] * 6 + [True]


@pytest.mark.parametrize("owner", ["server", "client"])
def test_real_clients_take_any_mask(kit, configure, npz, tmp_path, monkeypatch, owner):
    """Nothing on a client relies on masks that are nested: each of a row of random ones is accepted."""
    rerank, generator = Importance.rerank, torch.Generator().manual_seed(0)
    monkeypatch.setattr(Importance, "rerank", lambda self, _: rerank(self, torch.rand(kit.D, generator=generator)))
    configuration = configure(
        task__dataset=npz,
        task__model="linear",
        federation__num_rounds=12,
        retention__schedule="constant",
        retention__initial_ratio=0.5,
        retention__rerank_every=1,
        pretraining__measure="drift",
        adaptive_clipping__owner=owner,
        privacy__target_epsilon=1.0,
        runtime__output=str(tmp_path / "run"),
    )
    grid, reports = kit.RealGrid(configuration), []
    result = app.run(grid, configuration, RunFolder(tmp_path / "run"), reports.append)
    assert [(report.clients, report.refused) for report in reports] == [(2, 0)] * 12
    sent = {bytes(m.content.array_records["arrays"]["mask"].data) for m in grid.pushed if _has_mask(m)}
    assert len(sent) > 5  # all of one size, so that none holds another
    assert result["refused"] == []
    assert all(client["epsilon"] <= 1.0 and client["warnings"] == [] for client in result["clients"])


def _has_mask(message):
    return "arrays" in message.content.array_records and "mask" in message.content.array_records["arrays"]
