"""Metrics for TensorBoard, read back by TensorBoard itself."""

import sys

import pytest


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_every_round_is_logged(finished, folder):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra tensorboard"
    )
    run = finished(folder, runtime__tensorboard="true")
    log = events.EventAccumulator(str(folder / "tensorboard"))
    log.Reload()
    for key in ("accuracy", "epsilon"):
        logged = [(scalar.step, pytest.approx(scalar.value, abs=1e-5)) for scalar in log.Scalars(key)]
        assert logged == [(line["round"], line[key]) for line in run.metrics]
    assert {"epsilons/client-0", "stages/clients"} <= set(log.Tags()["scalars"])


def test_without_tensorboard_it_is_named(adadpigu, tiny, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = adadpigu("--output", folder, settings={**tiny, "runtime.tensorboard": "true"})
    assert result.exit_code == 2
    assert "pip install 'adadpigu" in result.output
