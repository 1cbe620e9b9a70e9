"""Everything that a ledger holds, for people: read without changing a row, and every epsilon recomputed.

A ledger stores events and no epsilon, so that there is nothing to trust but the events; what is checked here is that
they make sense, that they stay within the target of the run that caused them, and that rounds are in order. Left out:
the releases themselves, which are not for anybody's eyes.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adadpigu_core.accounting import Event, epsilon, merge
from adadpigu_core.ledger import Target
from adadpigu_core.ledger_file import NONSENSE, LedgerFile

RECONCILED = "reconciled-"  # how the name of a run begins that only makes up for charges that a backup lacks


@dataclass(frozen=True)
class Charge:
    """One row: what a round was charged for.

    Args:
        run: Identity of the run.
        round: Number of the round.
        event: What was paid for.
        code: Code that asked for it.
        time: When, in seconds since 1970.
        released: Whether its outcome was stored, and so may have been sent.
    """

    run: str
    round: int
    event: Event
    code: str
    time: float
    released: bool


@dataclass(frozen=True)
class DataSetHistory:
    """All charges of one data set.

    Args:
        name: Key of the data set.
        id: Its random public identity.
        since: When it was first seen, in seconds since 1970.
        charges: In the order in which they were made.
        targets: Target of each run that was planned.
        content: Fingerprint of the latest records. It must not leave this machine.
    """

    name: str
    id: str
    since: float
    charges: tuple[Charge, ...]
    targets: dict[str, Target]
    content: str = field(repr=False)

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything charged, equal events added up."""
        return merge(charge.event for charge in self.charges)

    def events_of(self, run: str) -> tuple[Event, ...]:
        """Everything charged for a run."""
        return merge(charge.event for charge in self.charges if charge.run == run)

    @property
    def runs(self) -> tuple[str, ...]:
        """Runs that were charged for, in the order of their first charge."""
        return tuple(dict.fromkeys(charge.run for charge in self.charges))

    def problems(self) -> Iterator[str]:
        """What does not add up."""
        latest: dict[str, int] = {}
        for number, charge in enumerate(self.charges):
            if charge.round <= latest.get(charge.run, 0):
                yield f"run {charge.run}: round {charge.round} was charged after round {latest[charge.run]}"
            latest[charge.run] = max(charge.round, latest.get(charge.run, 0))
            if charge.time > time.time() + 86400:
                yield f"run {charge.run}: round {charge.round} was charged in the future; is the clock right?"
            if charge.run not in self.targets and not charge.run.startswith(RECONCILED):
                yield f"run {charge.run}: round {charge.round} was charged without a plan"
            if number and charge.time < self.charges[number - 1].time - 86400:
                yield f"run {charge.run}: round {charge.round} was charged a day before the charge above it"
        for run, target in self.targets.items():
            last = max((number for number, charge in enumerate(self.charges) if charge.run == run), default=-1)
            spent = epsilon(merge(charge.event for charge in self.charges[: last + 1]), target.delta)
            if spent > target.epsilon:
                yield f"run {run}: epsilon was {spent:.4f} when it ended, above its target {target.epsilon:g}"
        if self.charges and not math.isfinite(epsilon(self.events, 1e-5)):
            yield "its events have no finite epsilon"


class _Reader(LedgerFile):
    """A ledger that is there, to be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, create=False)

    def data_sets(self) -> tuple[DataSetHistory, ...]:
        with self._explained(*NONSENSE):
            self._execute("BEGIN")  # one state of the file, whatever others write meanwhile
            rows = self._all("SELECT name, id, time FROM data_sets ORDER BY time, name")
            return tuple(
                DataSetHistory(name, identity, since, self._charges(name), self._targets(name), self._content(name))
                for name, identity, since in rows
            )

    def _content(self, name: str) -> str:
        return str(self._one("SELECT content FROM contents WHERE data_set = ? ORDER BY time DESC LIMIT 1", name)[0])

    def _charges(self, name: str) -> tuple[Charge, ...]:
        query = (
            "SELECT run, round, phase, noise_multiplier, sampling_probability, count, code, time, "
            "EXISTS (SELECT 1 FROM releases WHERE charge = charges.id) FROM charges WHERE data_set = ? ORDER BY id"
        )
        return tuple(
            Charge(run, number, Event(*event), code, at, bool(released))
            for run, number, *event, code, at, released in self._all(query, name)
        )

    def _targets(self, name: str) -> dict[str, Target]:
        query = "SELECT run, target_epsilon, target_delta FROM plans WHERE data_set = ? ORDER BY time"
        return {run: Target(*target) for run, *target in self._all(query, name)}


def read(path: Path) -> tuple[DataSetHistory, ...]:
    """Read every data set of a ledger, ordered by when it was first seen.

    Raises:
        LedgerError: If there is no ledger, or it is damaged, of another version, or makes no sense.
    """
    reader = _Reader(path)
    try:
        return reader.data_sets()
    finally:
        reader.close()
