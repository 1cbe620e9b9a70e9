"""Runs an app through Flower's own command line and its simulation on Ray.

The in-process engine is faster; this one shows that the app is an ordinary Flower app, and reaches Ray clusters. All
it does is to guard the real ``flwr run`` against what goes wrong silently:

* Flower leaves a server running, and reuses one that it finds. Each run here has its own SuperLink on a free port,
  with its own Flower home, and everything it started is ended with it.
* Ray processes import code from the directory in which the SuperLink was started. That is an empty one here.
* Flower installs the app's dependencies anew for each run, and calls home. Both are switched off.
* ``flwr run`` exits with 0 whatever happened. The outcome is asked for, and a failure raises.

Files are written for one run below a temporary folder; ``write_app`` makes the app to be run.
"""

import importlib.util
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import adadpigu_core
from simulations import superlink
from simulations.superlink import FlowerRunError

__all__ = ["FlowerRunError", "RunConfig", "run", "write_app"]

RunConfig: TypeAlias = Mapping[str, bool | int | float | str]

_PACKAGES = ("adadpigu_core", "client", "server")
# Left to itself, Ray joins whatever cluster was last started on this machine, even one that is gone.
_NEW_RAY = "local"
_CONNECT_TIMEOUT_S = 5.0
_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_APP_TOML = """\
[project]
name = "adadpigu"
version = {version}
description = "Generated for one run."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "adadpigu"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{config}"""


def write_app(destination: Path, config: RunConfig) -> Path:
    """Write a Flower app made of the installed packages.

    Args:
        destination: Folder to create; it must not exist, or be empty.
        config: Every key of the run configuration, with its default. Flower refuses to override others.

    Returns:
        The folder, to be given to :func:`run`.

    Raises:
        FileExistsError: If the folder holds something.
    """
    destination.mkdir(parents=True, exist_ok=True)
    if any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty")
    for package in _PACKAGES:
        source = _package_folder(package)
        for file in sorted(source.rglob("*.py")):
            target = destination / package / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    text = _APP_TOML.format(version=_toml_value(adadpigu_core.__version__), config=_toml_table(config))
    (destination / "pyproject.toml").write_text(text, encoding="utf-8")
    return destination


def run(
    app_directory: Path,
    run_config: RunConfig,
    *,
    num_clients: int,
    cpus_per_client: float = 1,
    ray_address: str | None = None,
    on_poll: Callable[[], None] | None = None,
    timeout: float | None = None,
) -> None:
    """Run a Flower app in Flower's simulation, and wait for its end.

    Args:
        app_directory: Folder of the app, with its ``pyproject.toml``.
        run_config: Overrides of the app's run configuration.
        num_clients: Number of simulated nodes. Their configuration is ``partition-id`` and ``num-partitions``.
        cpus_per_client: CPUs that Ray reserves for a client; as many clients run at once as fit. A whole number,
            because Flower takes no other.
        ray_address: A running Ray cluster to use, as ``host:port``; the variable ``RAY_ADDRESS`` if not given. Without
            either, Ray is started for this run.
        on_poll: Called a few times per second; what it raises ends the run.
        timeout: In seconds, everything included.

    Raises:
        FlowerRunError: If the run did not complete. The message ends with the last lines of its log.
        ValueError: If a number is out of range.
    """
    if num_clients < 1 or cpus_per_client < 1 or cpus_per_client != int(cpus_per_client):
        raise ValueError(f"need whole numbers from 1 on: num_clients={num_clients}, cpus_per_client={cpus_per_client}")
    _check_declared(app_directory, run_config)
    ray_address = ray_address or os.environ.get("RAY_ADDRESS") or _NEW_RAY
    _check_ray(ray_address)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    federation = f"num-supernodes={num_clients} client-resources-num-cpus={int(cpus_per_client)}"
    with tempfile.TemporaryDirectory(prefix="adadpigu-", ignore_cleanup_errors=True) as folder:
        environment = _environment(Path(folder), ray_address)
        # A file needs no quoting, which the command line does in its own way.
        overrides = Path(folder) / "run-config.toml"
        overrides.write_text(_toml_table(run_config), encoding="utf-8")
        with superlink.start(Path(folder), environment) as link:
            run_id = link.submit(app_directory.resolve(), overrides, federation)
            link.await_end(run_id, on_poll or (lambda: None), deadline)


def _package_folder(package: str) -> Path:
    """Locate a package without importing it. It must lie beside this one: ``client`` is a common name."""
    spec = importlib.util.find_spec(package)
    beside = Path(__file__).resolve().parents[1]
    for location in (spec and spec.submodule_search_locations) or []:
        if Path(location).resolve().parent == beside:
            return Path(location)
    raise FlowerRunError(f"the package {package} is not the one beside {beside / 'simulations'}; another hides it")


def _toml_table(values: RunConfig) -> str:
    """Write flat values as TOML. Dotted keys are quoted; Flower makes no difference."""
    return "".join(f"{_toml_value(key)} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON strings are TOML strings, but for the character DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(int(value) if isinstance(value, int) else float(value))


def _check_declared(app_directory: Path, run_config: RunConfig) -> None:
    """Name the keys that Flower would refuse without naming them."""
    try:
        project = tomllib.loads((app_directory / "pyproject.toml").read_text(encoding="utf-8"))
        declared = project["tool"]["flwr"]["app"].get("config", {})
    except (OSError, ValueError, KeyError) as error:
        raise FlowerRunError(f"{app_directory} is not a Flower app: {error!r}") from error
    unknown = sorted(set(run_config) - set(_flat_keys(declared)))
    if unknown:
        raise FlowerRunError(f"the app in {app_directory} does not declare these run configuration keys: {unknown}")


def _flat_keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _check_ray(address: str) -> None:
    """Refuse an address at which nobody answers: Ray was seen to wait there for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # one of Ray's own words, such as "local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise FlowerRunError(f"no Ray cluster answers at {address}: {error}") from error


def _environment(folder: Path, ray_address: str) -> dict[str, str]:
    """Environment for Flower's programs, which start each other by name."""
    environment = {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(folder / "home"), "RAY_ADDRESS": ray_address}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for name in ("NO_PROXY", "no_proxy"):  # a proxy for the outside world cannot reach this machine's own server
        environment[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    return environment
