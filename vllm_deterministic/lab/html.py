"""A study as one HTML page that needs nothing but itself: no network, no scripts."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from .view import Record, number, verdict, view


def render(record: Record) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("vllm_deterministic.lab", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    study = view(record)
    return environment.get_template("study.html.j2").render(
        study=study,
        number=number,
        verdict=verdict,
        most=max(bar.results for bar in study.bars),
        slowest=max(bar.time.median_ms for bar in study.bars),
    )
