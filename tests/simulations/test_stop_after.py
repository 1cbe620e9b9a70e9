"""A run that ends by the clock begins no round that would not be over in time."""

import pytest

from simulations.simulate import StopAfter, StoppedError


def rounds_until(deadline, durations):
    """Rounds that are carried out, and when the last of them is over."""
    now = 0.0
    stop_after = StopAfter(deadline, lambda: now)
    for number, seconds in enumerate(durations, start=1):
        now += seconds
        try:
            stop_after({"round": number, "seconds": seconds}, len(durations))
        except StoppedError:
            return number, now
    return len(durations), now


@pytest.mark.parametrize(
    ("deadline", "durations", "expected"),
    [
        (100, [30] * 9, (3, 90)),  # a fourth would be over at 120
        (120, [30] * 9, (4, 120)),
        (100, [10, 40, 10, 10, 10, 10], (4, 70)),  # the next may be as long as the longest
        (100, [200] * 9, (1, 200)),  # every piece brings the run forward
        (0, [30] * 9, (1, 30)),
        (100, [30, 30, 30], (3, 90)),
        (100, [60, 60], (1, 60)),
        (0, [30], (1, 30)),
    ],
)
def test_rounds_that_fit(deadline, durations, expected):
    assert rounds_until(deadline, durations) == expected


def test_after_the_last_round_there_is_nothing_to_stop():
    StopAfter(0, lambda: 1e9)({"round": 5, "seconds": 3.0}, 5)
