"""The run record as one HTML page that needs nothing but itself: no network, no scripts."""

from collections import Counter
from dataclasses import dataclass
from itertools import takewhile

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_deterministic.report.console import describe
from vllm_deterministic.verify.record import ArmRecord, ChoiceRecord, RunRecord, VariantRecord

_SHOWN = 5  # variants an arm spells out; the JSON record holds all

_PURPOSE = {
    "identical": "One request again and again, as many at once as allowed.",
    "mixed": "The same request among strangers of random length, sampling and arrival.",
    "prefix": "Prompts around block, split and chunk boundaries, from a cold and a warm prefix cache; conversations.",
    "sampled": "Random sampling: the same seed, the same bytes; other seeds, other outputs.",
}


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A token at the place where two answers part, and its logprob in each (None where not sent)."""

    token: str
    reference: float | None
    other: float | None
    chosen: str


@dataclass(frozen=True, slots=True)
class _Parting:
    """One variant against its reference. ``shared`` is the text both begin with."""

    sentence: str
    prompt: str
    shared: str
    reference_rest: str
    other_rest: str
    position: int | None
    candidates: list[_Candidate]
    requests: list[str]
    beside: list[str]


@dataclass(frozen=True, slots=True)
class _Arm:
    record: ArmRecord
    purpose: str
    agreeing: float  # percent of the compared answers
    partings: list[_Parting]
    unshown: int
    positions: list[tuple[int, int, float]]  # token position, answers that part there, percent of the highest


def render(record: RunRecord) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("vllm_deterministic.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    slowest = max((arm.latency.p99 for arm in record.arms if arm.latency), default=0.0)
    template = environment.get_template("report.html.j2")
    return template.render(record=record, arms=[_view(arm) for arm in record.arms], slowest=slowest or 1.0)


def _view(arm: ArmRecord) -> _Arm:
    pairs = [(group, variant) for group in arm.groups for variant in group.variants if variant.requests]
    partings = [
        _parting(describe(group, variant), group.prompt, group.variants[0], variant)
        for group, variant in pairs[:_SHOWN]
    ]
    return _Arm(
        record=arm,
        purpose=_PURPOSE.get(arm.name, ""),
        agreeing=100 * (1 - arm.divergent / arm.compared) if arm.compared else 0.0,
        partings=partings,
        unshown=len(pairs) - len(partings),
        positions=_positions([variant for _, variant in pairs]),
    )


def _positions(variants: list[VariantRecord]) -> list[tuple[int, int, float]]:
    counts: Counter[int] = Counter()
    for variant in variants:
        if variant.difference is not None and variant.difference.position is not None:
            counts[variant.difference.position] += variant.count
    if not counts:
        return []
    highest = max(counts.values())
    return [(place, counts[place], 100 * counts[place] / highest) for place in range(max(counts) + 1)]


def _parting(sentence: str, prompt: str, reference: VariantRecord, variant: VariantRecord) -> _Parting:
    difference = variant.difference
    if difference is None:
        raise ValueError("a reference does not part from itself")
    left, right = reference.choices[difference.choice], variant.choices[difference.choice]
    position = difference.position if difference.position is not None else difference.logprob_position
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(left.text, right.text, strict=False)))
    first = variant.requests[0]
    return _Parting(
        sentence=sentence,
        prompt=prompt,
        shared=shared,
        reference_rest=left.text[len(shared) :],
        other_rest=right.text[len(shared) :],
        position=position,
        candidates=_candidates(left, right, position),
        requests=[request.id for request in variant.requests],
        beside=first.beside,
    )


def _candidates(left: ChoiceRecord, right: ChoiceRecord, position: int | None) -> list[_Candidate]:
    here, there = _entry(left, position), _entry(right, position)
    tokens = sorted(here.keys() | there.keys(), key=lambda token: -max(here.get(token, -1e9), there.get(token, -1e9)))
    reference_token, other_token = _chosen(left, position), _chosen(right, position)
    marks = {True: "both", False: ""}
    candidates = []
    for token in tokens:
        chosen = marks[token == reference_token == other_token]
        if not chosen and token in (reference_token, other_token):
            chosen = "reference" if token == reference_token else "other"
        candidates.append(_Candidate(token, here.get(token), there.get(token), chosen))
    return candidates


def _entry(choice: ChoiceRecord, position: int | None) -> dict[str, float]:
    if position is None or choice.logprobs is None or position >= len(choice.logprobs):
        return {}
    entry = choice.logprobs[position]
    own = {entry.token: entry.logprob} if entry.logprob is not None else {}
    return dict(entry.top) | own


def _chosen(choice: ChoiceRecord, position: int | None) -> str | None:
    if position is None or choice.logprobs is None or position >= len(choice.logprobs):
        return None
    return choice.logprobs[position].token
