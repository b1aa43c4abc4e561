"""Curves as SVG, to stand in a page by themselves: no script, no network. (plotly's script alone has 4 MB a page.)"""

import html
import math
from typing import List, Mapping, Sequence, Tuple

from markupsafe import Markup

__all__ = ["Points", "calibration_chart", "line_chart"]

Points = Sequence[Tuple[float, float]]

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 28, 24
# Okabe and Ito's, which colour-blind readers can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def line_chart(title: str, series: Mapping[str, Points], x_name: str = "epoch") -> Markup:
    """Lines over one axis, with the names below; points that are no finite numbers are left out."""
    kept = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    if not any(kept.values()):
        return Markup("")
    axes = _Axes([p for points in kept.values() for p in points])
    body = [*axes.drawn(title, x_name)]
    for i, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for x, y in points:
            body.append(
                f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.4" fill="{colour}">'
                f"<title>{html.escape(name)}, {html.escape(x_name)} {x:g}: {y:.4g}</title></circle>"
            )
    return _figure(body, kept)


def calibration_chart(bins: Sequence[Tuple[float, float, int]]) -> Markup:
    """Mean confidence against the share that was right, a circle a bin, its area by how many there are."""
    axes = _Axes([(0, 0), (1, 1)])
    most = max(count for _, _, count in bins)
    line = f'x1="{axes.x(0)}" y1="{axes.y(0)}" x2="{axes.x(1)}" y2="{axes.y(1)}"'
    body = [*axes.drawn("right, by confidence", "confidence"), f'<line {line} stroke="#999" stroke-dasharray="4"/>']
    for confidence, right, count in bins:
        body.append(
            f'<circle cx="{axes.x(confidence):.1f}" cy="{axes.y(right):.1f}" r="{3 + 9 * math.sqrt(count / most):.1f}" '
            f'fill="{_COLOURS[0]}" fill-opacity="0.6"><title>{count} answers, confidence {confidence:.2f}, '
            f"right {right:.2f}</title></circle>"
        )
    return _figure(body, {})


class _Axes:
    """From numbers to places in the picture."""

    def __init__(self, points: Points):
        self._x = _range([x for x, _ in points])
        self._y = _range([y for _, y in points])

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def drawn(self, title: str, x_name: str) -> List[str]:
        """Title, grid and its numbers."""
        body = [f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>']
        for i in range(5):
            value = self._y[0] + i / 4 * (self._y[1] - self._y[0])
            at = self.y(value)
            body.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="#ddd"/>')
            body.append(f'<text x="{_LEFT - 4}" y="{at + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
        for value, anchor in zip(self._x, ("start", "end")):
            body.append(f'<text x="{self.x(value):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{value:.3g}</text>')
        body.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{x_name}</text>')
        return body


def _tick(value: float) -> str:
    """Short: 0.00025 is 2.5e-04."""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}"


def _range(values: Sequence[float]) -> Tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _figure(body: Sequence[str], names: Mapping[str, Points]) -> Markup:
    key = "".join(
        f'<span><i style="background:{_COLOURS[i % len(_COLOURS)]}"></i>{html.escape(name)}</span>'
        for i, (name, points) in enumerate(names.items())
        if points
    )
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(body)}</svg>'
    return Markup(f"<figure>{picture}<figcaption>{key}</figcaption></figure>")
