"""A ledger that was put back from a backup: noticed, and made up for.

A backup lacks what was charged after it was made, and nothing in the file shows it. But the server has seen the charges
that came with the client's replies, keeps the largest counts, and sends them along with each request. A client whose
ledger holds less refuses until its operator decides: put the right ledger back, or charge what is missing. Charging can
only make epsilon larger, so that a server that lies costs budget if its word is taken, and never privacy.

Left out: charges that no server has seen, and a server that says nothing.
"""

import time
from collections.abc import Iterable

from adadpigu_core.accounting import Event, merge
from adadpigu_core.exceptions import LedgerError
from adadpigu_core.ledger import Ledger, Round, Target
from adadpigu_core.ledger_history import RECONCILED


def lacking(own: Iterable[Event], known: Iterable[Event]) -> tuple[Event, ...]:
    """Events that are known elsewhere and that a ledger does not hold, or not so often."""
    held = {_kind(event): event.count for event in merge(own)}
    missing = ((event, event.count - held.get(_kind(event), 0)) for event in merge(known))
    return tuple(Event(*_kind(event), count) for event, count in missing if count > 0)


def check_complete(ledger: Ledger, known: Iterable[Event]) -> None:
    """Refuse to go on with a ledger that holds less than is known elsewhere.

    Raises:
        LedgerError: Naming how many releases are missing; the text is public, as both sides know it.
    """
    missing = sum(event.count for event in lacking(ledger.events(), known))
    if missing:
        text = (
            f"the server has seen {missing} releases that this client's ledger does not hold: was a backup restored? "
            "The client refuses until its operator puts the right ledger back, or takes over the server's tally with "
            "'adadpigu ledger reconcile'"
        )
        raise LedgerError(text, text)


def make_up(ledger: Ledger, missing: Iterable[Event]) -> str:
    """Charge what is missing, whatever the budget; gives the name of the run that stands for it."""
    run = f"{RECONCILED}{time.time_ns()}"
    for number, event in enumerate(missing, start=1):
        ledger.charge(Round(run, number), event, Target(float("inf"), 0.5))
    return run


def _kind(event: Event) -> tuple[str, float, float]:
    return event.phase, event.noise_multiplier, event.sampling_probability
