"""What a search may change, and within which bounds.

Settings that decide what is released and charged (sampling, phase split, local steps) are apart: a search on private
data must leave them alone, because its accounting wants trials that cost the same.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from adadpigu_core.adaptive_clipping import GRANULARITIES
from adadpigu_core.configuration import Value
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.masking import SCHEDULES

if TYPE_CHECKING:
    from optuna import Trial

Suggest = Callable[["Trial", str], Value]


def _number(low: float, high: float, *, log: bool = False) -> Suggest:
    # four digits: what is printed and written is what ran
    return lambda trial, key: float(f"{trial.suggest_float(key, low, high, log=log):.4g}")


def _choice(*choices: str | int) -> Suggest:
    return lambda trial, key: cast(Value, trial.suggest_categorical(key, choices))


PRIVATE_SPACE: dict[str, Suggest] = {
    "optimiser.local-learning-rate": _number(0.01, 1.0, log=True),
    "optimiser.server-learning-rate": _number(0.3, 3.0, log=True),
    "privacy.clipping-norm": _number(0.1, 10.0, log=True),
    "retention.schedule": _choice(*SCHEDULES),
    "retention.initial-ratio": _number(0.2, 1.0),
    "retention.period": _number(0.1, 1.0),
    "adaptive-clipping.rule": _choice("none", "energy"),
    "adaptive-clipping.granularity": _choice(*GRANULARITIES),
}
PUBLIC_SPACE: dict[str, Suggest] = {
    **PRIVATE_SPACE,
    "pretraining.round-share": _number(0.02, 0.3),
    "privacy.pretraining-share": _number(0.02, 0.4, log=True),
    "privacy.sampling-probability": _number(0.05, 1.0, log=True),
    "federation.local-steps": _choice(1, 2, 4),
}


def space(keys: Sequence[str], *, private: bool) -> dict[str, Suggest]:
    """The settings to search: those that are named, or all that may be searched.

    Raises:
        ConfigurationError: For a setting that cannot be searched, or not on private data.
    """
    allowed = PRIVATE_SPACE if private else PUBLIC_SPACE
    for key in keys:
        if key not in PUBLIC_SPACE:
            raise ConfigurationError(f"--search: {key} cannot be searched; choose from {', '.join(allowed)}")
        if key not in allowed:
            raise ConfigurationError(
                f"--search: {key} changes what a trial costs; on private data all trials must cost the same"
            )
    return {key: allowed[key] for key in keys or allowed}
