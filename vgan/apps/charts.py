"""Line charts as inline SVG for pages with assets/report.css and assets/report.js."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vgan.apps.templates import render

WIDTH, HEIGHT = 400, 200  # of the drawing; about its size in px on a page
LEFT, TOP, RIGHT, BOTTOM = 44, 8, 392, 172  # of the area of the lines
MAX_POINTS = 400  # of a line, about the pixels of its width
_MAX_DOTS = 24  # points of a line that are drawn as dots too
_LOG_DECADES = 2.0  # positive values over more powers of ten get a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """Values y[i] at rising x[i]. None stands for a value that was not finite and leaves a gap.

    colour: 0 to 7, an index into the page's palette.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """A range of values that is drawn from position `start` to position `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return positions and labels of the ticks."""
        values = (log_ticks if self.log else ticks)(self.low, self.high)
        return [(self.at(value), label(value)) for value in values]


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = MAX_POINTS
) -> tuple[list[float], list[float | None]]:
    """Reduce a curve to at most `most` points: means of equal intervals, at their last x.

    A gap anywhere in an interval leaves a gap.
    """
    step = -(-len(x) // most) or 1
    means: list[float | None] = []
    for i in range(0, len(y), step):
        interval = y[i : i + step]
        values = [value for value in interval if value is not None]
        finite = len(values) == len(interval)
        means.append(math.fsum(value / len(values) for value in values) if finite else None)
    return [x[min(i + step, len(x)) - 1] for i in range(0, len(x), step)], means


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten in a range, at most `most` + 1."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from low to high, at most six."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**e for e in range(first, last + 1, (last - first) // 5 + 1)]


def label(value: float) -> str:
    """Format a number in few characters: 0.25, 40k, 3e-4. report.js has the same function."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size < 1e-3 or size >= 1e9:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4 or (size >= 1e3 and value % 1e3 == 0):
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def chart(title: str, curves: Sequence[Curve], events: Sequence[float] = ()) -> Markup:
    """Return a <figure> of curves over thousands of images, empty without a finite value.

    Its legend shows the newest values, or with report.js those under the pointer. events: x of
    dashed vertical lines.
    """
    curves = [Curve(c.name, *thin(c.x, c.y), c.colour) for c in curves if c.x]
    values = [v for c in curves for v in c.y if v is not None]
    if not values:
        return Markup("")
    x_axis, y_axis = _x_axis(curves), _y_axis(values)
    data = {
        **{"left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM, "width": WIDTH},
        **{"x": [x_axis.low, x_axis.high], "y": [y_axis.low, y_axis.high], "log": y_axis.log},
        "curves": [{"x": _rounded(c.x), "y": _rounded(c.y)} for c in curves],
    }
    figure = render(
        "chart.html",
        title=title,
        data=json.dumps(data, separators=(",", ":")),
        box={**data, "height": HEIGHT},
        last=label(x_axis.high),
        keys=[(c.name, c.colour, _newest(c)) for c in curves],
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        events=[x_axis.at(x) for x in events if x_axis.low <= x <= x_axis.high],
        lines=[(c.colour, *_paths(c, x_axis, y_axis)) for c in curves],
    )
    return Markup(figure)  # the template has escaped everything


def _x_axis(curves: Sequence[Curve]) -> Axis:
    low, high = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    if low < high / 4:
        low = 0.0
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return Axis(low, high, LEFT, RIGHT)


def _y_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if low > 0 and math.log10(high) - math.log10(low) > _LOG_DECADES:
        return Axis(low / 1.1, high * 1.1, BOTTOM, TOP, log=True)
    margin = 0.05 * (high - low)
    if margin <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * max(abs(low), abs(high)) or 1.0
    low = 0.0 if 0 <= low <= 0.4 * high else low - margin
    return Axis(low, high + margin, BOTTOM, TOP)


def _paths(curve: Curve, x_axis: Axis, y_axis: Axis) -> tuple[str, str]:
    """Return SVG paths of the line, broken at gaps, and of its dots.

    A point between two gaps is a dot of the line.
    """
    line, dots = [], []
    pen_down = False
    for i, (x, y) in enumerate(zip(curve.x, curve.y)):
        if y is not None:
            point = f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}"
            ends = i + 1 == len(curve.y) or curve.y[i + 1] is None
            alone = "h0" if ends and not pen_down else ""
            line.append(f"{'L' if pen_down else 'M'}{point}{alone}")
            dots.append(f"M{point}h0")
        pen_down = y is not None
    return "".join(line), "".join(dots) if len(curve.x) <= _MAX_DOTS else ""


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _newest(curve: Curve) -> str:
    value = curve.y[-1]
    return "not finite" if value is None else label(float(f"{value:.4g}"))
