"""Public weights of clients, and how noisy an aggregate under them is.

A weight is a function of what a client declares: ``precision`` is the inverse variance of its release, so that a client
with a small budget or few records counts less instead of spoiling the round; ``records`` is the declared number of
records; ``uniform`` is one.
"""

import math
from collections.abc import Sequence

from adadpigu_core.exceptions import ConfigurationError

AGGREGATIONS = ("precision", "records", "uniform")


def public_weight(kind: str, *, num_records: int, noise_multiplier: float, sampling_probability: float) -> float:
    """Weight of a client.

    Args:
        kind: ``precision``, ``records`` or ``uniform``.
        num_records: Declared by the client.
        noise_multiplier: Of its private steps.
        sampling_probability: Of its private steps.

    Raises:
        ConfigurationError: For an unknown kind.
    """
    if kind == "precision" and noise_multiplier > 0:
        # the clipping norm and the number of steps are the same for all and cancel
        return (sampling_probability * num_records / noise_multiplier) ** 2
    if kind in ("precision", "records"):
        return float(num_records)
    if kind == "uniform":
        return 1.0
    raise ConfigurationError(f"federation.aggregation: unknown value {kind!r}")


def noise_of_mean(weights: Sequence[float], noise_stddevs: Sequence[float]) -> float:
    """Standard deviation of a weighted mean of independent releases."""
    variance = sum((weight * noise) ** 2 for weight, noise in zip(weights, noise_stddevs, strict=True))
    return math.sqrt(variance) / sum(weights)


def marginal_values(weights: Sequence[float], noise_stddevs: Sequence[float]) -> list[float]:
    """By which share the noise of the weighted mean would be larger without each client; negative if it would be less.

    Returns:
        One number for each client; infinity for one that is alone.
    """
    total, variance = sum(weights), sum((w * s) ** 2 for w, s in zip(weights, noise_stddevs, strict=True))
    noise = math.sqrt(variance) / total
    values = []
    for weight, stddev in zip(weights, noise_stddevs, strict=True):
        rest, left = total - weight, max(variance - (weight * stddev) ** 2, 0.0)
        values.append(math.sqrt(left) / rest / noise - 1 if rest > 0 and len(weights) > 1 else math.inf)
    return values
