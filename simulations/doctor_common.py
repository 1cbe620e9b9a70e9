"""Checks that a client's machine and a server's have in common: software, keys, certificates, the way between them."""

import os
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path

from cryptography import x509

from simulations.findings import FAULT, GOOD, NOTE, WARNING, Finding

_SOON_DAYS = 30
_SKEW_SECONDS = 60
_TIMEOUT_SECONDS = 5.0


def software() -> Iterator[Finding]:
    """Versions, and the fingerprint that both sides must share."""
    from adadpigu_core.provenance import code_fingerprint

    names = ("flwr", "torch", "numpy", "dp-accounting")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    yield Finding(GOOD, "versions", f"Python {sys.version.split()[0]}, {versions}")
    yield Finding(NOTE, "code", f"{code_fingerprint()}: must be the same on the server and on every client")


def accelerator() -> Iterator[Finding]:
    """Whether torch sees a GPU."""
    import torch

    if torch.cuda.is_available():
        yield Finding(NOTE, "GPU", torch.cuda.get_device_name(0))
    else:
        yield Finding(NOTE, "GPU", "none; training runs on the CPU")


def private_file(path: Path, subject: str) -> Iterator[Finding]:
    """Whether a secret can be read by its owner alone."""
    if not path.is_file():
        yield Finding(FAULT, subject, f"{path}: there is no such file", "correct the path")
    elif not os.access(path, os.R_OK):
        yield Finding(FAULT, subject, f"{path}: cannot be read by this user", "run this as the user of the service")
    elif os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding(FAULT, subject, f"{path}: others may use it", f"chmod 600 {path}")
    else:
        yield Finding(GOOD, subject, f"{path}: only its owner may read it")


def certificate(path: Path, subject: str) -> Iterator[Finding]:
    """How long the certificates in a file are good for."""
    if not path.is_file():
        yield Finding(FAULT, subject, f"{path}: there is no such file", "correct the path")
        return
    for each in x509.load_pem_x509_certificates(path.read_bytes()):
        yield from _expiry(each, f"{path} ({each.subject.rfc4514_string()})", subject)


def _expiry(each: x509.Certificate, what: str, subject: str) -> Iterator[Finding]:
    now, end = datetime.now(UTC), each.not_valid_after_utc
    if each.not_valid_before_utc > now:
        yield Finding(FAULT, subject, f"{what}: is not valid yet", "set the clock of this machine")
    elif end <= now:
        yield Finding(FAULT, subject, f"{what}: has expired on {end:%Y-%m-%d}", "make a new one")
    else:
        days = (end - now).days
        level, remedy = (WARNING, "make a new one in time") if days < _SOON_DAYS else (GOOD, "")
        yield Finding(level, subject, f"{what}: is good for {days} days", remedy)


def reach(address: str, authority: Path | None) -> Iterator[Finding]:
    """Whether a SuperLink answers there, shows a certificate that the authority signed, and has the same time."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        yield Finding(FAULT, "superlink", f"{address}: is no HOST:PORT", "correct --superlink")
        return
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_SECONDS)
    except OSError as error:
        remedy = "start the SuperLink, and let its port through the firewalls for this machine"
        yield Finding(FAULT, "superlink", f"{address}: cannot be reached ({error})", remedy)
        return
    with plain:
        try:
            context = ssl.create_default_context(cafile=str(authority) if authority else None)
            with context.wrap_socket(plain, server_hostname=host.strip("[]")) as secure:
                yield Finding(GOOD, "superlink", f"{address}: answers, with a certificate that the authority signed")
                yield from _server(secure, host)
        except ssl.SSLCertVerificationError as error:
            remedy = "compare the authority's certificate with the server's operator, by another way than this network"
            yield Finding(FAULT, "superlink", f"{address}: is not trusted: {error.verify_message}", remedy)
        except (OSError, ssl.SSLError) as error:
            yield Finding(FAULT, "superlink", f"{address}: speaks no TLS ({error})", "start it with certificates")


def _server(secure: ssl.SSLSocket, host: str) -> Iterator[Finding]:
    shown = secure.getpeercert(binary_form=True)
    if shown:
        yield from _expiry(x509.load_der_x509_certificate(shown), "the server's certificate", "certificate")
    secure.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = secure.recv(4096).decode("latin-1").splitlines()
    dates = [line.partition(":")[2].strip() for line in answer if line.lower().startswith("date:")]
    if dates:
        skew = abs(parsedate_to_datetime(dates[0]).timestamp() - time.time())
        good = skew <= _SKEW_SECONDS
        remedy = "" if good else "let both machines keep their time by NTP; signatures of old requests are refused"
        yield Finding(GOOD if good else WARNING, "clock", f"{skew:.0f} s off the server's", remedy)


def writable_folder(folder: Path, subject: str) -> Iterator[Finding]:
    """Whether files can be made in a folder and kept through a power failure."""
    if not folder.is_dir():
        yield Finding(WARNING, subject, f"{folder}: does not exist yet", "make it, owned by the user of the service")
        return
    probe = folder / f".adadpigu-doctor-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(FAULT, subject, f"{folder}: cannot be written ({error.strerror})", "give this user write access")
        return
    finally:
        probe.unlink(missing_ok=True)
    kind = _file_system(folder)
    if kind in ("tmpfs", "ramfs", "overlay"):
        yield Finding(FAULT, subject, f"{folder}: is on {kind}, which does not last", "use a lasting local disk")
    elif kind.startswith(("nfs", "cifs", "smb", "fuse", "9p")):
        remedy = "use a local disk: locks of network file systems cannot be relied on"
        yield Finding(WARNING, subject, f"{folder}: is on {kind}", remedy)
    else:
        yield Finding(GOOD, subject, f"{folder}: can be written{f', on {kind}' if kind else ''}")


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, where the system says so; the longest mount point wins."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    resolved = folder.resolve()
    fitting = [(len(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(fitting, default=(0, ""))[1]
