"""Line charts as SVG text, small and without a library, so that a report can be written again after every round.

A chart says in words what it shows (title and description, for those who do not see it), tells its lines apart by dash
and name as well as by colour, and takes its colours from the page, so that it follows a dark one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 12, 46
# as many as lines, so that each has its own without its colour
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4", "4 2 1 2", "1 5", "10 2 2 2 2 2", "18 6", "5 6")
_MOST_LINES = 10
_MOST_POINTS = 400
_MOST_NAMES = 3


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: For the legend.
        points: (x, y), finite.
        marked: Whether every point has a mark; one that is alone always has.
        joined: Whether there is a line from point to point.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    marked: bool = False
    joined: bool = True


def merged(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Lines of which none hides another: those with the same points become one, under all their names."""
    alike: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for line in lines:
        alike.setdefault(line.points, []).append(line.name)
    return tuple(Line(_together(names), points) for points, names in alike.items())


def _together(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{names[0]} and {len(names) - 1} alike"


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        id: Unique in the page.
        title: What it shows.
        x_label: Below the axis.
        y_label: Beside the axis.
        lines: At least one of them with points, or the chart says that there is nothing yet.
    """

    id: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]

    @property
    def drawn(self) -> tuple[Line, ...]:
        """The lines that are drawn: all of them, or some that are spread over the range of what they end at."""
        lines = [line for line in self.lines if line.points]
        if len(lines) <= _MOST_LINES:
            return tuple(lines)
        ordered = sorted(lines, key=lambda line: line.points[-1][1])
        picked = {round(part * (len(ordered) - 1) / (_MOST_LINES - 1)) for part in range(_MOST_LINES)}
        return tuple(ordered[index] for index in sorted(picked))

    @property
    def description(self) -> str:
        """What a person sees in it, in words."""
        if not self.drawn:
            return "Nothing to show yet."
        parts = [
            f"{line.name}: from {line.points[0][1]:.4g} at {line.points[0][0]:g} to {line.points[-1][1]:.4g} at "
            f"{line.points[-1][0]:g}"
            for line in self.drawn
        ]
        left_out = len(self.lines) - len(self.drawn)
        more = f" {left_out} more lines are not drawn." if left_out else ""
        return f"{self.y_label} over {self.x_label}. " + "; ".join(parts) + "." + more

    def svg(self) -> str:
        """The chart as an SVG element."""
        ids = f'aria-labelledby="{self.id}-title {self.id}-text"'
        head = (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" {ids} xmlns="http://www.w3.org/2000/svg">'
            f'<title id="{self.id}-title">{escape(self.title)}</title>'
            f'<desc id="{self.id}-text">{escape(self.description)}</desc>'
        )
        if not self.drawn:
            return head + f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" class="middle">nothing to show yet</text></svg>'
        scale = _Scale.around([point for line in self.drawn for point in line.points])
        body = [*_grid(scale, self.x_label, self.y_label)]
        for index, line in enumerate(self.drawn):
            body += _drawn(line, index, scale)
        return head + "".join(body) + "</svg>"

    def legend(self) -> list[tuple[str, str]]:
        """For each line that is drawn a sample of it, as an SVG element, and its name."""
        return [
            (
                '<svg viewBox="0 0 36 8" class="sample" aria-hidden="true">'
                f'<line x1="0" y1="4" x2="36" y2="4" class="line c{index % 6}" '
                f'stroke-dasharray="{_DASHES[index % len(_DASHES)]}"/></svg>',
                line.name,
            )
            for index, line in enumerate(self.drawn)
        ]


@dataclass(frozen=True)
class _Scale:
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> "_Scale":
        xs, ys = ([point[axis] for point in points] for axis in (0, 1))
        return cls(_ticks(min(0.0, *xs, 0.0), max(xs)), _ticks(min([0.0, *ys]), max(ys)))

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        stride = max(1, len(points) // _MOST_POINTS)
        kept = [*points[:-1:stride], points[-1]]
        if len(kept) == 1:
            kept = [(kept[0][0] - 0.01 * self.x_ticks[-1], kept[0][1]), kept[0]]
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in kept)


def _drawn(line: Line, index: int, scale: _Scale) -> list[str]:
    parts = []
    if line.joined:
        parts.append(
            f'<polyline class="line c{index % 6}" stroke-dasharray="{_DASHES[index % len(_DASHES)]}" '
            f'points="{scale.path(line.points)}"/>'
        )
    for x, y in line.points if line.marked or len(line.points) == 1 else ():
        parts.append(f'<circle class="c{index % 6}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3"/>')
    return parts


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers from at or below one end to at or above the other, four to eight of them."""
    span = high - low if high > low else max(abs(high), 1.0)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(max(high, low + span) / step - 1e-9)
    return tuple(number * step for number in range(first, last + 1))


def _grid(scale: _Scale, x_label: str, y_label: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in scale.y_ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in scale.x_ticks:
        x = scale.x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{tick:g}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="middle" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="middle" transform="rotate(-90 15 {middle})" x="15" y="{middle}">{escape(y_label)}</text>'
    )
    return parts
