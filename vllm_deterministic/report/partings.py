"""Where answers part from their reference: in words, and token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from vllm_deterministic.verify.record import ArmRecord, ChoiceRecord, DifferenceRecord, RequestGroup, VariantRecord

_NEIGHBOURS_NAMED = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at the place where two answers part, and its logprob in each (a dash where not sent).

    ``chosen`` tells which answer goes on with it: "reference", "other", "both" or "".
    """

    token: str
    reference: str
    other: str
    chosen: str


@dataclass(frozen=True, slots=True)
class Parting:
    """One variant against its reference. ``shared`` is the text both begin with."""

    sentence: str
    prompt: str
    shared: str
    reference_rest: str
    other_rest: str
    position: int | None
    candidates: list[Candidate]
    requests: list[str]
    beside: list[str]


@dataclass(frozen=True, slots=True)
class Course:
    """How far one compared answer went with its reference, in output tokens.

    The first ``same`` tokens and their logprobs have the reference's bytes; up to ``same_tokens`` the tokens alone
    have. ``gap`` is None where no token differs or the server did not send it.
    """

    id: str
    length: int
    same: int
    same_tokens: int
    gap: float | None
    sentence: str


def different(arm: ArmRecord) -> list[tuple[RequestGroup, VariantRecord]]:
    """The variants that are not the reference, each with its group: other outputs first, then by falling count."""
    pairs = [(group, variant) for group in arm.groups for variant in group.variants if variant.requests]
    return sorted(pairs, key=lambda pair: (has_reference_output(*pair), -pair[1].count))


def has_reference_output(group: RequestGroup, variant: VariantRecord) -> bool:
    """Whether a variant has the tokens and finish reasons of the reference, so that its logprobs alone may differ."""
    return variant.output_digest == group.variants[0].output_digest


def where(difference: DifferenceRecord) -> str:
    """Where two answers part, in a few words."""
    if difference.position is not None:
        reference = "the end" if difference.reference_token is None else repr(difference.reference_token)
        other = "the end" if difference.token is None else repr(difference.token)
        gap = "" if difference.gap is None else f", logprob gap {difference.gap:.3g}"
        return f"token {difference.position}: {reference} became {other}{gap}"
    if difference.logprob_position is None:
        return "the text or the finish reason"
    if difference.logprob_delta:
        return f"logprobs of token {difference.logprob_position} by {difference.logprob_delta:.3g}"
    return f"the candidates listed for token {difference.logprob_position}, or their order"


def describe(group: RequestGroup, variant: VariantRecord) -> str:
    """One sentence on where a variant parts from the reference, and beside what."""
    if variant.difference is None:
        return "the reference"
    first = variant.requests[0]
    beside = ", ".join(first.beside[:_NEIGHBOURS_NAMED]) or "nothing"
    unnamed = len(first.beside) - _NEIGHBOURS_NAMED
    more = f" and {unnamed} more" if unnamed > 0 else ""
    return f"{headline(group, variant)} (first {first.id}, beside {beside}{more})"


def headline(group: RequestGroup, variant: VariantRecord) -> str:
    """How many answers part, and where."""
    times = "1 answer" if variant.count == 1 else f"{variant.count} answers"
    place = where(variant.difference) if variant.difference is not None else "nowhere"
    return f"{times} of {group.count} part at {place}"


def parting(group: RequestGroup, variant: VariantRecord) -> Parting:
    """A variant and its reference side by side, without text and candidates where the record has them not in full.

    Raises ValueError for the reference itself.
    """
    difference = variant.difference
    if difference is None:
        raise ValueError("a reference does not part from itself")
    left, right = _choices(group, variant, difference)
    position = difference.position if difference.position is not None else difference.logprob_position
    texts = (left.text, right.text) if variant.choices else ("", "")
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    return Parting(
        sentence=headline(group, variant),
        prompt=group.prompt,
        shared=shared,
        reference_rest=texts[0][len(shared) :],
        other_rest=texts[1][len(shared) :],
        position=position,
        candidates=_candidates(left, right, position) if variant.choices else [],
        requests=[request.id for request in variant.requests],
        beside=variant.requests[0].beside,
    )


def courses(arm: ArmRecord) -> Iterator[Course]:
    """How far each compared answer went with its reference, in the order of sending."""
    lengths = {group.key: _length(group.variants[0].choices[0]) for group in arm.groups}
    parted = {request.id: (group, variant) for group, variant in different(arm) for request in variant.requests}
    for request in arm.requests:
        if not request.compared:
            continue
        if request.id in parted:
            yield _course(request.id, *parted[request.id])
        else:
            length = lengths[request.key]
            yield Course(request.id, length, length, length, None, "the reference, to the last byte")


def _course(name: str, group: RequestGroup, variant: VariantRecord) -> Course:
    difference = variant.difference
    if difference is None:
        raise ValueError("a reference does not part from itself")
    length = max(_length(choice) for choice in _choices(group, variant, difference))
    # An answer that differs in its finish reason alone parts at its end: its last token shows it.
    end = max(0, length - 1) if difference.logprob_position is None else length
    same_tokens = end if difference.position is None else difference.position
    same = same_tokens if difference.logprob_position is None else min(same_tokens, difference.logprob_position)
    return Course(name, length, same, same_tokens, difference.gap, "parts at " + where(difference))


def _choices(
    group: RequestGroup, variant: VariantRecord, difference: DifferenceRecord
) -> tuple[ChoiceRecord, ChoiceRecord]:
    """The choices that differ, the last one of an answer that has fewer.

    A variant that is not in the record in full is stood in for by the reference.
    """
    reference = group.variants[0].choices
    left, right = (
        choices[min(difference.choice, len(choices) - 1)] for choices in (reference, variant.choices or reference)
    )
    return left, right


def _length(choice: ChoiceRecord) -> int:
    if choice.token_ids is not None:
        return len(choice.token_ids)
    return len(choice.logprobs if choice.logprobs is not None else choice.text)


def _candidates(left: ChoiceRecord, right: ChoiceRecord, position: int | None) -> list[Candidate]:
    here, there = _entry(left, position), _entry(right, position)
    tokens = sorted(here.keys() | there.keys(), key=lambda token: -max(here.get(token, -1e9), there.get(token, -1e9)))
    chosen_here, chosen_there = _chosen(left, position), _chosen(right, position)
    marks = {(True, True): "both", (True, False): "reference", (False, True): "other", (False, False): ""}
    return [
        Candidate(
            token, *_spelled(here.get(token), there.get(token)), marks[token == chosen_here, token == chosen_there]
        )
        for token in tokens
    ]


def _spelled(left: float | None, right: float | None) -> tuple[str, str]:
    """Nine digits, which tell any two 32-bit floats apart; all digits where two numbers would look equal."""
    short = tuple("–" if value is None else f"{value:.9g}" for value in (left, right))
    return (repr(left), repr(right)) if left != right and short[0] == short[1] else (short[0], short[1])


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
