"""What earlier runs have seen of the clients' ledgers.

A backup is put back between two runs rather than in the middle of one, and the tally of a new run knows nothing. But
the tallies of the runs before lie in their folders, beside that of the new run. A client whose ledger holds less than
any of them has seen is told so, and refuses.

Left out: runs that are kept elsewhere, or were deleted.
"""

import json
import logging
from pathlib import Path

from adadpigu_core.accounting import Event
from adadpigu_core.exceptions import AdaDPIGUError
from server.run_folder import PRIVACY

log = logging.getLogger("adadpigu.server")

Known = dict[str, tuple[Event, ...]]


def known_charges(run_folder: Path) -> Known:
    """Read what the runs in a folder, this one included, have seen of each data set.

    Args:
        run_folder: Folder of one of them.

    Returns:
        For each data set the largest count of every event, by the data set's identity.
    """
    counts: dict[str, dict[tuple[str, float, float], int]] = {}
    for path in sorted(run_folder.absolute().parent.glob(f"*/{PRIVACY}")):
        for data_set, events in _tally(path).items():
            own = counts.setdefault(data_set, {})
            for event in events:
                kind = event.phase, event.noise_multiplier, event.sampling_probability
                own[kind] = max(event.count, own.get(kind, 0))
    return {
        data_set: tuple(Event(*kind, count) for kind, count in own.items()) for data_set, own in sorted(counts.items())
    }


def _tally(path: Path) -> Known:
    try:
        accounts = json.loads(path.read_text(encoding="utf-8"))["clients"]
        return {account["data_set"]: tuple(Event(**event) for event in account["events"]) for account in accounts}
    except (OSError, ValueError, KeyError, TypeError, AdaDPIGUError) as error:
        log.warning("%s: what this run has seen cannot be read (%s)", path, type(error).__name__)
        return {}
