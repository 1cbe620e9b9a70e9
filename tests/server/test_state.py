"""A run that was interrupted goes on as if nothing had happened, bit by bit."""

import copy

import numpy as np
import pytest
import torch

from adadpigu_core import archive
from adadpigu_core.configuration import flatten, parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.parameters import ParameterLayout
from server.state import ServerState


class StoppedError(Exception):
    """Ends a run from outside."""


def clients(kit):
    """Three clients with importance and updates of their own, which depend on the weights that they are sent."""

    def answer(client, request):
        d, number = kit.D, int(client.name)
        scores = np.random.default_rng(number).random(d, dtype=np.float32) if request.importance_measure else None
        update = 0.1 * np.sin(request.weights * 3 + number + request.round)[client.masks[request.mask_id]]
        scale = 1.0 if request.gradient_scale is None else float(request.gradient_scale.mean())
        return client.release(request, update=(update * scale).astype(np.float32), importance=scores)

    script = dict.fromkeys(range(1, 9), answer)
    made = [kit.Client(str(number), script, noise=(2.0, 1.0 + number)) for number in range(3)]
    for number, client in enumerate(made):
        client.data_set = f"data-set-{number}"
    return made


SETTINGS = {
    "plain": {},
    "momentum": {"optimiser__momentum": 0.9, "optimiser__warmup_rounds": 4},
    "adam": {"optimiser__name": "adam", "optimiser__momentum": 0.9, "optimiser__server_learning_rate": 0.1},
    "local": {"pretraining__ranking": "local", "retention__schedule": "step"},
    "random": {"pretraining__ranking": "random"},
    "client": {"adaptive_clipping__owner": "client"},
    "paper": {"adaptive_clipping__rule": "paper"},
    "ranked anew": {"retention__rerank_every": 2, "retention__final_ratio": 0.6, "optimiser__momentum": 0.9},
    "coordinate": {"adaptive_clipping__granularity": "coordinate", "adaptive_clipping__centre": True},
}


class TestResume:
    @pytest.mark.parametrize(
        ("name", "stop"), [*((name, 3) for name in SETTINGS), ("plain", 1), ("local", 2), ("ranked anew", 4)]
    )
    def test_is_bit_identical(self, kit, name, stop):
        settings = {"federation__num_rounds": 6, "retention__period": 1.0, **SETTINGS[name]}
        whole = kit.Federation(clients(kit), **settings)
        whole.run()

        def crash(report):
            if report.round == stop:
                raise StoppedError

        first = kit.Federation(clients(kit), crash, **settings)
        with pytest.raises(StoppedError):
            first.run()
        data = archive.pack(*first.state.dump())
        second = kit.Federation(copy.deepcopy(first.clients), checkpoint=archive.unpack(data), **settings)
        second.run()

        assert [report.round for report in second.reports] == list(range(stop + 1, 7))
        assert second.state.run == first.state.run
        for key, value in whole.state.dump()[0].items():
            np.testing.assert_array_equal(second.state.dump()[0][key], value, strict=True)
        assert second.state.tally.report() == whole.state.tally.report()
        assert second.state.bytes_up > first.state.bytes_up

    def test_the_check_would_find_a_forgotten_moment(self, kit, monkeypatch):
        """Negative control: momentum that is not restored gives other weights."""
        settings = {"federation__num_rounds": 8, **SETTINGS["momentum"]}
        whole, first = kit.Federation(clients(kit), **settings), kit.Federation(clients(kit), **settings)
        whole.run()
        first.observer = lambda report: (_ for _ in ()).throw(StoppedError) if report.round == 4 else None
        with pytest.raises(StoppedError):
            first.run()
        arrays, values = archive.unpack(archive.pack(*first.state.dump()))
        arrays = {name: array for name, array in arrays.items() if not name.startswith("optimiser.")}
        second = kit.Federation(first.clients, checkpoint=(arrays, values), **settings)
        second.run()
        assert not torch.equal(second.state.optimiser.weights, whole.state.optimiser.weights)

    def test_before_the_first_round(self, kit):
        federation = kit.Federation(clients(kit))
        checkpoint = archive.unpack(archive.pack(*federation.state.dump()))
        again = kit.Federation(clients(kit), checkpoint=checkpoint)
        again.run()
        federation.run()
        assert torch.equal(again.state.optimiser.weights, federation.state.optimiser.weights)


class TestDump:
    def test_is_a_copy(self, kit):
        federation = kit.Federation(clients(kit))
        dumps = []
        federation.observer = lambda report: dumps.append(
            (federation.state.dump(), archive.pack(*federation.state.dump()))
        )
        federation.run()
        for (arrays, _), packed in dumps:
            for name, value in archive.unpack(packed)[0].items():
                np.testing.assert_array_equal(arrays[name], value)

    def test_runs_have_identities_of_their_own(self, kit, configure):
        runs = {ServerState.fresh(configure(), kit.LAYOUT).run for _ in range(10)}
        assert len(runs) == 10


class TestAnotherRun:
    def test_of_another_model_is_refused(self, kit, configure):
        arrays, values = ServerState.fresh(configure(), kit.LAYOUT).dump()
        other = ParameterLayout(("weight",), ((8,),))
        assert other.num_parameters == kit.D
        with pytest.raises(ConfigurationError, match="another model"):
            ServerState.fresh(configure(), other).restore(arrays, values)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("federation.num-rounds", 5),
            ("privacy.clipping-norm", 2.0),
            ("privacy.ledger-dir", "elsewhere"),
            ("optimiser.name", "adam"),
            ("adaptive-clipping.granularity", "row"),
            ("seed", 7),
        ],
    )
    def test_of_other_settings_is_refused_by_name(self, kit, configure, key, value):
        flat = flatten(configure())
        dump = ServerState.fresh(parse(flat), kit.LAYOUT).dump()
        with pytest.raises(ConfigurationError, match=key) as error:
            ServerState.fresh(parse({**flat, key: value}), kit.LAYOUT).restore(*dump)
        assert repr(flat[key]) in str(error.value)

    def test_of_an_older_form_is_refused(self, kit, configure):
        arrays, values = ServerState.fresh(configure(), kit.LAYOUT).dump()
        del values["settings"]
        with pytest.raises(ConfigurationError, match="checkpoint"):
            ServerState.fresh(configure(), kit.LAYOUT).restore(arrays, values)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("runtime.output", "/elsewhere"),
            ("runtime.workers", 3),
            ("runtime.evaluate-every", 9),
            ("federation.round-timeout", 1.0),
            ("federation.start-timeout", 1.0),
        ],
    )
    def test_how_it_is_carried_out_may_change(self, kit, configure, key, value):
        flat = flatten(configure())
        first = ServerState.fresh(parse(flat), kit.LAYOUT)
        second = ServerState.fresh(parse({**flat, key: value}), kit.LAYOUT)
        second.restore(*first.dump())
        assert second.run == first.run
