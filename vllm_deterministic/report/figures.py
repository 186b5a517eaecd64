"""The pictures of a report, as plotly.js takes them.

A color is written "var(--name)": figures.js looks it up in the page's style sheet, so pictures follow light and dark.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_deterministic.report.partings import Course, courses
from vllm_deterministic.verify.record import ArmRecord

Figure = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, what it shows in a few words, and what a reader must know to read it."""

    label: str
    caption: str
    data: list[Figure]
    layout: Figure


_COLUMNS = 600  # more would be narrower than a pixel or two
_STEPS = 200  # of a curve


def parting_picture(arm: ArmRecord, *, with_gaps: bool = True) -> Picture:
    """A column for each compared answer, in the order of sending: how many tokens went with the reference.

    Under it, unless ``with_gaps`` is off and where the server sent them, the logprob gaps between the two candidates.
    Beyond 600 answers a column stands for several and shows the one that parts first.
    """
    size = max(1, math.ceil(arm.compared / _COLUMNS))
    columns = _columns(list(courses(arm)), size)
    parts = (
        ("same bytes", "var(--same)", [course.same for _, course in columns]),
        ("same tokens, other logprobs", "var(--shift)", [course.same_tokens - course.same for _, course in columns]),
        ("other tokens", "var(--bad)", [course.length - course.same_tokens for _, course in columns]),
    )
    named = [[html.escape(course.id), html.escape(course.sentence)] for _, course in columns]
    data: list[Figure] = [
        {
            "type": "bar",
            "name": name,
            "x": [number for number, _ in columns],
            "y": heights,
            "offset": -0.5,
            "width": size * (0.9 if len(columns) <= 60 else 1.0),
            "marker": {"color": color, "line": {"width": 0}},
            "customdata": named,
            "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        }
        for name, color, heights in parts
        if any(heights)
    ]
    gaps = [(number, course, course.gap) for number, course in columns if with_gaps and course.gap is not None]
    layout = _layout(320 if gaps else 240, "answer, in the order of sending", "output token")
    layout |= {"barmode": "stack", "bargap": 0, "showlegend": False}
    if gaps:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "cliponaxis": False,
                "x": [number - 0.5 + size / 2 for number, _, _ in gaps],
                "y": [gap for _, _, gap in gaps],
                "yaxis": "y2",
                "marker": {"color": "var(--bad)", "size": 6},
                "customdata": [[html.escape(course.id)] for _, course, _ in gaps],
                "hovertemplate": "%{customdata[0]}<br>logprob gap %{y:.3g}<extra></extra>",
            }
        )
        layout["yaxis"]["domain"] = [0.4, 1]
        layout["yaxis2"] = _axis("logprob gap") | {"domain": [0, 0.24], "nticks": 4}
        layout["yaxis2"]["range"] = [0, 1.15 * max(gap for _, _, gap in gaps) or 1]
        layout["xaxis"]["anchor"] = "y2"
    layout["xaxis"] |= {"range": [0.5, len(named) * size + 0.5], "tickformat": "d"}
    column = "A column is one answer" if size == 1 else f"A column is {size} answers and shows the first to part"
    caption = f"{column}: so many of its tokens were the reference's."
    caption += " Below, how far apart the two candidates lay where it parts; 0 is a tie." if gaps else ""
    return Picture(f"Where the answers of {arm.name} part from their references", caption, data, layout)


def latency_picture(curves: Mapping[str, tuple[ArmRecord, str]]) -> Picture:
    """The share of compared answers that were there after so many seconds; one curve a name, in the color given."""
    data = []
    for name, (arm, color) in curves.items():
        seconds, shares = _distribution([r.finished_s - r.sent_s for r in arm.requests if r.compared])
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": html.escape(name),
                "x": seconds,
                "y": shares,
                "line": {"color": color, "shape": "hv", "width": 2},
                "hovertemplate": "%{y:.0f} % within %{x:.3g} s<extra>" + html.escape(name) + "</extra>",
            }
        )
    layout = _layout(260, "seconds to the whole answer", "answers, %")
    layout["yaxis"] |= {"range": [0, 101], "tickvals": [0, 25, 50, 75, 100]}
    layout["showlegend"] = len(data) > 1
    if len(data) > 1:
        layout["margin"]["t"] = 34  # the legend's
    caption = "Compared requests alone. The further left a curve, the faster."
    return Picture("Distribution of the latency", caption, data, layout)


def _columns(answers: Sequence[Course], size: int) -> list[tuple[int, Course]]:
    """Of every ``size`` courses the first to part, with the number of the first of them, counted from 1."""
    return [(start + 1, min(answers[start : start + size], key=_parts_at)) for start in range(0, len(answers), size)]


def _parts_at(course: Course) -> tuple[float, float]:
    return (math.inf, math.inf) if course.same == course.length else (course.same_tokens, course.same)


def _distribution(seconds: Sequence[float]) -> tuple[list[float], list[float]]:
    """Abscissae and percentages of the empirical distribution, thinned to `_STEPS` steps."""
    ordered = sorted(seconds)
    count = len(ordered)
    ranks = sorted({math.ceil(count * step / _STEPS) for step in range(1, _STEPS + 1)}) if count else []
    return [0.0, *(ordered[rank - 1] for rank in ranks)], [0.0, *(100 * rank / count for rank in ranks)]


def _layout(height: int, x_title: str, y_title: str) -> Figure:
    return {
        "height": height,
        "margin": {"l": 52, "r": 10, "t": 10, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--soft)", "family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        "xaxis": _axis(x_title) | {"rangemode": "tozero"},
        "yaxis": _axis(y_title) | {"rangemode": "tozero"},
    }


def _axis(title: str) -> Figure:
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "var(--line)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "automargin": True,
    }
