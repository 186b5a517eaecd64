"""An HTML page that is one file: styles, scripts and pictures are in it, and its own policy forbids it the network."""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_deterministic.report.figures import Picture
from vllm_deterministic.report.numbers import number


def render_page(template: str, pictures: Mapping[str, Picture], **context: Any) -> str:
    """Fill a template. ``pictures`` are drawn into the elements of these ids; without any, the page has no script.

    Only the scripts that are put in here may run in it: whatever a server says stays text.
    """
    scripts = [_plotly(), _read("figures.js")] if pictures else []
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:"
    environment = Environment(
        loader=PackageLoader("vllm_deterministic.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    figures = {name: {"data": picture.data, "layout": picture.layout} for name, picture in pictures.items()}
    return environment.get_template(template).render(
        **context,
        pictures=pictures,
        policy=policy,
        style=_read("page.css"),
        scripts=scripts,
        # As "<" cannot end the element, nothing that a server says can.
        figures=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
    )


@cache
def _plotly() -> str:
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _read(name: str) -> str:
    return files("vllm_deterministic.report").joinpath(name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
