"""What ``adadpigu doctor`` finds: a list of statements, each with what to do about it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from adadpigu_core.exceptions import AdaDPIGUError

GOOD, NOTE, WARNING, FAULT = "good", "note", "warning", "fault"


@dataclass(frozen=True)
class Finding:
    """One statement.

    Args:
        level: ``good``, ``note`` (worth knowing), ``warning`` (works, but should be changed) or ``fault`` (will not
            work).
        subject: What it is about, in a word or two.
        text: What was found.
        remedy: What to do; empty if there is nothing to do.
    """

    level: str
    subject: str
    text: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]
T = TypeVar("T")


def if_given(subject: str, value: T | None, check: Callable[[T], Iterable[Finding]]) -> Iterator[tuple[str, Check]]:
    """Make a check of something that may not have been named."""
    if value is not None:
        yield subject, partial(check, value)


def examine(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Carry out checks; one that fails is a finding too, and the others go on."""
    for subject, check in checks:
        try:
            yield from check()
        except AdaDPIGUError as error:
            yield Finding(FAULT, subject, str(error))
        except Exception as error:  # whatever a broken machine raises is what the doctor is for
            yield Finding(FAULT, subject, f"cannot be checked: {type(error).__name__}: {error}")
