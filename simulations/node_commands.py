"""``adadpigu supernode``: a Flower SuperNode that runs this node's own code only."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from adadpigu_core.exceptions import ConfigurationError
from simulations.failure import failed

_HELP = """Start a Flower SuperNode that runs the client installed here, and no code that a server sends.

All options are those of [bold]flower-supernode[/bold], but for --isolation: whoever answers must be started from here.

  adadpigu supernode --superlink HOST:PORT --root-certificates ca.crt --auth-supernode-private-key node.key \\
      --node-config 'dataset="npz:/data/site.npz" ledger="/var/lib/adadpigu/ledger.sqlite" \\
      policy="/etc/adadpigu/policy.toml"'
"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(help=_HELP, context_settings=anything)(supernode)


def supernode(context: typer.Context) -> None:
    """Become a SuperNode."""
    from client.launcher import SOCKET_VARIABLE, environment

    sys.stdout.flush()
    try:
        inner = environment(os.environ)
    except ConfigurationError as error:
        raise failed(error) from error
    if sys.platform == "linux":
        # the folder is left behind, empty, when the node ends: nobody is there any more to remove it
        inner[SOCKET_VARIABLE] = str(Path(tempfile.mkdtemp(prefix="adadpigu-")) / "socket")
        warm = {**inner, "OPENBLAS_NUM_THREADS": "1"}  # NumPy starts threads when it is imported; torch does not
        subprocess.Popen(
            [sys.executable, "-P", "-m", "client.warm", str(os.getpid())], env=warm, stdin=subprocess.DEVNULL
        )
    # the last one counts; with "process", clients would be started elsewhere, by programs that run any bundle
    command = ["flower-supernode", *context.args, "--isolation", "subprocess"]
    try:
        os.execvpe(command[0], command, inner)  # noqa: S606 - PATH is ours
    except FileNotFoundError as error:
        raise failed(ConfigurationError(f"flower-supernode is not installed beside {sys.executable}")) from error
