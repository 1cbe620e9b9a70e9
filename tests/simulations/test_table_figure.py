"""Tables as pictures."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from simulations.command_line import app


def cell(title, mean, bytes_up, private=True):
    return {"title": title, "mean": mean, "stddev": 0.5, "bytes_up": bytes_up, "private": private}


@pytest.fixture
def table(tmp_path):
    methods = {
        "one": cell("mask", 80.0, 1e6),
        "two": cell("plain", 70.0, 5e6),
        "three": cell("bound", 81.0, 1e6, False),
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"title": "Made up", "rows": [{"label": "epsilon 4", "methods": methods}]}))
    return path


def test_a_picture_is_written(table, tmp_path):
    done = CliRunner().invoke(app, ["figure", str(table), "--output", str(tmp_path / "table.png")])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "table.png") as image:
        assert image.size[0] > 300
        assert len(image.convert("L").getcolors(256)) > 10


def test_every_method_of_a_long_table_is_drawn(tmp_path):
    methods = {str(number): cell(f"method-{number}", 70.0 + number, 1e6) for number in range(13)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"title": "Long", "rows": [{"label": "a", "methods": methods}] * 2}))
    done = CliRunner().invoke(app, ["figure", str(path), "--output", str(tmp_path / "table.svg")])
    assert done.exit_code == 0, done.output
    drawn = (tmp_path / "table.svg").read_text()
    assert [drawn.count(f"<!-- method-{number} -->") for number in range(13)] == [1] * 13


@pytest.mark.parametrize(("content", "name"), [("[]", "a.png"), ("no", "a.png"), (None, "a.png"), ("", "a.png")])
def test_what_is_no_table_is_refused(tmp_path, content, name):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["figure", str(path), "--output", str(tmp_path / name)])
    assert done.exit_code != 0
    assert not (tmp_path / name).exists()


def test_an_unknown_format_is_refused(table, tmp_path):
    done = CliRunner().invoke(app, ["figure", str(table), "--output", str(tmp_path / "table.doc")])
    assert done.exit_code != 0
    assert not isinstance(done.exception, ValueError)
