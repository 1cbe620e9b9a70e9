"""``adadpigu doctor``: looks at this machine before a federation does, and says what to do about each finding."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adadpigu_core.exceptions import ConfigurationError
from simulations.console import Console
from simulations.failure import failed
from simulations.findings import FAULT, GOOD, NOTE, WARNING, Finding, examine

_COLOURS = {GOOD: "green", NOTE: "blue", WARNING: "yellow", FAULT: "red"}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)


def doctor(
    client: Annotated[bool, typer.Option("--client", help="This machine holds records.")] = False,
    server: Annotated[bool, typer.Option("--server", help="This machine runs the server.")] = False,
    node_config: Annotated[str, typer.Option(help="Client: as flower-supernode takes it.")] = "",
    superlink: Annotated[str | None, typer.Option(help="Client: HOST:PORT of the server.")] = None,
    root_certificates: Annotated[Path | None, typer.Option(help="Client: the authority's certificate.")] = None,
    auth_supernode_private_key: Annotated[Path | None, typer.Option(help="Client: key of the node.")] = None,
    config: Annotated[Path | None, typer.Option(help="Server: TOML file of settings.")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Server: its certificate.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Server: its private key.")] = None,
    ssl_ca_certfile: Annotated[Path | None, typer.Option(help="Server: the authority's certificate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine. Exit status 0: nothing stands in the way; 1: something does; 2: a wrong command."""
    if client == server:
        raise failed(ConfigurationError("doctor: say whether this machine is a --client or a --server"))
    if client:
        findings = _client(node_config, superlink, root_certificates, auth_supernode_private_key)
    else:
        findings = _server(config, ssl_certfile, ssl_keyfile, ssl_ca_certfile)
    found = _shown(findings, as_json=as_json)
    if any(finding.level == FAULT for finding in found):
        raise typer.Exit(1)


def _client(node_config: str, superlink: str | None, authority: Path | None, key: Path | None) -> Iterable[Finding]:
    from flwr.common.config import parse_config_args

    from simulations import doctor_client

    try:
        parsed = parse_config_args([node_config]) if node_config else {}
    except Exception as error:
        raise failed(ConfigurationError(f"--node-config: cannot be read ({error})")) from error
    files = doctor_client.ClientFiles(parsed, superlink, authority, key)
    return examine(doctor_client.checks(files))


def _server(
    config: Path | None, certificate: Path | None, key: Path | None, authority: Path | None
) -> Iterable[Finding]:
    from simulations import doctor_server

    return examine(doctor_server.checks(doctor_server.ServerFiles(config, certificate, key, authority)))


def _shown(findings: Iterable[Finding], *, as_json: bool) -> list[Finding]:
    """Print findings as they come; gives all of them."""
    console, found = Console(), []
    for finding in findings:
        found.append(finding)
        if not as_json:
            console.print(f"[{_COLOURS[finding.level]}]{finding.level:>7}[/]", end="  ")
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            text = f"{finding.subject}: {finding.text}{remedy}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    return found
