"""Small charts as inline SVG, coloured by the page's style sheet in light and dark alike."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 290, 180
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 12, 34
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers that span ``[low, high]``, the ends included."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A short label: ``1.2M``, ``400k``, ``0.05``, ``2e-05``."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as a short percentage label."""
    return f"{100 * value:.3g} %"


def headroom(highest: float, y_format) -> float:
    """The top of an axis over values up to ``highest``; shares that stay at zero get 10 %."""
    if highest > 0:
        return highest
    return 0.1 if y_format is percent else 1.0


def power_of_ten(exponent: float) -> str:
    """``10⁻³`` and the like."""
    return "10" + f"{exponent:.0f}".translate(_SUPERSCRIPT)


class _Frame:
    def __init__(self, x: Sequence[float], y: Sequence[float]):
        self.x0, self.x1, self.y0, self.y1 = x[0], x[-1], y[0], y[-1]

    def px(self, x: float) -> float:
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_ticks, y_ticks, x_label: str, x_format, y_format) -> list[str]:
        out = []
        for y in y_ticks:
            at = self.py(y)
            out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            text = html.escape(y_format(y))
            out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        for x in x_ticks:
            text, last = html.escape(x_format(x)), x is x_ticks[-1]
            anchor = "end" if last and self.px(x) > WIDTH - RIGHT - 8 else "middle"
            y = HEIGHT - BOTTOM + 15
            out.append(f'<text x="{self.px(x):.1f}" y="{y}" text-anchor="{anchor}">{text}</text>')
        end = f'x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end"'
        return [*out, f'<text class="axis" {end}>{html.escape(x_label)}</text>']


def _svg(parts: list[str], title: str) -> str:
    name = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )


def thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about ``most`` of the points, evenly taken, the first and last always among them."""
    stride = max(1, math.ceil((len(points) - 1) / most))
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def line(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    x_label: str,
    y_format=number,
    reference: tuple[float, str] | None = None,
) -> str:
    """A curve over ``points``, from zero up, with an optional labelled reference level."""
    points = thin(points)
    highest = max([y for _, y in points] + ([reference[0]] if reference else []))
    y_ticks = ticks(min(0.0, *(y for _, y in points)), headroom(highest, y_format))
    first, final = 0.0, max(points[-1][0], 1.0)
    # Ticks that would stretch the axis past the data are left out, the axis ends where data do.
    x_ticks = [x for x in ticks(first, final, 3) if first <= x <= final]
    frame = _Frame([first, final], y_ticks)
    parts = frame.axes(x_ticks, y_ticks, x_label, number, y_format)
    if reference:
        level, label = reference
        at = frame.py(level)
        parts.append(f'<path class="ref" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        label = f"{html.escape(label)} {html.escape(y_format(level))}"
        spot = f'x="{WIDTH - RIGHT}" y="{at - 6:.1f}" text-anchor="end"'
        parts.append(f'<text class="reftext" {spot}>{label}</text>')
    path = "L".join(f"{frame.px(x):.1f} {frame.py(y):.1f}" for x, y in points)
    parts.append(f'<path class="line" d="M{path}"/>')
    end_x, end_y = points[-1]
    parts.append(f'<circle cx="{frame.px(end_x):.1f}" cy="{frame.py(end_y):.1f}" r="2.5"/>')
    return _svg(parts, title)


def histogram(edges: Sequence[float], counts: Sequence[int], *, title: str, x_label: str) -> str:
    """Bars over log10 ``edges``; empty bins at both ends are trimmed to whole decades."""
    edges, counts = trim(edges, counts)
    y_ticks = ticks(0, max([*counts, 1]))
    frame = _Frame([edges[0], edges[-1]], y_ticks)
    decades = list(range(math.ceil(edges[0] - 1e-9), math.floor(edges[-1] + 1e-9) + 1))
    parts = frame.axes(decades, y_ticks, x_label, power_of_ten, number)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, top = frame.px(low), frame.py(count)
        size = f'width="{frame.px(high) - x - 1:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
        tip = f"<title>{count:,} latents, density {10**low:.2g} to {10**high:.2g}</title>"
        if count:
            parts.append(f'<rect class="bar" x="{x + 0.5:.1f}" y="{top:.1f}" {size}>{tip}</rect>')
    return _svg(parts, title)


def trim(edges: Sequence[float], counts: Sequence[int]) -> tuple[list[float], list[int]]:
    """Drops empty whole decades at both ends of a histogram over log10 edges."""
    full = [i for i, count in enumerate(counts) if count] or [0, len(counts) - 1]
    low, high = math.floor(edges[full[0]] + 1e-9), math.ceil(edges[full[-1] + 1] - 1e-9)
    keep = [i for i in range(len(counts)) if low - 1e-9 <= edges[i] and edges[i + 1] <= high + 1e-9]
    return [edges[i] for i in [*keep, keep[-1] + 1]], [counts[i] for i in keep]
