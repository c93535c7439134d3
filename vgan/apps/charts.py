"""Line charts as inline SVG: what a page of assets/report.css and assets/report.js shows, without any other library."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 200  # units of the drawing, near to pixels where it is shown
LEFT, TOP, RIGHT, BOTTOM = 44, 8, 392, 172  # where the lines lie
MOST_POINTS = 400  # of a line: more than there are pixels says nothing
DECADES = 2.0  # positive values that span more powers of ten get a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """y[i] at x[i], rising; None where a value was not finite, which leaves a gap. colour: 0 to 7, of the page's palette."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """At most `most` points: means over equal stretches, at the x of their ends; a gap anywhere in a stretch leaves a gap."""
    step = -(-len(x) // most) or 1
    thinned: list[float | None] = []
    for i in range(0, len(y), step):
        values = [v for v in y[i : i + step] if v is not None]
        thinned.append(
            math.fsum(v / len(values) for v in values)
            if len(values) == len(y[i : i + step])
            else None
        )
    return [x[min(i + step, len(x)) - 1] for i in range(0, len(x), step)], thinned


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from low to high, at most `most` + 1 of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    return [
        i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, at most six of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**e for e in range(first, last + 1, (last - first) // 5 + 1)]


def label(value: float) -> str:
    """A short number: 0.25, 40k, 3e-4. report.js has the same."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size < 1e-3 or size >= 1e9:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    return (
        f"{value / 1e3:.4g}k"
        if size >= 1e4 or (size >= 1e3 and value % 1e3 == 0)
        else f"{value:.4g}"
    )


def chart(title: str, curves: Sequence[Curve], events: Sequence[float] = ()) -> str:
    """A <figure> over thousands of images: the newest values are its legend, which the page's script makes follow the pointer.

    Everything in it is escaped. events: x of dashed lines. Empty without a finite value.
    """
    curves = [Curve(c.name, *thin(c.x, c.y), c.colour) for c in curves if c.x]
    shown = [v for c in curves for v in c.y if v is not None]
    if not shown:
        return ""
    x_low, x_high = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    x_low = 0.0 if x_low < x_high / 4 else x_low
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    low, high, log = _range(shown)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT)

    def at_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return BOTTOM - share * (BOTTOM - TOP)

    parts = []
    for y in log_ticks(low, high) if log else ticks(low, high):
        parts.append(f'<path class="rule" d="M{LEFT} {at_y(y):.1f}H{RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{at_y(y) + 3.5:.1f}" text-anchor="end">{label(y)}</text>'
        )
    for x in ticks(x_low, x_high):
        anchor = "end" if at_x(x) > RIGHT - 8 else "middle"
        parts.append(
            f'<text x="{at_x(x):.1f}" y="{BOTTOM + 15}" text-anchor="{anchor}">{label(x)}</text>'
        )
    parts += [
        f'<path class="event" d="M{at_x(x):.1f} {TOP}V{BOTTOM}"/>'
        for x in events
        if x_low <= x <= x_high
    ]
    for c in curves:
        path = _path([(at_x(x), None if y is None else at_y(y)) for x, y in zip(c.x, c.y)])
        parts.append(f'<path class="line c{c.colour}" d="{path}"/>')
        if len(c.x) <= 24:  # few enough to tell apart
            dots = "".join(
                f"M{at_x(x):.1f} {at_y(y):.1f}h0" for x, y in zip(c.x, c.y) if y is not None
            )
            parts.append(f'<path class="dots c{c.colour}" d="{dots}"/>')
    points = [
        {"x": [_short(x) for x in c.x], "y": [None if y is None else _short(y) for y in c.y]}
        for c in curves
    ]
    box = {"left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM, "width": WIDTH}
    data = {**box, "x": [x_low, x_high], "y": [low, high], "log": log, "curves": points}
    values = "".join(
        f'<span class="key c{c.colour}"><i></i>{escape(c.name)} <output>{_last(c)}</output></span>'
        for c in curves
    )
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<figcaption><b>{escape(title)}</b><span class="at">{label(x_high)} kimg</span>'
        f'<span class="keys">{values}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(title)} over thousands of images">'
        f'{"".join(parts)}<text x="{(LEFT + RIGHT) // 2}" y="{HEIGHT - 1}" text-anchor="middle">kimg</text>'
        f'<g class="cursor"></g></svg></figure>'
    )


def _range(values: Sequence[float]) -> tuple[float, float, bool]:
    """Lower and upper end of the axis, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if low > 0 and math.log10(high) - math.log10(low) > DECADES:
        return low / 1.1, high * 1.1, True
    margin = 0.05 * (high - low)
    if margin <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * max(abs(low), abs(high)) or 1.0
    below = 0.0 if 0 <= low <= 0.4 * high else low - margin
    return below, high + margin, False


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """SVG's path through the points, broken where there is none; a point between two gaps is a dot."""
    parts: list[str] = []
    pen_down = False
    for i, (x, y) in enumerate(points):
        if y is not None:
            alone = not pen_down and (i + 1 == len(points) or points[i + 1][1] is None)
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}" + ("h0" if alone else ""))
        pen_down = y is not None
    return "".join(parts)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _last(curve: Curve) -> str:
    return "not finite" if curve.y[-1] is None else label(float(f"{curve.y[-1]:.4g}"))
