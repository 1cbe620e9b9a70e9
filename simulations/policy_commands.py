"""``adadpigu policy``: write a node's policy, check it, and name what it may list.

Like the rest of the command line, whatever needs torch is imported by the commands that need it.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.console import Console
from simulations.failure import failed

if TYPE_CHECKING:
    from client.policy import Limits, Policy

app = typer.Typer(no_args_is_help=True, help="The policy of a node: what its owner allows, whatever a server asks for.")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
    data_set: Annotated[str, typer.Option(help="Name of the data set: the node's data-set-name.")],
    epsilon: Annotated[float, typer.Option(help="Largest epsilon over everything ever released from it.")],
    delta: Annotated[float, typer.Option(help="Its delta; well below one over the number of records.")] = 1e-5,
) -> None:
    """Write a policy with comments, to be read and changed before use."""
    from adadpigu_core.ledger import Target
    from adadpigu_core.provenance import code_fingerprint
    from client.policy import template

    try:
        text = template(data_set, Target(epsilon, delta), code_fingerprint())
        _write_new(path, text)
    except AdaDPIGUError as error:
        raise failed(error) from error
    _say(f"Wrote {path}. Read it, change what does not suit, and name it in the node's configuration:")
    _say(f'  policy="{path.absolute()}" data-set-name="{data_set}"')


def _write_new(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        path.chmod(0o644)
    except FileExistsError as error:
        raise ConfigurationError(f"{path}: exists; change it, or give another path") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror})") from error


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="The policy.")],
    data_set: Annotated[str | None, typer.Option(help="Also check that it has a budget for this data set.")] = None,
) -> None:
    """Check a policy and say what it allows. Exit status 2 if it cannot be used."""
    from adadpigu_core.provenance import code_fingerprint
    from client.policy import load

    try:
        policy = load(path)
        if data_set is not None:
            policy.of(data_set)
    except AdaDPIGUError as error:
        raise failed(error) from error
    _show(policy)
    own = code_fingerprint()
    if policy.limits.code is not None and own not in policy.limits.code:
        text = f"{path}: allowed.code does not list the code installed here, {own}: this node will refuse every request"
        raise failed(ConfigurationError(text))


def _show(policy: "Policy") -> None:
    table = Table("allowed", "at most")
    for name, target in policy.budgets.items():
        table.add_row(f"data set {name}", f"epsilon {target.epsilon:g} at delta {target.delta:g}, over all time")
    for what, value in _rows(policy.limits):
        table.add_row(what, value)
    Console().print(table, markup=False)


def _rows(limits: "Limits") -> list[tuple[str, str]]:
    models = "every network of this package" if limits.models is None else ", ".join(sorted(limits.models))
    return [
        ("noise multiplier", f"at least {limits.smallest_noise_multiplier:g}"),
        ("sampling probability", f"{limits.largest_sampling_probability:g}"),
        ("steps a round", str(limits.largest_steps)),
        ("models", models),
        ("code", "any" if limits.code is None else ", ".join(sorted(limits.code))),
    ]


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="Name of a network, or package.module:factory.")],
    input_shape: Annotated[str, typer.Option(help="Shape of one record, as in 1,28,28.")],
    num_classes: Annotated[int, typer.Option(help="Number of classes.")],
    activation: Annotated[str, typer.Option(help="task.activation of the run.")] = "relu",
    normalisation: Annotated[
        str, typer.Option(help="task.normalisation of the run; without effect on networks without convolutions.")
    ] = "group",
    features: Annotated[str, typer.Option(help="task.features of the run.")] = "raw",
) -> None:
    """Print the fingerprint of a model, for a policy's list. Nothing of it is imported."""
    from adadpigu_core.models import ModelSpec, fingerprint, normalisation_of

    try:
        shape = tuple(int(size) for size in input_shape.split(","))
        normalised = normalisation_of(name, normalisation)
        typer.echo(fingerprint(ModelSpec(name, activation, normalised, shape, num_classes, features)))
    except AdaDPIGUError as error:
        raise failed(error) from error
    except ValueError as error:
        raise failed(ConfigurationError(f"--input-shape: {input_shape!r} is not a shape, as in 1,28,28")) from error


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
