"""Records and models of the user's own, from the command to the result."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

NETWORK = """
from torch import nn

def net(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], 6), nn.Tanh(), nn.Linear(6, num_classes))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of tables, and an installed package."""
    generator = np.random.default_rng(0)
    for split, size in (("train", 90), ("test", 30)):
        labels = np.arange(size) % 2
        rows = np.column_stack([labels, generator.normal(size=(size, 3)) + 4 * labels[:, None]])
        np.savetxt(tmp_path / f"{split}.csv", rows, "%g", delimiter=",", header="outcome,a,b,c", comments="")
    (tmp_path / "own_networks.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_networks", None)


def test_a_table_and_a_model_by_import_path(adadpigu, run_in, tiny, folder, own):
    settings = {**tiny, "task.dataset": f"csv:{own}#outcome", "task.model": "own_networks:net"}
    result = adadpigu("--output", folder, settings=settings)
    assert result.exit_code == 0, result.output
    assert run_in(folder).json()["parameters"] == 3 * 6 + 6 + 6 * 2 + 2


def test_a_model_that_is_not_installed(adadpigu, tiny, folder, own):
    settings = {**tiny, "task.dataset": f"csv:{own}#outcome", "task.model": "no_such_networks:net"}
    result = adadpigu("--output", folder, settings=settings)
    assert result.exit_code == 2
    assert "no_such_networks:net: cannot be imported on this machine" in result.stderr


GUIDE = Path(__file__).resolve().parents[2] / "docs" / "own-task.md"


def test_the_guide_to_a_new_modality(adadpigu, run_in, folder, tmp_path, monkeypatch):
    """Its files, as they are printed there, and what it says comes out."""
    text = GUIDE.read_text(encoding="utf-8")
    files = re.findall(r"`([\w.]+)` [^\n]*\n(?:[^\n]+\n)?\n```\w+\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in files] == ["waves.py", "waves_network.py", "waves.toml"]
    for name, content in files:
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    result = adadpigu("--config", tmp_path / "waves.toml", "--output", folder)
    assert result.exit_code == 0, result.output
    assert run_in(folder).json()["accuracy"] > 0.97


def test_a_function_that_is_not_there(adadpigu, tiny, folder):
    result = adadpigu("--output", folder, settings={**tiny, "task.dataset": "python:no_such_records:load"})
    assert result.exit_code == 1
    assert "python:no_such_records:load: cannot be imported" in result.stderr
    assert "PYTHONPATH" in result.stderr
    result = adadpigu("--output", folder, settings={**tiny, "task.dataset": "python:records.py"})
    assert result.exit_code == 2
    assert "task.dataset" in result.stderr
