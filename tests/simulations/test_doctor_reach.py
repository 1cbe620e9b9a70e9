"""The doctor's look at a server over the network: a real TLS server on loopback, in each bad state."""

import datetime
import shutil
import socket
import ssl
import subprocess
import threading
from email.utils import format_datetime

import pytest

from simulations import doctor_common

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Self-signed certificates of localhost: ``good`` for 90 days, ``short`` for 3."""
    folder = tmp_path_factory.mktemp("pki")
    for name, days in (("good", "90"), ("short", "3")):
        new = (
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            days,
            "-subj",
            "/CN=localhost",
        )
        files = ("-keyout", f"{name}.key", "-out", f"{name}.crt")
        names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        subprocess.run(["openssl", "req", "-x509", *new, *files, *names], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def serve(pki):
    """Answer one connection; gives the address."""
    threads = []

    def start(name=None, late=0.0):
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(30)
        date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=late)

        def answer():
            with listener, listener.accept()[0] as plain:
                if name is None:
                    plain.recv(100)
                    plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    return
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
                try:
                    with context.wrap_socket(plain, server_side=True) as secure:
                        secure.recv(1000)
                        secure.sendall(f"HTTP/1.1 404 None\r\nDate: {format_datetime(date, True)}\r\n\r\n".encode())
                except OSError:
                    return  # the doctor has hung up: that it does not trust us is what the test is about

        threads.append(threading.Thread(target=answer))
        threads[-1].start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for thread in threads:
        thread.join(30)


def look(address, authority):
    return {(found.level, found.subject): found for found in doctor_common.reach(address, authority)}


def test_a_server_in_order(serve, pki):
    found = look(serve("good"), pki / "good.crt")
    assert {level for level, _ in found} == {"good"}
    assert "0 s off" in found["good", "clock"].text or "1 s off" in found["good", "clock"].text


@pytest.mark.parametrize("late", [-600.0, 600.0])
def test_a_clock_that_is_off(serve, pki, late):
    found = look(serve("good", late), pki / "good.crt")["warning", "clock"]
    assert "NTP" in found.remedy


def test_a_certificate_that_ends_soon(serve, pki):
    found = look(serve("short"), pki / "short.crt")["warning", "certificate"]
    assert "is good for 2 days" in found.text


def test_a_certificate_of_somebody_else(serve, pki):
    found = look(serve("short"), pki / "good.crt")["fault", "superlink"]
    assert "is not trusted" in found.text
    assert "by another way than this network" in found.remedy


def test_a_server_without_tls(serve, pki):
    assert "speaks no TLS" in look(serve(), pki / "good.crt")["fault", "superlink"].text


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1", "localhost:https"])
def test_what_is_no_address(address):
    assert "is no HOST:PORT" in look(address, None)["fault", "superlink"].text


def test_a_certificate_that_has_expired(pki, monkeypatch):
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=30)

    monkeypatch.setattr(doctor_common, "datetime", Later)
    levels = {
        name: [each.level for each in doctor_common.certificate(pki / f"{name}.crt", "x")] for name in ("good", "short")
    }
    assert levels == {"good": ["good"], "short": ["fault"]}
