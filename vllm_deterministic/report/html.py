"""The run record, or two of them, as one HTML page that needs nothing but itself: no network."""

from vllm_deterministic.report.figures import Picture, latency_picture, parting_picture
from vllm_deterministic.report.page import render_page
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.report.partings import different
from vllm_deterministic.report.view import RunView
from vllm_deterministic.verify.record import RunRecord

_COLORS = ("var(--first)", "var(--second)", "var(--third)", "var(--fourth)")


def render(record: RunRecord) -> str:
    """The page of one run. It carries its own content security policy, which allows its own scripts alone."""
    run = RunView(record)
    pictures = {f"parts-{arm.name}": parting_picture(arm) for arm in record.arms if different(arm)}
    if run.timed:
        curves = {arm.record.name: (arm.record, color) for arm, color in zip(run.timed, _COLORS, strict=False)}
        pictures["latency"] = latency_picture(curves)
    return render_page("report.html.j2", pictures, run=run)


def render_pair(pair: Pair) -> str:
    """The page of two runs side by side, under the same policy."""
    pictures: dict[str, Picture] = {}
    for name in pair.arm_names:
        arms = pair.arms(name)
        if any(arm is not None and different(arm) for arm in arms):
            compared = {side: arm for side, arm in enumerate(arms) if arm is not None and arm.compared}
            pictures |= {
                f"parts-{name}-{side}": parting_picture(arm, with_gaps=False) for side, arm in compared.items()
            }
        curves = {
            run: (arm, color)
            for run, arm, color in zip(pair.names, arms, _COLORS, strict=False)
            if arm is not None and arm.latency is not None
        }
        if curves:
            pictures[f"latency-{name}"] = latency_picture(curves)
    return render_page("pair.html.j2", pictures, pair=pair, runs=[RunView(pair.left), RunView(pair.right)])
