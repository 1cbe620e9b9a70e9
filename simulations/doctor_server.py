"""Checks of a machine that runs the server: settings, test records, certificates, and where runs are written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from adadpigu_core import datasets
from adadpigu_core.configuration import parse
from adadpigu_core.home import run_folder
from adadpigu_core.models import build, check_private, fingerprint
from server.app import model_spec
from server.starting_weights import check_start
from simulations import doctor_common as common
from simulations.findings import FAULT, GOOD, NOTE, WARNING, Check, Finding, if_given
from simulations.simulate import read_settings

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerFiles:
    """What a SuperLink and a run are started with.

    Args:
        config: TOML file of settings; None = the defaults.
        certificate: The server's certificate.
        key: Its private key.
        authority: Certificate of the authority that signed it.
    """

    config: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None


def checks(files: ServerFiles) -> Iterator[tuple[str, Check]]:
    """Everything that can be checked with what is given."""
    yield "versions", common.software
    yield "settings", partial(_settings, files.config)
    yield from if_given("server key", files.key, partial(common.private_file, subject="server key"))
    yield from if_given("authority", files.authority, partial(common.certificate, subject="authority"))
    yield from if_given("certificate", files.certificate, partial(_certificate, files=files))
    if files.certificate is None or files.key is None or files.authority is None:
        yield "certificate", _no_tls


def _no_tls() -> Iterator[Finding]:
    text = "--ssl-certfile, --ssl-keyfile and --ssl-ca-certfile were not all given"
    yield Finding(WARNING, "certificate", text, "a SuperLink without them is open to everybody on the network")


def _settings(config: Path | None) -> Iterator[Finding]:
    configuration = parse(read_settings(config) if config else {})
    data = datasets.load(configuration.task.dataset)
    yield Finding(GOOD, "settings", f"{len(data.test)} public test records of shape {[*data.input_shape]}")
    spec = model_spec(configuration, data)
    model = build(spec, seed=configuration.seed)
    check_private(model)
    check_start(spec, configuration)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Finding(NOTE, "model", f"{spec.name}, {parameters} parameters; its fingerprint is {fingerprint(spec)}")
    folder = run_folder(configuration, 0)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    yield from common.writable_folder(existing, "run folder")


def _certificate(path: Path, files: ServerFiles) -> Iterator[Finding]:
    yield from common.certificate(path, "certificate")
    if not path.is_file():
        return
    own = x509.load_pem_x509_certificates(path.read_bytes())[0]
    try:
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        shown = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
        yield Finding(NOTE, "certificate", f"nodes must reach the server as one of {', '.join(shown)}")
        if _LOOPBACK not in shown:
            text = f"{path}: does not name {_LOOPBACK}, by which its own processes reach a SuperLink: no run begins"
            yield Finding(WARNING, "certificate", text, f"make one with IP:{_LOOPBACK} in its subjectAltName, too")
    except x509.ExtensionNotFound:
        yield Finding(FAULT, "certificate", f"{path}: names no host", "make one with subjectAltName")
    if files.authority is not None and files.authority.is_file():
        yield from _signature(own, x509.load_pem_x509_certificates(files.authority.read_bytes()))
    if files.key is not None and files.key.is_file():
        private = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
        if private.public_key() != own.public_key():
            yield Finding(FAULT, "server key", f"{files.key}: does not belong to {path}", "correct the paths")


def _signature(own: x509.Certificate, authorities: list[x509.Certificate]) -> Iterator[Finding]:
    for authority in authorities:
        try:
            own.verify_directly_issued_by(authority)
        except Exception:  # noqa: S112 - ValueError, TypeError, InvalidSignature: it is another authority
            continue
        yield Finding(GOOD, "certificate", "was signed by the authority")
        return
    yield Finding(FAULT, "certificate", "was not signed by the authority", "give the authority that signed it")
