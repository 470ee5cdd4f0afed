"""Two kinds of plot as inline SVG: how latencies are distributed, and how they went over time. Pure: points in, text out.

Series differ by colour (blue and vermilion of Okabe and Ito's palette, told apart by all common kinds of colour blindness),
and again by dash or shape, so that they can be told apart in black and white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

BLUE = "#0072B2"
VERMILION = "#D55E00"
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud of points, with its name in the legend."""

    name: str
    points: Points
    colour: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    first: float
    last: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        if self.logarithmic:
            share = log10(max(value, self.low) / self.low) / log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def ecdf(series: Sequence[Series], title: str) -> str:
    """Share of requests (up) that took at most so long (right, logarithmic). Points are (seconds, share)."""
    values = [x for s in series for x, _ in s.points if x > 0]
    if not values:
        return ""
    low, high = _decade(min(values), max(values))
    across = _Axis(low, high, LEFT, WIDTH - RIGHT, logarithmic=True)
    up = _Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    body = [_grid_across(across, _ticks_log(low, high)), _grid_up(up, (0, 0.25, 0.5, 0.75, 0.99), percent=True)]
    for one in series:
        steps = [(across.at(x), up.at(y)) for x, y in one.points if x > 0]
        body.append(_line(steps, one))
    return _drawing(title, "latency, milliseconds (logarithmic)", body, series)


def timeline(series: Sequence[Series], title: str) -> str:
    """Latency (up, logarithmic) of requests over the time of the measurement (right). Points are (seconds, seconds)."""
    points = [p for s in series for p in s.points if p[1] > 0]
    if not points:
        return ""
    low, high = _decade(min(y for _, y in points), max(y for _, y in points))
    end = max(x for x, _ in points) or 1.0
    across = _Axis(0.0, end, LEFT, WIDTH - RIGHT)
    up = _Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=True)
    body = [
        _grid_across(across, _ticks_linear(end), scale=1.0),
        _grid_up(up, _ticks_log(low, high), percent=False),
    ]
    for one in series:
        body.append(_marks([(across.at(x), up.at(y)) for x, y in one.points if y > 0], one))
    return _drawing(title, "seconds since the measurement began", body, series, shapes=True)


def _drawing(title: str, below: str, body: Sequence[str], series: Sequence[Series], *, shapes: bool = False) -> str:
    key = "".join(_legend(one, index, shapes=shapes) for index, one in enumerate(series))
    caption = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" class="axis" text-anchor="middle">{escape(below)}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 26}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(body)}{caption}{key}</svg>"
    )


def _legend(one: Series, index: int, *, shapes: bool) -> str:
    x, y = LEFT + index * 270, HEIGHT + 16
    mark = _mark(x + 10, y - 4, one) if shapes else _line([(x, y - 4), (x + 22, y - 4)], one)
    return f'{mark}<text x="{x + 30}" y="{y}" class="key">{escape(one.name)}</text>'


def _line(points: Points, one: Series) -> str:
    dash = ' stroke-dasharray="7 4"' if one.dashed else ""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2.2"{dash}/>'


def _marks(points: Points, one: Series) -> str:
    return "".join(_mark(x, y, one) for x, y in points)


def _mark(x: float, y: float, one: Series) -> str:
    if one.dashed:
        return f'<path d="M{x - 3:g} {y - 3:g}l6 6m0 -6l-6 6" stroke="{one.colour}" stroke-width="1.4" fill="none"/>'
    return f'<circle cx="{x:g}" cy="{y:g}" r="2.4" fill="{one.colour}" fill-opacity="0.75"/>'


def _grid_across(axis: _Axis, ticks: Sequence[float], scale: float = 1000.0) -> str:
    return "".join(
        f'<line x1="{axis.at(t)}" x2="{axis.at(t)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>'
        f'<text x="{axis.at(t)}" y="{HEIGHT - BOTTOM + 16}" class="axis" text-anchor="middle">{_number(t * scale)}</text>'
        for t in ticks
    )


def _grid_up(axis: _Axis, ticks: Sequence[float], *, percent: bool) -> str:
    return "".join(
        f'<line y1="{axis.at(t)}" y2="{axis.at(t)}" x1="{LEFT}" x2="{WIDTH - RIGHT}" class="grid"/>'
        f'<text y="{axis.at(t) + 4}" x="{LEFT - 6}" class="axis" text-anchor="end">{f"{t:.0%}" if percent else _number(t * 1000) + " ms"}</text>'
        for t in ticks
    )


def _decade(low: float, high: float) -> tuple[float, float]:
    """Bounds a little outside the data, never the same."""
    return low * 0.9, max(high * 1.1, low * 1.5)


def _ticks_log(low: float, high: float) -> list[float]:
    """Round values within: of every decade its beginning, or 1, 2, 5, or more, whichever gives a readable number of them."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(found) >= 4:
            return found
    step = _round_step((high - low) / 4)
    return [n * step for n in range(ceil(low / step), floor(high / step) + 1)]


def _ticks_linear(end: float) -> list[float]:
    step = _round_step(end / 5)
    return [n * step for n in range(int(end / step) + 1)]


def _round_step(about: float) -> float:
    """1, 2 or 5 times a power of ten, at most `about`."""
    decade = 10.0 ** floor(log10(about))
    return max(m * decade for m in (1, 2, 5) if m * decade <= about * (1 + 1e-9))


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
