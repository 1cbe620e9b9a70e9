"""The whole way: certificates, keys, policies, nodes, a run, and what the ledgers say of it."""

import shutil

import pytest

from adadpigu_core.configuration import Configuration, flatten
from simulations.flower_engine import write_app

pytestmark = pytest.mark.slow


def test_a_run_over_tls_and_keys(federation, tmp_path):
    output = tmp_path / "run"
    federation.submit(output)
    result = federation.await_result(output)
    assert [client["id"] for client in result["clients"]] == ["node0", "node1"]
    for client in result["clients"]:
        charges = federation.sites[client["id"]].charges()
        assert [row[0] for row in charges] == [1, 2, 3]
        assert client["warnings"] == []
    federation.check_tally(output)


def hostile_app(folder):
    """An app whose client leaves a mark when it is imported; gives the app and the mark."""
    app, mark = write_app(folder / "app", flatten(Configuration())), folder / "ran"
    hostile = app / "client" / "app.py"
    hostile.write_text(f"open({str(mark)!r}, 'w').close()\n" + hostile.read_text())
    return app, mark


def test_code_from_the_network_is_not_run(federation, tmp_path):
    """Whoever may start a run may send any bundle; what comes out of this one is that the code differs."""
    app, mark = hostile_app(tmp_path)
    before = {name: site.charges() for name, site in federation.sites.items()}
    run_id = federation.submit(tmp_path / "run", app)
    federation.until(lambda: federation.status(run_id).startswith("finished"), 180, pause=3)
    assert federation.status(run_id) == "finished:failed"
    assert all("install the same release on both" in site.output for site in federation.sites.values())
    assert not mark.exists()
    assert {name: site.charges() for name, site in federation.sites.items()} == before


@pytest.mark.long
def test_a_plain_supernode_would_run_it(fragile, tmp_path):
    """The control: with Flower's own SuperNode, the same bundle is run."""
    app, mark = hostile_app(tmp_path)
    fragile.sites["node0"].program.kill()
    fragile.register("stranger")
    fragile.start_node("plain", key="stranger", plain=True)
    fragile.submit(tmp_path / "run", app)
    fragile.until(mark.exists, 240)


@pytest.mark.parametrize(
    ("name", "key", "authority", "text"),
    [
        ("unregistered", "stranger", "ca", "failed to activate supernode"),
        ("misled", "stranger", "other", "certificate verify failed"),
    ],
)
def test_who_does_not_belong_is_turned_away(federation, name, key, authority, text):
    site = federation.start_node(name, key=key, authority=authority)
    federation.until(lambda: text in site.output.lower() or site.program.process.poll() is not None, 90)
    assert text in site.output.lower()
    assert not site.ledger.exists()
    site.program.kill()
    del federation.sites[name]


@pytest.mark.long
def test_a_backup_that_was_put_back(fragile, tmp_path):
    """In the middle of a run; the server says so, the client refuses, and its operator makes up for it."""
    output = tmp_path / "run"
    site = fragile.sites["node0"]
    changes = {"federation.num-rounds": 8, "federation.round-timeout": 60.0}
    fragile.submit(output, **changes)
    fragile.until(lambda: len(site.charges()) == 1, 240)
    shutil.copy(site.ledger, tmp_path / "backup.sqlite")
    fragile.until(lambda: len(site.charges()) >= 3 and (output / "metrics.jsonl").read_text().count("\n") >= 3, 240)
    shutil.copy(tmp_path / "backup.sqlite", site.ledger)
    fragile.until(lambda: "was a backup restored?" in site.output, 120)
    result = fragile.await_result(output, 600)
    assert "node0" in [client["id"] for client in result["clients"]]
    assert any("refused" in line for line in (output / "metrics.jsonl").read_text().splitlines())
    assert len(site.charges()) < 8
