"""Where a run's first weights come from: chance, a file, or public digits.

Only the server asks: clients are sent the weights of every round, and a run that goes on takes its own from the
checkpoint. Whatever a run starts from is public by declaration, see ``adadpigu_core.model_file``.
"""

import logging
from pathlib import Path

from torch import nn

from adadpigu_core import model_file
from adadpigu_core.configuration import PUBLIC_DIGITS, Configuration
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import assign
from server import public_digits

log = logging.getLogger("adadpigu.server")


def check_start(spec: ModelSpec, configuration: Configuration) -> None:
    """See whether a run could start from what is set, without any training.

    Raises:
        ConfigurationError: If it could not.
    """
    if configuration.task.weights == PUBLIC_DIGITS:
        public_digits.check(spec)
    elif configuration.task.weights:
        model_file.load(_path(configuration), build(spec, seed=0))


def start_from(model: nn.Module, spec: ModelSpec, configuration: Configuration) -> None:
    """Put a model that is at random weights to those that a run starts from.

    Raises:
        ConfigurationError: If they cannot be had.
    """
    if configuration.task.weights == PUBLIC_DIGITS:
        assign(model, public_digits.trained(spec, configuration.seed))
    elif configuration.task.weights:
        lacking = model_file.load(_path(configuration), model)
        if lacking:
            log.warning("task.weights has no %s: there the model starts at random", ", ".join(lacking))


def _path(configuration: Configuration) -> Path:
    return Path(configuration.task.weights).expanduser()
