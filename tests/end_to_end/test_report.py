"""Reports of real runs, in a real browser."""

import json
import shutil
import subprocess
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulations import command_line

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
PHONE = {"width": 390, "height": 844, "pixelRatio": 1.0}


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Two runs that are over; the clients of one have budgets of their own."""
    folder = tmp_path_factory.mktemp("runs")
    clients = folder / "clients.csv"
    clients.write_text("id,records,target_epsilon\nnorth <b>&,200,0.5\nsouth,60,2\nwest,400,8\n")
    finished(folder / "even")
    finished(
        folder / "uneven", federation__clients=clients, privacy__noise_schedule="step", privacy__final_noise_ratio=0.5
    )
    return folder / "even", folder / "uneven"


@pytest.fixture(scope="module")
def report(runs):
    target = runs[0].parent / "both.html"
    result = CliRunner().invoke(command_line.app, ["report", *map(str, runs), "--output", str(target)])
    assert result.exit_code == 0, result.output
    return target


class Page(HTMLParser):
    """Text and attributes of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def test_it_says_what_matters(runs, report):
    page = Page(report)
    for text in (
        "one record of one client",
        "delta is 1e-05",
        "to someone who knows that, the same releases amount to epsilon",
        "Not covered",
        "draws its noise from a seed",
        "north <b>&",
        "within budget",
        "All runs are over.",
        "time: clients",
        "data: from clients",
        'noise-schedule = "step"',
    ):
        assert text in page.words, text
    assert f"{json.loads((runs[0] / 'result.json').read_text())['accuracy']:.4f}" in page.words
    assert ("meta", {"http-equiv": "refresh", "content": "3"}) not in page.tags


def test_it_needs_no_network(report):
    text = report.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text.replace("http-equiv", "")
    assert not any(tag in ("script", "iframe", "img") for tag, _ in Page(report).tags)


def test_figures_have_text_alternatives(report):
    page = Page(report)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) == 3 + 2 * 6
    for figure in figures:
        assert set(figure["aria-labelledby"].split()) <= ids
    dashes = [attributes["stroke-dasharray"] for tag, attributes in page.tags if tag == "polyline"]
    assert len(set(dashes)) >= 3  # not by colour alone


def test_the_run_writes_its_own_and_keeps_it_up_to_date(adadpigu, tiny, folder):
    seen = []

    def look(count, moment):
        path = folder / "report.html"
        if moment == "before" and path.exists():
            seen.append(path.read_text(encoding="utf-8"))

    assert adadpigu("--output", folder, settings=tiny, on_message=look).exit_code == 0
    live = [text for text in seen if 'http-equiv="refresh"' in text]
    assert live == seen
    assert any("Round 1 of 4." in text for text in live)
    final = (folder / "report.html").read_text(encoding="utf-8")
    assert "Finished after 4 rounds." in final
    assert 'http-equiv="refresh"' not in final


def test_a_run_that_has_hardly_begun_has_a_report(runs, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs[0] / "config.toml", begun)
    (begun / "metrics.jsonl").write_text('{"round": 1, "pha')
    result = CliRunner().invoke(command_line.app, ["report", str(begun)])
    assert result.exit_code == 0, result.output
    page = Page(begun / "report.html")
    assert "No client has described itself yet." in page.words
    assert "nothing to show yet" in page.words


@pytest.mark.parametrize("damage", ["nothing", "config", "privacy"])
def test_folders_without_a_run_are_named(runs, tmp_path, damage):
    folder = tmp_path / "run"
    if damage != "nothing":
        shutil.copytree(runs[0], folder)
        (folder / {"config": "config.toml", "privacy": "privacy.json"}[damage]).write_text("{")
    result = CliRunner().invoke(command_line.app, ["report", str(folder), "--output", str(tmp_path / "out.html")])
    assert result.exit_code == 2
    assert str(folder) in result.output
    assert not (tmp_path / "out.html").exists()


class Browser:
    """Headless Chromium through chromedriver's own protocol."""

    def __init__(self, mobile=None):
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        port = next(
            line.rsplit("port ", 1)[1].strip(" .\n") for line in self._driver.stdout if "started successfully" in line
        )
        self._base = f"http://127.0.0.1:{port}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        if mobile:
            options["mobileEmulation"] = {"deviceMetrics": mobile}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._base += "/" + self._post("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _post(self, path, body):
        request = urllib.request.Request(
            self._base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]

    def open(self, path):
        self._post("/url", {"url": Path(path).absolute().as_uri()})

    def run(self, script):
        return self._post("/execute/sync", {"script": script, "args": []})

    def log(self):
        return self._post("/se/log", {"type": "browser"})

    def close(self):
        request = urllib.request.Request(self._base, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()
        self._driver.terminate()
        self._driver.wait(10)
        self._driver.stdout.close()


@pytest.fixture(scope="module", params=[None, PHONE], ids=["desktop", "phone"])
def browser(request, report):
    browser = Browser(request.param)
    browser.open(report)
    yield browser
    browser.close()


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} are not installed; apt-get install chromium-driver")
class TestInABrowser:
    def test_there_is_no_error(self, browser):
        assert browser.log() == []

    def test_the_figures_are_there(self, browser):
        script = (
            "return [...document.querySelectorAll('svg[role=img]')].map(svg => [svg.getBoundingClientRect().width, "
            "svg.getBoundingClientRect().height, svg.querySelectorAll('polyline').length, "
            "Math.max(...[...svg.querySelectorAll('polyline')].map(line => line.getBBox().width))])"
        )
        figures = browser.run(script)
        assert len(figures) == 15
        for width, height, lines, drawn in figures:
            assert width > 250
            assert height > 120
            assert lines >= 1
            assert drawn > 100

    def test_nothing_is_wider_than_the_screen(self, browser):
        wide, screen = browser.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= screen

    def test_letters_are_large_enough(self, browser):
        texts = "[...document.querySelectorAll('p, td, th, li, summary')]"
        sizes = browser.run(f"return {texts}.map(text => parseFloat(getComputedStyle(text).fontSize))")
        assert min(sizes) >= 13

    def test_letters_of_figures_are_large_enough_too(self, browser):
        script = (
            "return [...document.querySelectorAll('svg[role=img] text')].map(text => "
            "parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width / 480)"
        )
        assert min(browser.run(script)) >= 11

    def test_no_label_is_cut_off_or_written_over_another(self, browser):
        script = (
            "return [...document.querySelectorAll('svg[role=img]')].map(svg => "
            "[...svg.querySelectorAll('text')].map(text => {const box = text.getBoundingClientRect(), "
            "whole = svg.getBoundingClientRect(); return [box.left - whole.left, box.top - whole.top, "
            "box.right - whole.left, box.bottom - whole.top, whole.width]}))"
        )
        for labels in browser.run(script):
            for number, (left, top, right, bottom, width) in enumerate(labels):
                assert left >= -1
                assert right <= width + 1
                for other in labels[:number]:
                    apart = left >= other[2] or right <= other[0] or top >= other[3] - 3 or bottom <= other[1] + 3
                    assert apart, (labels, number)

    def test_a_live_page_loads_itself_again(self, browser, runs, tmp_path):
        begun = tmp_path / "begun"
        shutil.copytree(runs[0], begun)
        (begun / "result.json").unlink()
        assert CliRunner().invoke(command_line.app, ["report", str(begun)]).exit_code == 0
        browser.open(begun / "report.html")
        shutil.copy(runs[0] / "result.json", begun)
        assert CliRunner().invoke(command_line.app, ["report", str(begun)]).exit_code == 0
        end = time.monotonic() + 60
        while "All runs are over." not in browser.run("return document.body.innerText"):
            assert time.monotonic() < end
            time.sleep(0.2)
