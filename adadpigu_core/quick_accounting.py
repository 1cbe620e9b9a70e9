"""Epsilon within a millisecond or so: bounds for planning, where it is asked for thousands of times.

The bounds are as rigorous as those of ``privacy_loss`` and a little coarser, about 0.2 %. Nothing is ever charged by
them, and a client's own noise never comes from them: they are this project's own arithmetic, while what guarantees
privacy is that of dp_accounting, by which tests check them.

Everything errs on the safe side. The losses of a step lie on a grid in such a way that its hockey-stick divergence at
the points is exact and between them the chord of one that is convex in exp(epsilon) (Doroshenko et al., arXiv
2207.04380). Losses above the grid count as infinite, those below it as its lowest point. Steps are composed by Fourier
transforms on a circle; what would run over its top is bounded (Chernoff) and counts as infinite too, and what runs
under its bottom comes out at the top. Rounding errors are taken off delta.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr, ndtri

from adadpigu_core.privacy_loss import ROUNDING, Event, check_delta, is_void, loss_grid

Vector = NDArray[np.float64]

_OVERSTATEMENT = 2e-3
_MOST_POINTS = 1e4
_SLACK = 1e-3  # share of delta that all tails together, and rounding errors, may take
_TILTS = (0.3, 1.5, 3.0, 5.0, 8.0)  # in standard deviations
_RARE_TILTS = (0.3, 1.0)
_LARGEST_EPSILON = 600.0  # beyond which exp leaves double precision
_MOST_AT_ONCE = 2**19


@dataclass(frozen=True)
class _Step:
    """The discrete losses of one private step in both directions.

    The grid point with index i stands for loss i when the record is removed, and for loss -i when it is added, in grid
    widths: the same releases have these losses, so that one pass over them serves both.

    Args:
        first: Index of the first point.
        masses: Probabilities of the points, [directions, points].
        infinite: Probability of more than the largest loss, [directions].
    """

    first: int
    masses: Vector
    infinite: Vector

    def wrapped(self, direction: int, size: int) -> Vector:
        """Losses on a circle, where the point of loss 0 is the first."""
        masses, first = self.masses[direction], self.first
        if direction:
            masses, first = masses[::-1], 1 - first - len(masses)
        lead = first % size
        padded = np.zeros(-(-(lead + len(masses)) // size) * size)
        padded[lead : lead + len(masses)] = masses
        folded: Vector = padded.reshape(-1, size).sum(axis=0)
        return folded


def quick_epsilons(kinds: Sequence[Event], counts: NDArray[np.int64], delta: float) -> list[float]:
    """Bounds of epsilon after some and more releases.

    Args:
        kinds: Noise and sampling of the releases; their own counts are ignored.
        counts: How many releases of each kind, integers [points, kinds], that only grow from row to row.
        delta: In (0, 1).

    Returns:
        For each row a number that is never too small and no smaller than the one before; infinity where
        ``privacy_loss.epsilon`` says so, and above 600.

    Raises:
        ConfigurationError: If delta is out of range.
    """
    check_delta(delta, "delta")
    used = [index for index, count in enumerate(counts[-1]) if count]
    total = [replace(kinds[index], count=int(counts[-1, index])) for index in used]
    if not total:
        return [0.0] * len(counts)
    certain_delta = (1 - _SLACK) * delta - ROUNDING * int(counts[-1].sum())
    if certain_delta <= 0 or is_void(total):
        return [math.inf if row.any() else 0.0 for row in counts]
    grid = loss_grid(total, _OVERSTATEMENT, _MOST_POINTS)
    tail = _SLACK * delta / 4
    steps = [_step(event, grid, tail / int(counts[-1].sum())) for event in total]
    windows = _windows(steps, counts[:, used], tail, grid, math.sqrt(sum(event.loss_variance() for event in total)))
    found = np.zeros(len(counts))
    for direction, window in enumerate(windows):
        infinite = counts[:, used] @ np.array([step.infinite[direction] for step in steps]) + tail
        values = _one_direction(steps, direction, counts[:, used], window, grid, infinite, certain_delta)
        found = np.maximum(found, values)
    return [float(value) for value in np.maximum.accumulate(found)]


def quick_epsilon(events: Sequence[Event], delta: float) -> float:
    """A bound of the epsilon of a composition."""
    counts = np.array([[event.count for event in events]], dtype=np.int64)
    return quick_epsilons(events, counts, delta)[0] if events else 0.0


def _one_direction(
    steps: Sequence[_Step],
    direction: int,
    counts: NDArray[np.int64],
    window: tuple[float, float],
    grid: float,
    infinite: Vector,
    delta: float,
) -> Vector:
    if window[1] > _LARGEST_EPSILON:
        return np.where(counts.any(axis=1), math.inf, 0.0)
    low, high = math.floor(window[0] / grid) - 1, max(math.ceil(window[1] / grid), 0) + 1
    size = next_fast_len(high - low + 1, real=True)
    spectra = [rfft(step.wrapped(direction, size)) for step in steps]
    chunk = max(1, _MOST_AT_ONCE // size)
    start, found = np.ones(size // 2 + 1, dtype=np.complex128), []
    before = np.zeros(len(steps), dtype=np.int64)
    for begin in range(0, len(counts), chunk):
        rows = counts[begin : begin + chunk]
        composed = _compositions(spectra, rows, before, start)
        start, before = composed[-1], rows[-1]
        masses = np.roll(irfft(composed, size, axis=1), -low, axis=1)
        found.append(_solved(masses, low, grid, infinite[begin : begin + chunk], delta))
    return np.concatenate(found)


def _step(event: Event, grid: float, tail: float) -> _Step:
    """Discretise one step.

    The record's presence moves the release from N(0, noise^2) to a mixture of that and N(1, noise^2). When it is
    removed losses grow with the release, when it is added they fall.
    """
    noise, sampling = event.noise_multiplier, event.sampling_probability
    reach = -float(ndtri(tail))
    low, high = _loss(np.array([-noise * reach, 1 + noise * reach]), noise, sampling)
    first = math.floor(low / grid)
    last = max(math.ceil(high / grid), first + 1)
    losses = grid * np.arange(first, last + 1, dtype=np.float64)
    edges = _release(losses, noise, sampling)
    absent, present = _cells(edges / noise), _cells((edges - 1) / noise)
    mixture = (1 - sampling) * absent + sampling * present
    removed = _rounded(mixture, absent, losses, grid)
    added = _rounded(absent[::-1], mixture[::-1], -losses[::-1], grid)
    masses = np.stack([removed[0], added[0][::-1]])
    return _Step(first, masses, np.array([removed[1], added[1]]))


def _rounded(upper: Vector, lower: Vector, losses: Vector, grid: float) -> tuple[Vector, float]:
    """Masses at grid points, and above them.

    Args:
        upper: Probabilities of releases below the first point, between neighbours and above the last, where the losses
            are of.
        lower: The same for the other data set.
        losses: Ascending.
        grid: Their distance.
    """
    inner = upper[1:-1]
    # each interval's mass goes to its ends so that both distributions keep theirs
    up = np.clip((inner - lower[1:-1] * np.exp(losses[:-1])) / -math.expm1(-grid), 0, inner)
    masses = np.zeros(len(losses))
    masses[:-1] += inner - up
    masses[1:] += up
    masses[0] += upper[0]
    return masses, float(upper[-1])


def _loss(release: Vector, noise: float, sampling: float) -> Vector:
    """Log of the mixture's density over that without the record."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-sampling), math.log(sampling) + (2 * release - 1) / (2 * noise**2))


def _release(loss: Vector, noise: float, sampling: float) -> Vector:
    """The release that has a loss; minus infinity for losses that are too small for any."""
    with np.errstate(divide="ignore"):
        release: Vector = 0.5 + noise**2 * np.log(np.maximum(1 + np.expm1(loss) / sampling, 0.0))
    return release


def _cells(edges: Vector) -> Vector:
    """Probability of a standard normal variate below, between and above edges, without cancellation in the tails."""
    tails = ndtr(-np.abs(edges))
    negative = edges < 0
    straddles = negative[1:] != negative[:-1]
    between = np.where(straddles, 1 - tails[1:] - tails[:-1], np.abs(tails[1:] - tails[:-1]))
    below = tails[0] if negative[0] else 1 - tails[0]
    above = 1 - tails[-1] if negative[-1] else tails[-1]
    return np.concatenate(([below], between, [above]))


def _windows(
    steps: Sequence[_Step], counts: NDArray[np.int64], tail: float, grid: float, deviation: float
) -> list[tuple[float, float]]:
    """Between what the sum of losses lies in each direction, but for tails (Chernoff).

    The upper bound holds for part of the releases as well, because a step's moment generating function is at least 1
    above 0.

    Args:
        steps: Of all kinds.
        counts: Of releases, [points, kinds].
        tail: Probability beyond each end.
        grid: Distance of grid points.
        deviation: About the standard deviation of the sum.
    """
    losses = [grid * np.arange(one.first, one.first + one.masses.shape[1], dtype=np.float64) for one in steps]
    # where rare large losses matter, their size is the measure and not the deviation
    farthest = max(abs(some[index]) for some in losses for index in (0, -1)) or grid
    tilts = [*(part / deviation for part in _TILTS), *(-part * math.log(tail) / farthest for part in _RARE_TILTS)]
    upper, lower = [math.inf, math.inf], [math.inf, math.inf]
    last, first = counts[-1], counts[0]
    for tilt in tilts:
        with np.errstate(over="ignore", divide="ignore"):
            factors = [np.exp(tilt * some) for some in losses]
            rising = np.log([one.masses @ factor for one, factor in zip(steps, factors, strict=True)])
            falling = np.log([one.masses @ (1 / factor) for one, factor in zip(steps, factors, strict=True)])
        for direction, (above, below) in enumerate(((rising[:, 0], falling[:, 0]), (falling[:, 1], rising[:, 1]))):
            sums = (float(np.where(logs > 0, last * logs, first * logs).sum()) for logs in (above, below))
            for bounds, total in zip((upper, lower), sums, strict=True):
                bounds[direction] = min(bounds[direction], (total - math.log(tail)) / tilt)
    return [(-below, above) for above, below in zip(upper, lower, strict=True)]


def _compositions(
    spectra: Sequence[NDArray[np.complex128]],
    counts: NDArray[np.int64],
    before: NDArray[np.int64],
    start: NDArray[np.complex128],
) -> NDArray[np.complex128]:
    """Spectra after each row of counts, [points, frequencies], from the spectrum after the counts before."""
    powers = [_Powers(spectrum) for spectrum in spectra]
    composed = np.empty((len(counts), len(start)), dtype=np.complex128)
    for row, grown in enumerate(np.diff(counts, axis=0, prepend=before[None])):
        current = start
        for index in np.flatnonzero(grown):
            current = powers[index].times(current, int(grown[index]))
        composed[row] = start = current
    return composed


class _Powers:
    """Powers of a spectrum by squaring, which is much faster than NumPy's complex powers."""

    def __init__(self, spectrum: NDArray[np.complex128]) -> None:
        self._squares = [spectrum]

    def times(self, factor: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
        """A spectrum times a power of this one."""
        while len(self._squares) < exponent.bit_length():
            self._squares.append(self._squares[-1] * self._squares[-1])
        for bit, square in enumerate(self._squares):
            if exponent >> bit & 1:
                factor = factor * square
        return factor


def _solved(masses: Vector, low: int, grid: float, infinite: Vector, delta: float) -> Vector:
    """Smallest epsilon, at least 0, of each row of masses at the points from ``low``."""
    skipped = max(-low, 0)
    losses = grid * np.arange(low + skipped, low + masses.shape[1])
    masses = masses[:, skipped:]
    upper = np.cumsum(masses[:, ::-1], axis=1)[:, ::-1] + infinite[:, None]
    lower = np.cumsum((masses * np.exp(-losses))[:, ::-1], axis=1)[:, ::-1]
    within = upper - np.exp(losses) * lower <= delta
    place = within.argmax(axis=1)
    rows = np.arange(len(masses))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log((upper[rows, place] - delta) / lower[rows, place])
    # at the first point the divergence is within delta already at loss 0, or a little below the first loss
    values = np.where(np.isnan(values), 0.0, np.minimum(values, losses[place]))
    return np.where(within.any(axis=1), np.maximum(values, 0.0), math.inf)


__all__ = ["quick_epsilon", "quick_epsilons"]
