"""Whole methods by one key: the settings that make up the paper's method, and plain private training beside it.

A named method decides on the mechanisms alone. Budget, rounds, rates and model stay what they are set to, so that two
methods are compared by changing one word.
"""

from collections.abc import Mapping

AS_SET = "as-set"
_PAPER: dict[str, bool | float | str] = {
    "pretraining.measure": "magnitude",
    "pretraining.ranking": "consensus",
    "retention.schedule": "linear",
    "retention.initial-ratio": 0.6,
    "retention.final-ratio": 1.0,
    "retention.period": 1.0,
    "retention.granularity": "coordinate",
    "retention.rerank-every": 0,
    "adaptive-clipping.rule": "paper",
    "adaptive-clipping.centre": True,
    "shrinkage.rule": "none",
}
_PLAIN: dict[str, bool | float | str] = {
    "pretraining.round-share": 0.0,
    "pretraining.ranking": "consensus",
    "retention.schedule": "linear",
    "retention.initial-ratio": 1.0,
    "retention.final-ratio": 1.0,
    "retention.rerank-every": 0,
    "adaptive-clipping.rule": "none",
    "shrinkage.rule": "none",
}
_SETTINGS = {AS_SET: {}, "paper": _PAPER, "dp-fedsgd": _PLAIN}
METHODS = tuple(_SETTINGS)


def settings_of(method: object) -> Mapping[str, bool | float | str]:
    """Settings that a method decides on, whatever else they are set to; none for a method that there is not.

    >>> settings_of("paper")["adaptive-clipping.rule"], dict(settings_of("as-set"))
    ('paper', {})
    """
    return _SETTINGS.get(method, {}) if isinstance(method, str) else {}
