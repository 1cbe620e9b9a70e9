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
    assert drawn.count("<!-- a -->") == 2, "rows that are called the same have a panel each"


def rows_over_epsilon(tmp_path, **more):
    rows = [
        {"label": f"{kind}, epsilon {epsilon}", "methods": {"one": cell("mask", 70.0 + epsilon, 1e6)}, **more}
        | {"target_epsilon": float(epsilon)}
        for kind in ("IID", "Dirichlet 0.5")
        for epsilon in (8, 1, 2)
    ]
    path = tmp_path / "over.json"
    path.write_text(json.dumps({"title": "Over epsilon", "quality": "area_under_curve", "rows": rows}))
    return path, rows


def test_against_epsilon_rows_share_a_panel_for_each_kind(tmp_path):
    path, _ = rows_over_epsilon(tmp_path)
    picture = tmp_path / "over.svg"
    done = CliRunner().invoke(app, ["figure", str(path), "--against", "epsilon", "--output", str(picture)])
    assert done.exit_code == 0, done.output
    drawn = picture.read_text()
    assert [drawn.count(f"<!-- {text} -->") for text in ("IID", "Dirichlet 0.5", "epsilon of each client")] == [1, 1, 2]
    assert "<!-- area under the curve on test data, % -->" in drawn


def test_a_table_that_does_not_say_its_epsilons_is_refused(table, tmp_path):
    done = CliRunner().invoke(
        app, ["figure", str(table), "--against", "epsilon", "--output", str(tmp_path / "table.png")]
    )
    assert done.exit_code != 0
    assert "does not say its epsilons" in done.output
    assert not (tmp_path / "table.png").exists()


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
