"""Runs this node's own installed client, and nothing that comes over the network.

Flower ships an app as a bundle: a SuperNode unpacks what the SuperLink sends, and runs it. Whoever can start a run then
decides what code meets the records, and no policy that this code reads could stop other code. So a node is started with
``adadpigu supernode``: the SuperNode is Flower's own, but the programs that it starts for messages, found by their
names, are those in ``client/programs``. The one for a client is Flower's as well, with three functions exchanged: the
bundle is not unpacked, nothing is installed, and the app is the installed ``client.app``. The bundle's settings still
arrive, as any request does. The programs for other kinds of apps, which a server may ask for as well, do nothing.

Should a release of Flower not have these functions, or start other programs, the node stops instead of running what it
is sent.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adadpigu_core.exceptions import ConfigurationError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

PROGRAMS = Path(__file__).parent / "programs"
SOCKET_VARIABLE = "ADADPIGU_WARM_SOCKET"
_RUNTIME = "flwr.supernode.runtime.run_clientapp"
_REMEDY = "install a release that this version of adadpigu was tested with"
_SETTINGS = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
}


def environment(outer: Mapping[str, str], programs: Path = PROGRAMS) -> dict[str, str]:
    """Environment in which Flower finds our programs before its own, and installs nothing.

    Args:
        outer: The environment to start from.
        programs: Folder of our programs.

    Raises:
        ConfigurationError: If one of them is missing or cannot be executed. Flower's own would be found in its place,
            and run whatever the network sends.
    """
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), outer.get("PATH", os.defpath)])
    for ours in (programs / name for name in sorted(_started_by_flower())):
        if not ours.is_file():
            raise ConfigurationError(f"this release of Flower also starts {ours.name}, from the network; {_REMEDY}")
        if shutil.which(ours.name, path=path) != str(ours):
            raise ConfigurationError(
                f"{ours}: cannot be executed, so that Flower would run code from the network; run chmod a+rx on it, "
                "and see to it that its file system is not mounted noexec"
            )
    return {**outer, **_SETTINGS, "PATH": path}


def _started_by_flower() -> set[str]:
    """Names of the programs that a SuperNode may start, whatever a server asks for."""
    names = getattr(import_module("flwr.supercore.constant"), "TASK_TYPE_TO_COMMAND", None)
    if not names:
        raise ConfigurationError(f"this release of Flower does not say which programs it starts; {_REMEDY}")
    return {"flwr-clientapp", *names.values()}


def guard(runtime: ModuleType) -> None:
    """Exchange the functions by which Flower unpacks, equips and loads a bundle.

    Raises:
        SystemExit: If Flower has no such functions any more.
    """
    replacements: dict[str, Callable[..., Any]] = {
        "install_from_fab": _nothing,
        "install_app_dependencies": _nothing,
        "get_load_client_app_fn": _own_app,
    }
    missing = [name for name in replacements if not callable(getattr(runtime, name, None))]
    if missing:
        sys.exit(
            f"adadpigu: this release of Flower has no {', '.join(missing)} in {_RUNTIME}, so that its bundles cannot "
            f"be kept out; {_REMEDY}"
        )
    for name, replacement in replacements.items():
        setattr(runtime, name, replacement)


def _nothing(*_: Any, **__: Any) -> None:
    """Unpack and install nothing."""


def _own_app(**_: Any) -> "Callable[[str, str, str], ClientApp]":
    def load(*_: str) -> "ClientApp":
        from client.app import app  # noqa: PLC0415 - takes seconds, after the task was accepted

        return app

    return load


def main() -> None:
    """Answer one message, as Flower's ``flwr-clientapp`` does."""
    guard(import_module(_RUNTIME))
    import_module("flwr.supernode.cli").flwr_clientapp()
