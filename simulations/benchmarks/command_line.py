"""The commands ``adadpigu benchmark``. Torch is imported by what runs, so that help and mistakes answer at once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.benchmarks.plan import HOW_TO_GET_OPACUS, METHODS, MODELS, OPACUS, Plan, has_opacus
from simulations.console import Console

app = typer.Typer(no_args_is_help=True, help="Measure time and memory.")

_DEFAULTS = Plan()
_STEP = """Time a training step of every method, interleaved, and measure its peak memory.

Ratios are to a plain SGD step of the same network in the same run, in its fastest layout; those of memory to one in the
default layout. Figures compare only within a run, on a machine that does little else.
Small networks are repeated more often, because their steps vary more.

[bold]Examples[/bold]

  adadpigu benchmark step
      everything; takes half an hour on one core

  adadpigu benchmark step --models mnist-cnn,mlp --methods adadpigu,opacus-hooks --json step.json
"""


@app.callback()
def _main() -> None:
    """Measure time and memory."""


@app.command(help=_STEP)
def step(
    models: Annotated[str, typer.Option(help="Networks, separated by commas.")] = ",".join(MODELS),
    methods: Annotated[
        str | None, typer.Option(help=f"Methods, separated by commas: {', '.join(METHODS)}. Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Records a step.")] = _DEFAULTS.batch,
    repetitions: Annotated[int, typer.Option(help="Timed steps of each method, at least.")] = _DEFAULTS.repetitions,
    retention: Annotated[float, typer.Option(help="Share of coordinates in the mask.")] = _DEFAULTS.retention,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = _DEFAULTS.device,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = _DEFAULTS.threads,
    limit_s: Annotated[
        float, typer.Option(help="Leave a method out once a step takes longer, in seconds.")
    ] = _DEFAULTS.limit_s,
    limit_gb: Annotated[
        float, typer.Option(help="Leave a method out if the gradients that it keeps take more, in GB.")
    ] = _DEFAULTS.limit_gb,
    least_s: Annotated[
        float, typer.Option(help="Repeat more often until a network has taken this long, in seconds.")
    ] = _DEFAULTS.least_s,
    views: Annotated[
        int, typer.Option(help="Views of each record, averaged before clipping; plain steps take as many rows.")
    ] = _DEFAULTS.views,
    precision: Annotated[
        str, typer.Option(help="Of the layers' products, also of plain steps: float32 or bfloat16.")
    ] = _DEFAULTS.precision,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures.")] = None,
) -> None:
    """Measure steps and print tables."""
    try:
        chosen = METHODS if methods is None else _split(methods)
        limits = limit_s, limit_gb, least_s
        plan = Plan(_split(models), chosen, batch, repetitions, retention, device, threads, *limits, views, precision)
        if methods is not None and set(plan.methods) & set(OPACUS) and not has_opacus():
            raise ConfigurationError(f"--methods: {HOW_TO_GET_OPACUS}")
        _step(plan, json_file)
    except AdaDPIGUError as error:
        raise typer.BadParameter(str(error)) from error


def _split(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _step(plan: Plan, json_file: Path | None) -> None:
    from simulations.benchmarks.machine import check_device, facts
    from simulations.benchmarks.step import measure
    from simulations.benchmarks.table import tables

    check_device(plan.device)
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigurationError(f"--json: {json_file} is a folder, or would be in one that does not exist")
    console, progress = Console(), Console(stderr=True)
    rows: list[dict[str, Any]] = []
    with progress.status("") as status:
        say = status.update if progress.is_terminal else lambda text: progress.print(text, highlight=False)
        for found in measure(plan, say):
            rows += found
            if json_file is not None:  # already now: the next network may take long
                report = {"rows": rows, "settings": asdict(plan), "machine": facts(plan.device)}
                json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for table in tables(rows, plan):
        console.print(table)
