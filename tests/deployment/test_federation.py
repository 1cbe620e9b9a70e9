"""The whole way: certificates, keys, policies, nodes, a run, and what the ledgers say of it."""

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
        assert sum(event["count"] for event in client["events"]) == 3
        assert client["warnings"] == []


def test_code_from_the_network_is_not_run(federation, tmp_path):
    """Whoever may start a run may send any bundle; what comes out of this one is that the code differs."""
    app = write_app(tmp_path / "app", flatten(Configuration()))
    mark = tmp_path / "ran"
    hostile = app / "client" / "app.py"
    hostile.write_text(f"open({str(mark)!r}, 'w').close()\n" + hostile.read_text())
    before = {name: site.charges() for name, site in federation.sites.items()}
    run_id = federation.submit(tmp_path / "run", app)
    federation.until(lambda: federation.status(run_id).startswith("finished"), 120, pause=3)
    assert federation.status(run_id) == "finished:failed"
    assert all("install the same release on both" in site.output for site in federation.sites.values())
    assert not mark.exists()
    assert {name: site.charges() for name, site in federation.sites.items()} == before
