"""What is known after a round: metrics for the run folder, and for whoever watches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundReport:
    """What is known after a round.

    Args:
        round: Its number, from 1; 0 is the state before the first.
        phase: ``pretraining`` or ``training``.
        clients: Updates that were used.
        missing: Members that did not answer in time or failed.
        refused: Members that refused this round.
        retained: Share of the coordinates that was trained.
        epsilon: Largest epsilon spent by a client so far.
        bytes_up: Payload received so far.
        bytes_down: Payload sent so far.
        seconds: Duration of the round.
        retained_by_layer: The same for each parameter of the model.
        epsilons: Epsilon spent so far by each client of the tally.
        stages: Seconds of waiting for clients, of aggregating and of evaluating.
        metrics: What the evaluation on public data said; empty if there was none.
    """

    round: int
    phase: str
    clients: int
    missing: int
    refused: int
    retained: float
    epsilon: float
    bytes_up: int
    bytes_down: int
    seconds: float
    retained_by_layer: dict[str, float]
    epsilons: dict[str, float]
    stages: dict[str, float]
    metrics: dict[str, float]


def ignore(_: object) -> None:
    """Observe nothing."""
