"""What the owner of a node allows, whatever a server asks for.

A node policy is a TOML file on the machine that holds the records. It is the only place that says how much privacy may
be spent: a budget for each data set, by the name that keys its ledger, and limits that hold for all of them. Nothing
has a default, because whoever did not think of a limit has not allowed anything. A data set that the file does not name
has no budget, a deployed node without a file refuses everything, and so does one whose file others could have changed.

The file is read again for every message, so that a policy that becomes stricter holds at once, runs under way included.
Left out: who may start a run, which is for the operator of the SuperLink; and code that ignores this file, which is why
a node should run its own installed code: see ``client.launcher``.
"""

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adadpigu_core.accounting import LEAST_NOISE_MULTIPLIER, Event, Plan
from adadpigu_core.exceptions import ConfigurationError, PolicyError
from adadpigu_core.ledger import Target
from adadpigu_core.messages import MOST_STEPS
from client.file_modes import open_to_others

VERSION = 1
ANY = "any"
_PUBLIC = "the node's own policy cannot be used"


@dataclass(frozen=True)
class Limits:
    """What holds for one data set.

    Args:
        target: Largest epsilon, and its delta, over everything ever released.
        smallest_noise_multiplier: Of every private step.
        largest_sampling_probability: Of every private step.
        largest_steps: Private steps in one round.
        models: Fingerprints of the models that may be trained; None = any.
        factories: Whether ``models=None`` covers models that are named by an import path.
        code: Fingerprints of the code that may take part; None = any.
    """

    target: Target
    smallest_noise_multiplier: float
    largest_sampling_probability: float
    largest_steps: int
    models: frozenset[str] | None
    factories: bool
    code: frozenset[str] | None

    @classmethod
    def of_simulation(cls, target: Target) -> "Limits":
        """What holds for a simulated client, whose owner is whoever runs the simulation."""
        return cls(target, 0.0, 1.0, MOST_STEPS, models=None, factories=True, code=None)

    def check_code(self, code: str) -> None:
        """Refuse code that is not on the list."""
        allowed = self.code is None or code in self.code
        _require(allowed, f"the policy of this client does not allow the code {code}")

    def check_model(self, name: str, fingerprint: Callable[[], str]) -> None:
        """Refuse a model that is not on the list; to be asked before anything of it is imported or built.

        Privacy: what is installed here is nobody's business. The server hears the same whether a package is missing or
        another than the one that is listed; the log has the fingerprint.
        """
        public = f"the policy of this client does not allow the model {name}"
        own = ":" not in name
        if self.models is None:
            if not (own or self.factories):
                raise PolicyError(f"{public}: list the fingerprint of a model that is named by an import path", public)
            return
        try:
            found = fingerprint()
        except ConfigurationError as error:
            raise PolicyError(f"{public}: {error}", public) from error
        if found not in self.models:
            text = f"{public} with fingerprint {found}"
            raise PolicyError(text, text if own else public)

    def check_sampling(self, probability: float) -> None:
        """Refuse a larger chance of a record to enter a step."""
        most = self.largest_sampling_probability
        _require(
            probability <= most,
            f"the policy of this client allows a sampling probability of at most {most:g}, not {probability:g}",
        )

    def check_round(self, event: Event) -> None:
        """Refuse a round, after its plan was made: the policy may have become stricter since."""
        self.check_sampling(event.sampling_probability)
        least, most = self.smallest_noise_multiplier, self.largest_steps
        _require(
            event.noise_multiplier >= least,
            f"the policy of this client asks for a noise multiplier of at least {least:g} now, and the plan of this "
            f"run has {event.noise_multiplier:g}; start a new run",
        )
        _require(
            event.count <= most, f"the policy of this client allows at most {most} steps a round, not {event.count}"
        )

    def quieten(self, plan: Plan) -> Plan:
        """Raise the noise of a plan to what the policy asks for at least; more noise always fits the same budget."""
        return replace(
            plan,
            pretraining=self._raised(plan.pretraining, plan.events),
            training=self._raised(plan.training, plan.events),
        )

    def _raised(self, event: Event, events: Iterable[Event]) -> Event:
        """Raise the first step's noise by so much that the step with the least noise, if another, has enough."""
        noise = event.noise_multiplier
        lowest = min([noise, *(step.noise_multiplier for step in events if step.phase == event.phase)])
        if lowest >= self.smallest_noise_multiplier:
            return event
        if lowest == noise:
            return replace(event, noise_multiplier=self.smallest_noise_multiplier)
        # a hair more, so that no product falls short by its rounding
        return replace(event, noise_multiplier=noise * self.smallest_noise_multiplier / lowest * (1 + 1e-9))


@dataclass(frozen=True)
class Policy:
    """A policy file.

    Args:
        path: Where it is.
        budgets: Largest budget of each data set, by name.
        limits: What holds for each of them, with a target that is to be replaced.
    """

    path: Path
    budgets: Mapping[str, Target]
    limits: Limits

    def of(self, data_set: str) -> Limits:
        """The limits of a data set.

        Raises:
            ConfigurationError: If the policy does not name it.
        """
        if data_set not in self.budgets:
            raise ConfigurationError(
                f"{self.path}: there is no budget for the data set {data_set!r}, only for "
                f"{', '.join(map(repr, self.budgets))}; add [data-sets.{json.dumps(data_set)}] with epsilon and delta, "
                "or correct the node's data-set-name",
                _PUBLIC,
            )
        return replace(self.limits, target=self.budgets[data_set])


def _require(allowed: bool, text: str) -> None:
    if not allowed:
        raise PolicyError(text, text)


@dataclass(frozen=True)
class _Rule:
    kinds: tuple[type, ...]
    fits: Callable[[Any], bool]
    text: str


def _is_list_of(pattern: str) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if isinstance(value, str):
            return value == ANY
        return bool(value) and all(isinstance(item, str) and re.fullmatch(pattern, item) for item in value)

    return fits


_NUMBER = (float, int)
_BUDGET = {
    "epsilon": _Rule(_NUMBER, lambda epsilon: 0 < epsilon < math.inf, "a number above 0"),
    "delta": _Rule((float,), lambda delta: 0 < delta < 1, "a number between 0 and 1"),
}
_LIMITS = {
    "smallest-noise-multiplier": _Rule(
        _NUMBER,
        lambda noise: LEAST_NOISE_MULTIPLIER <= noise <= 1e5,
        f"a number from {LEAST_NOISE_MULTIPLIER} to 1e5",
    ),
    "largest-sampling-probability": _Rule(_NUMBER, lambda chance: 0 < chance <= 1, "a number above 0 and at most 1"),
    "largest-steps-per-round": _Rule(
        (int,), lambda steps: 1 <= steps <= MOST_STEPS, f"a number from 1 to {MOST_STEPS}"
    ),
}
_ALLOWED = {
    "models": _Rule((str, list), _is_list_of("[0-9a-f]{16}"), '"any" or a list of fingerprints of models'),
    "code": _Rule((str, list), _is_list_of(r"[0-9A-Za-z.]+\+[0-9a-f]{12}"), '"any" or a list of fingerprints of code'),
}
_TABLES = {"limits": _LIMITS, "allowed": _ALLOWED}


def load(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigurationError: If it cannot be read, others may write it, or anything in it is unknown, missing or out of
            range; all problems at once.
    """
    try:
        with path.open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()))
            _check_folders(path)
            content = tomllib.loads(file.read().decode())
    except OSError as error:
        text = f"{path}: the policy of this node cannot be read ({error.strerror}); 'adadpigu policy init' writes one"
        raise ConfigurationError(text, _PUBLIC) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: is not TOML ({error})", _PUBLIC) from error
    problems = [*_problems(content)]
    if problems:
        listed = "\n".join(f"  * {problem}" for problem in problems)
        raise ConfigurationError(f"{path}: this policy cannot be used:\n{listed}", _PUBLIC)
    return _build(path, content)


def _check_mode(path: Path, status: os.stat_result) -> None:
    if os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(f"{path}: others may write this policy; run chmod go-w on it", _PUBLIC)


def _check_folders(path: Path) -> None:
    place = open_to_others(path)
    if place is not None:
        text = f"{place}: others may write here, and so exchange the policy {path}; run chmod go-w on it"
        raise ConfigurationError(text, _PUBLIC)


def _problems(content: Mapping[str, Any]) -> list[str]:
    problems = [f"{key}: there is no such table" for key in content if key not in ("version", "data-sets", *_TABLES)]
    if content.get("version") != VERSION:
        problems.append(f"version: this software knows version {VERSION}, not {content.get('version')!r}")
    budgets = content.get("data-sets")
    if not isinstance(budgets, dict) or not budgets:
        problems.append('data-sets: name at least one data set, as in [data-sets."patients"]')
    else:
        for name, table in budgets.items():
            problems += _in_table(f"data-sets.{json.dumps(name)}", table, _BUDGET)
    for name, rules in _TABLES.items():
        problems += _in_table(name, content.get(name), rules)
    return problems


def _in_table(name: str, table: Any, rules: Mapping[str, _Rule]) -> list[str]:
    if not isinstance(table, dict):
        return [f"{name}: this table is missing"]
    problems = [f"{name}.{key}: there is no such setting" for key in table if key not in rules]
    for key, rule in rules.items():
        value = table.get(key)
        if value is None:
            problems.append(f"{name}.{key}: is missing; nothing is allowed by default")
        elif type(value) not in rule.kinds or not rule.fits(value):
            problems.append(f"{name}.{key}: must be {rule.text}, got {value!r}")
    return problems


def _build(path: Path, content: Mapping[str, Any]) -> Policy:
    budgets = {
        name: Target(float(table["epsilon"]), float(table["delta"])) for name, table in content["data-sets"].items()
    }
    limits, allowed = content["limits"], content["allowed"]
    models, code = (None if allowed[key] == ANY else frozenset(allowed[key]) for key in _ALLOWED)
    return Policy(
        path,
        budgets,
        Limits(
            target=next(iter(budgets.values())),
            smallest_noise_multiplier=float(limits["smallest-noise-multiplier"]),
            largest_sampling_probability=float(limits["largest-sampling-probability"]),
            largest_steps=limits["largest-steps-per-round"],
            models=models,
            factories=models is not None,
            code=code,
        ),
    )


TEMPLATE = """\
# The policy of this node: what its owner allows, whatever a server asks for. Whoever may write this file decides how
# much privacy is spent; keep it writable by the owner alone. It is read again for every message.
version = {version}

# Largest budget of a data set over everything that is ever released from it: all runs, all rounds, for ever. The name
# is the node's data-set-name, which also keys the ledger; add a table for each data set. A data set without one is
# refused. Lower a budget at any time; a higher one lets more out, and what is out cannot be called back.
[data-sets.{data_set}]
epsilon = {epsilon!r}
delta = {delta!r}    # well below one over the number of records

[limits]
# The client adds at least this much noise, as a multiple of the clipping norm, even if the budget would do with less.
smallest-noise-multiplier = 0.5
# A server that asks for a larger chance of a record to enter a step is refused.
largest-sampling-probability = 0.5
# Private steps in one round.
largest-steps-per-round = 10

[allowed]
# "any": every network of this package, and no others. Or a list of fingerprints: "adadpigu policy model" shows that of
# a model, and a refusal names the one that was asked for. Only a list can allow a model named by an import path.
models = "any"
# "any", or a list of fingerprints of code. This is the release that is installed now; add the next one to upgrade.
code = [{code}]
"""


def template(data_set: str, target: Target, code: str) -> str:
    """Text of a new policy, with comments."""
    return TEMPLATE.format(
        version=VERSION,
        data_set=json.dumps(data_set, ensure_ascii=False).replace("\x7f", "\\u007f"),
        epsilon=float(target.epsilon),
        delta=float(target.delta),
        code=json.dumps(code),
    )
