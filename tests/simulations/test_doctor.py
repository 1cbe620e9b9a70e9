"""``adadpigu doctor``: what is wrong is found, and what to do about it is said."""

import json
import shutil
import socket
import subprocess

import numpy as np
import pytest
from typer.testing import CliRunner

from adadpigu_core.ledger import Ledger, Target
from adadpigu_core.provenance import code_fingerprint
from client.policy import template
from simulations import doctor_common
from simulations.command_line import app

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture
def doctor():
    """Run the command; gives exit status and findings by subject and level."""

    def run(*arguments):
        result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"], catch_exceptions=False)
        findings = json.loads(result.stdout)
        return result.exit_code, {(each["level"], each["subject"]): each["text"] for each in findings}

    return run


class Machine:
    """Files of a client that is in order, and the command that looks at it."""

    def __init__(self, folder):
        self.folder = folder
        self.policy, self.data = folder / "policy.toml", folder / "site.npz"
        self.ledger = folder / "private" / "ledger.sqlite"
        self.ledger.parent.mkdir()
        np.savez(self.data, x=np.zeros((50, 3)), y=np.arange(50) % 2)
        self.policy.write_text(template("records", Target(4.0, 1e-5), code_fingerprint()))
        self.policy.chmod(0o644)
        self.extra = ""

    @property
    def options(self):
        config = f'dataset="npz:{self.data}" ledger="{self.ledger}" policy="{self.policy}" data-set-name="records"'
        return ["--client", "--node-config", f"{config} num-classes=2 {self.extra}"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_common, "_file_system", lambda _: "ext4")
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """An authority, a server's certificate of it, and another authority."""
    folder = tmp_path_factory.mktemp("pki")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for name in ("ca", "other"):
        openssl(
            "req", "-x509", *new, "-keyout", f"{name}.key", "-days", "90", "-out", f"{name}.crt", "-subj", f"/CN={name}"
        )
    (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
    openssl("x509", "-req", "-in", "server.csr", *signing, "-days", "3", "-out", "server.pem")
    (folder / "server.key").chmod(0o600)
    return folder


class TestClient:
    def test_a_machine_in_order(self, doctor, machine):
        status, found = doctor(*machine.options)
        assert status == 0, found
        assert not [key for key in found if key[0] in ("fault", "warning")]
        assert found["good", "records"] == "50 records of shape [3], 2 of 2 classes"
        assert found["note", "code"].startswith(code_fingerprint())

    def test_what_is_left_of_the_budget(self, doctor, machine):
        Ledger(machine.ledger, "records", "content").close()
        status, found = doctor(*machine.options)
        assert status == 0
        assert found["good", "ledger"] == "epsilon 0.0000 of 4 is spent"

    def test_nothing_at_all(self, doctor):
        status, found = doctor("--client", "--node-config", "")
        assert status == 1
        assert "dataset: is missing" in found["fault", "node config"]

    def test_no_policy(self, doctor, machine):
        machine.policy.unlink()
        status, found = doctor(*machine.options)
        assert (status, "'adadpigu policy init' writes one" in found["fault", "policy"]) == (1, True)

    def test_other_code_than_the_policy_lists(self, doctor, machine):
        machine.policy.write_text(machine.policy.read_text().replace(code_fingerprint(), "9.9.9+0123456789ab"))
        status, found = doctor(*machine.options)
        assert (status, "does not list the code" in found["fault", "policy"]) == (1, True)

    def test_records_that_do_not_fit(self, doctor, machine):
        np.savez(machine.data, x=np.full((5, 3), np.nan), y=np.arange(5) % 2)
        status, found = doctor(*machine.options)
        assert (status, "not a finite" in found["fault", "records"]) == (1, True)

    def test_a_delta_that_is_too_large(self, doctor, machine):
        machine.policy.write_text(machine.policy.read_text().replace("1e-05", "0.01"))
        status, found = doctor(*machine.options)
        assert (status, "delta 0.01 is large for 50 records" in found["warning", "records"]) == (0, True)

    def test_a_ledger_that_is_gone(self, doctor, machine):
        Ledger(machine.ledger, "records", "content").close()
        machine.ledger.unlink()
        status, found = doctor(*machine.options)
        assert (status, "was here and is gone" in found["fault", "ledger"]) == (1, True)

    def test_a_ledger_that_others_may_read(self, doctor, machine):
        Ledger(machine.ledger, "records", "content").close()
        machine.ledger.chmod(0o644)
        status, found = doctor(*machine.options)
        assert (status, "others may use it" in found["fault", "ledger"]) == (1, True)

    def test_files_that_others_may_exchange(self, doctor, machine):
        machine.ledger.parent.chmod(0o777)
        status, found = doctor(*machine.options)
        assert (status, "exchange the ledger" in found["fault", "ledger"]) == (1, True)
        machine.folder.chmod(0o770)
        assert "exchange the policy" in doctor(*machine.options)[1]["fault", "policy"]

    def test_a_disk_that_does_not_last(self, doctor, machine, monkeypatch):
        monkeypatch.setattr(doctor_common, "_file_system", lambda _: "tmpfs")
        status, found = doctor(*machine.options)
        assert (status, "does not last" in found["fault", "ledger"]) == (1, True)

    def test_a_key_that_others_may_read(self, doctor, machine, pki):
        key = machine.folder / "node"
        shutil.copy(pki / "server.key", key)
        for mode, level in ((0o600, "good"), (0o640, "fault")):
            key.chmod(mode)
            assert (level, "node key") in doctor(*machine.options, "--auth-supernode-private-key", key)[1]

    def test_a_server_that_is_not_there(self, doctor, machine):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            status, found = doctor(*machine.options, "--superlink", f"127.0.0.1:{probe.getsockname()[1]}")
        assert (status, "cannot be reached" in found["fault", "superlink"]) == (1, True)


class TestServer:
    def options(self, pki, **changes):
        files = {"ssl-certfile": "server.pem", "ssl-keyfile": "server.key", "ssl-ca-certfile": "ca.crt", **changes}
        return ["--server", *(text for key, name in files.items() for text in (f"--{key}", pki / name))]

    def test_expiry_and_signature(self, doctor, pki):
        status, found = doctor(*self.options(pki))
        assert status == 0, found
        assert "is good for 2 days" in found["warning", "certificate"]
        assert found["good", "certificate"] == "was signed by the authority"
        assert "localhost, 127.0.0.1" in found["note", "certificate"]

    def test_another_authority(self, doctor, pki):
        status, found = doctor(*self.options(pki, **{"ssl-ca-certfile": "other.crt"}))
        assert (status, found["fault", "certificate"]) == (1, "was not signed by the authority")

    def test_another_key(self, doctor, pki):
        (pki / "other.key").chmod(0o600)
        status, found = doctor(*self.options(pki, **{"ssl-keyfile": "other.key"}))
        assert (status, "does not belong to" in found["fault", "server key"]) == (1, True)

    def test_wrong_settings(self, doctor, pki, tmp_path):
        (tmp_path / "run.toml").write_text("[task]\ndataset = 'none'\n")
        status, found = doctor("--server", "--config", tmp_path / "run.toml")
        assert (status, "task.dataset" in found["fault", "settings"]) == (1, True)
        assert ("warning", "certificate") in found


@pytest.mark.parametrize("sides", [[], ["--client", "--server"]])
def test_one_side_must_be_named(sides):
    result = CliRunner().invoke(app, ["doctor", *sides])
    assert result.exit_code == 2
    assert "--client or a --server" in result.stderr
