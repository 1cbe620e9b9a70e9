"""How a plan is shown: tables for people, JSON for programs, a figure for both."""

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from adadpigu_core.accounting import Plan
from adadpigu_core.planning import ClientPlan, FederationPlan, noise_to_clipping, releases
from adadpigu_core.weights import marginal_values
from simulations.console import Console
from simulations.rounding import up

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_MOST_ROWS = 20
_MOST_LINES_WITH_NAMES = 10
_UNIT = "one record of one client, add-or-remove-one, over everything released in the run"


def to_json(plan: FederationPlan, solved: str, aggregation: str, num_parameters: int) -> dict[str, Any]:
    """Everything that is known, in plain values; an epsilon or value of null is infinite."""
    terms, shares, values = plan.terms, _shares(plan, aggregation), _values(plan, aggregation)
    return {
        "solved": solved,
        "unit": _UNIT,
        "delta": terms.target_delta,
        "rounds": terms.num_rounds,
        "pretraining_rounds": terms.pretraining_rounds,
        "local_steps": terms.local_steps,
        "sampling_probability": terms.sampling_probability,
        "pretraining_share": terms.pretraining_share,
        "noise_schedule": {"kind": terms.noise_schedule.kind, "final_ratio": terms.noise_schedule.final_ratio},
        "parameters": num_parameters,
        "aggregation": aggregation,
        "noise_to_clipping": _noise(plan, aggregation, num_parameters),
        "noise_in_levels": plan.in_levels,
        "epsilon_rounds": list(plan.points),
        "clients": [_client(one, share, value) for one, share, value in zip(plan.clients, shares, values, strict=True)],
    }


def _client(one: ClientPlan, share: float, value: float) -> dict[str, Any]:
    events = one.plan.events
    return {
        "id": one.client.id,
        "records": one.client.records,
        "target_epsilon": one.client.target_epsilon,
        "expected_batch_size": one.plan.training.sampling_probability * one.client.records,
        "pretraining_noise_multiplier": one.plan.pretraining.noise_multiplier if one.plan.pretraining.count else None,
        "training_noise_multiplier": one.plan.training.noise_multiplier,
        "final_noise_multiplier": events[-1].noise_multiplier,
        "epsilon": _finite(one.epsilon),
        "epsilons": [_finite(value) for value in one.epsilons],
        "releases": sum(event.count for event in events) // one.plan.steps_per_round,
        "private_steps": sum(event.count for event in events),
        "weight_share": share,
        "marginal_value": _finite(value),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _noise(plan: FederationPlan, aggregation: str, num_parameters: int) -> dict[str, Any]:
    terms = plan.terms
    first = noise_to_clipping(plan, aggregation, terms.pretraining_rounds + 1)
    last = noise_to_clipping(plan, aggregation, terms.num_rounds)
    retained = [
        {
            "ratio": ratio,
            "coordinates": (count := max(1, round(ratio * num_parameters))),
            "first_training_round": first * math.sqrt(count),
            "last_round": last * math.sqrt(count),
        }
        for ratio in _RATIOS
    ]
    return {
        "pretraining_round": noise_to_clipping(plan, aggregation, 1) if terms.pretraining_rounds else None,
        "first_training_round": first,
        "last_round": last,
        "retained": retained,
    }


def _shares(plan: FederationPlan, aggregation: str) -> list[float]:
    weights, _ = releases(plan, aggregation, plan.terms.num_rounds)
    return [weight / sum(weights) for weight in weights]


def _values(plan: FederationPlan, aggregation: str) -> list[float]:
    return marginal_values(*releases(plan, aggregation, plan.terms.num_rounds))


def show(console: Console, plan: FederationPlan, solved: str, aggregation: str, num_parameters: int) -> None:
    """Print the answer."""
    terms = plan.terms
    console.print(_headline(plan, solved), highlight=False, soft_wrap=True)
    phases = (
        f"{terms.pretraining_rounds} rounds of pretraining, {terms.num_rounds - terms.pretraining_rounds} of training"
    )
    steps = f", {terms.local_steps} private steps each" if terms.local_steps > 1 else ""
    console.print(
        f"{phases}{steps}; sampling probability {terms.sampling_probability:.4g}; delta {terms.target_delta:g}; "
        f"{_UNIT}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_clients_table(plan, aggregation))
    if len(plan.clients) > _MOST_ROWS:
        more = len(plan.clients) - _MOST_ROWS
        console.print(f"{more} more clients are in the file that --json writes.", highlight=False)
    if plan.in_levels:
        console.print(
            "To answer soon, noise is given in levels and by bounds: clients that calibrate their own noise get along "
            "with a little less, at most about 1 %.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_epsilon_table(plan))
    console.print(_noise_table(plan, aggregation, num_parameters))


def _headline(plan: FederationPlan, solved: str) -> str:
    terms, noise = plan.terms, [one.plan.training.noise_multiplier for one in plan.clients]
    spent = max(one.epsilon for one in plan.clients)
    batches = [terms.sampling_probability * one.client.records for one in plan.clients]
    sampling = f"sampling probability {terms.sampling_probability:.4g}"
    return {
        "noise": f"Noise multipliers of training: {_noises(noise)}.",
        "epsilon": f"Every client spends epsilon {up(spent, 4)}.",
        "rounds": f"All clients can afford {terms.num_rounds} rounds with noise multiplier {noise[0]:g}.",
        "batch": f"Expected batches of {_range(batches)} records: {sampling}.",
    }[solved]


def _noises(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(up(value, 4) for value in (min(values), max(values))))


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values))))


def _clients_table(plan: FederationPlan, aggregation: str) -> Table:
    table = Table(title=f"Clients, weighted by {aggregation}", caption=_caption(aggregation), caption_justify="left")
    table.add_column("client", overflow="fold")
    for heading in ("records", "noise", "epsilon of target", "releases", "weight", "value"):
        table.add_column(heading, justify="right", no_wrap=True)
    shares, values = _shares(plan, aggregation), _values(plan, aggregation)
    for one, share, value in list(zip(plan.clients, shares, values, strict=True))[:_MOST_ROWS]:
        steps = sum(event.count for event in one.plan.events)
        table.add_row(
            one.client.id,
            str(one.client.records),
            _noise_text(one.plan),
            f"{up(one.epsilon, 3)} of {one.client.target_epsilon:g}",
            str(steps // one.plan.steps_per_round),
            f"{share:.1%}",
            f"{value:+.2%}" if math.isfinite(value) else "all",
        )
    return table


def _noise_text(plan: Plan) -> str:
    training = (plan.training.noise_multiplier, plan.events[-1].noise_multiplier)
    pretraining = [up(plan.pretraining.noise_multiplier, 3)] if plan.pretraining.count else []
    text = " to ".join(dict.fromkeys(up(noise, 3) for noise in training))
    return " / ".join(dict.fromkeys([*pretraining, text]))


def _caption(aggregation: str) -> str:
    text = "value: by how much the noise of the aggregate would rise without this client"
    return text if aggregation == "precision" else f"{text}; below zero, it adds more noise than signal"


def _epsilon_table(plan: FederationPlan) -> Table:
    """Epsilon on the way: some rounds, one column for each of a few different plans."""
    different = list({one.plan: one for one in sorted(plan.clients, key=lambda one: one.epsilon)}.values())
    picked = [different[round(part * (len(different) - 1) / 3)] for part in range(4)]
    few = list(dict.fromkeys(different if len(different) <= 6 else picked))
    table = Table(title="Epsilon after a round")
    table.add_column("round", justify="right")
    for one in few:
        table.add_column(one.client.id, justify="right", overflow="fold")
    shown = sorted({round(part * (len(plan.points) - 1) / 9) for part in range(10)})
    for index in shown:
        table.add_row(str(plan.points[index]), *(up(one.epsilons[index], 3) for one in few))
    return table


def _noise_table(plan: FederationPlan, aggregation: str, num_parameters: int) -> Table:
    noise = _noise(plan, aggregation, num_parameters)
    moving = noise["first_training_round"] != noise["last_round"]
    table = Table(title=f"Noise of the aggregated gradient over the clipping norm, {num_parameters} parameters")
    for heading in ("retained", "coordinates", "noise", *(["in the last round"] if moving else [])):
        table.add_column(heading, justify="right")
    single = {"ratio": None, "coordinates": 1, **{key: noise[key] for key in ("first_training_round", "last_round")}}
    for row in (single, *noise["retained"]):
        cells = [f"{row['first_training_round']:.4g}", *([f"{row['last_round']:.4g}"] if moving else [])]
        table.add_row(
            "one coordinate" if row["ratio"] is None else f"{row['ratio']:.0%}", str(row["coordinates"]), *cells
        )
    return table


def draw(plan: FederationPlan, path: Path) -> None:
    """Draw epsilon over rounds, one line a client; clients with the same plan share a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415  # the same

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[tuple[float, ...], list[str]] = {}
    for one in plan.clients:
        lines.setdefault(one.epsilons, []).append(one.client.id)
    styles = ("-", "--", "-.", ":")
    for index, (epsilons, names) in enumerate(sorted(lines.items(), key=lambda item: -item[0][-1])):
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        style = styles[index % len(styles)]
        axes.plot((0, *plan.points), (0.0, *epsilons), style, linewidth=1.4, drawstyle="steps-pre", label=label)
    axes.set_xlabel("round")
    axes.set_ylabel(f"epsilon at delta {plan.terms.target_delta:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, plan.terms.num_rounds)
    axes.grid(alpha=0.3)
    if len(lines) <= _MOST_LINES_WITH_NAMES:
        axes.legend()
    else:
        axes.set_title(f"{len(plan.clients)} clients")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
