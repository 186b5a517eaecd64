"""A study as one picture: distinct results and cost, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .view import Record, View, time_text, view

# A light card of its own, which reads on light and dark pages. Narrow, so that a phone shows its text at 10 pixels.
_WIDTH, _DPI = 5.6, 200
_CARD, _INK, _SOFT, _ONE, _SEVERAL, _COST = "#fbfbf8", "#1c2430", "#5b6675", "#1a7f4b", "#c2352b", "#3b6fd4"
_ROW, _HEAD, _FOOT, _HISTOGRAM = 0.46, 1.15, 0.2, 2.0  # inches


def draw(record: Record, path: Path) -> None:
    """Write the picture as PNG. Raises OSError where the file cannot be written."""
    study = view(record)
    bars = _ROW * len(study.bars)
    below = _FOOT + (_HISTOGRAM if study.histogram else 0.0)
    height = _HEAD + bars + below
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=_CARD)
    figure.text(0.04, 1 - 0.2 / height, study.title, size=14, weight="bold", color=_INK, va="top")
    figure.text(0.04, 1 - 0.5 / height, study.setting, size=10.5, color=_SOFT, va="top")
    for left, heading in ((0.04, study.counted), (0.52, "median ms (min to max)")):
        figure.text(left, 1 - 0.84 / height, heading, size=10.5, color=_SOFT, va="top")
    bottom, tall = below / height, bars / height
    results = [bar.results for bar in study.bars]
    tones = [_ONE if count == 1 else _SEVERAL for count in results]
    axes = _panel(figure, (0.04, bottom, 0.42, tall), results, [str(count) for count in results], tones)
    for place, bar in enumerate(study.bars):
        axes.text(0, place - 0.22, bar.name, size=11, color=_INK, va="center")
    times = [bar.time for bar in study.bars]
    labels = [time_text(time) for time in times]
    _panel(figure, (0.52, bottom, 0.44, tall), [time.median_ms for time in times], labels, [_COST] * len(times))
    if study.histogram:
        _draw_histogram(figure, study, below / height, (below - _HISTOGRAM) / height)
    figure.savefig(path, format="png", facecolor=_CARD)


def _panel(
    figure: Figure,
    place: tuple[float, float, float, float],
    values: Sequence[float],
    labels: Sequence[str],
    tones: Sequence[str],
) -> Any:
    """One bar a row, from the top, with its label behind it."""
    axes = figure.add_axes(place)
    axes.barh([row + 0.2 for row in range(len(values))], values, height=0.34, color=tones)
    room = max(values) * 2.7  # the labels need the right half
    for row, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.text(value + room * 0.015, row + 0.21, label, size=10, color=_INK, va="center")
    axes.set(xlim=(0, room), ylim=(len(values) - 0.5, -0.5))
    axes.axis("off")
    return axes


def _draw_histogram(figure: Figure, study: View, top: float, bottom: float) -> None:
    """How many shuffles gave each result."""
    axes = figure.add_axes((0.04, bottom, 0.92, (top - bottom) * 0.6))
    axes.bar(range(len(study.histogram)), study.histogram, color=_SEVERAL, width=0.8)
    for place, count in enumerate(study.histogram):
        axes.text(place, count, str(count), size=8, color=_INK, ha="center", va="bottom")
    axes.axis("off")
    axes.set_title(
        "shuffles that gave each result, from the lowest to the highest", size=10.5, color=_SOFT, loc="left", pad=14
    )
