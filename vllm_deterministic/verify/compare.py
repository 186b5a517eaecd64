"""Compare answers byte for byte, and say where and by how much two of them part."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_deterministic.verify.completion import Choice, Completion, TokenLogprob


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two answers to the same request part. Positions count output tokens from 0.

    ``position`` is the first differing token, None where tokens agree; ``logprob_position`` the first differing
    logprob record. ``gap`` is how much less likely than its own token the reference held the token that the other
    answer has at ``position``; ``logprob_delta`` the largest change of one candidate's logprob at
    ``logprob_position``. Either is None where the server did not send the numbers (the candidate was not among its top
    logprobs).
    """

    choice: int
    position: int | None
    logprob_position: int | None
    reference_token: str | None
    token: str | None
    gap: float | None
    logprob_delta: float | None


def output_digest(completion: Completion) -> str:
    """SHA-256 of the token ids (of the text where there are none) and finish reason of every choice."""
    return _digest([_output(choice) for choice in completion.choices])


def logprob_digest(completion: Completion) -> str:
    """SHA-256 of what `output_digest` covers and of the bits of every logprob, in the order the server sent them."""
    return _digest([[_output(choice), _logprobs(choice)] for choice in completion.choices])


def logprob_record(entry: TokenLogprob) -> list[object]:
    """The token, its logprob and the candidates' as a list for JSON: equal lists are equal bits."""
    # float.hex tells every bit apart, 0.0 and -0.0 included.
    logprob = None if entry.logprob is None else entry.logprob.hex()
    return [entry.token, logprob, [[token, value.hex()] for token, value in entry.top]]


def compare(reference: Completion, other: Completion) -> Difference | None:
    """The first choice in which two answers differ by a byte, or None."""
    if logprob_digest(reference) == logprob_digest(other):
        return None
    pairs = zip(reference.choices, other.choices, strict=False)
    for index, (left, right) in enumerate(pairs):
        if (_output(left), _logprobs(left)) != (_output(right), _logprobs(right)):
            return _difference(index, left, right)
    return Difference(min(len(reference.choices), len(other.choices)), None, None, None, None, None, None)


def differences(expected: Mapping[str, Completion], actual: Mapping[str, Completion]) -> dict[str, Difference | None]:
    """Compare two sets of answers by name; only names that differ are returned.

    A name that is in one set alone maps to None.
    """
    found: dict[str, Difference | None] = dict.fromkeys(expected.keys() ^ actual.keys())
    for name in expected.keys() & actual.keys():
        difference = compare(expected[name], actual[name])
        if difference is not None:
            found[name] = difference
    return dict(sorted(found.items()))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def _output(choice: Choice) -> list[object]:
    return [list(choice.token_ids) if choice.token_ids is not None else choice.text, choice.finish_reason]


def _logprobs(choice: Choice) -> list[object] | None:
    if choice.logprobs is None:
        return None
    return [logprob_record(entry) for entry in choice.logprobs]


def _first(left: list[object], right: list[object]) -> int | None:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _difference(index: int, left: Choice, right: Choice) -> Difference:
    position = _first(list(left.tokens), list(right.tokens))
    left_entries, right_entries = left.logprobs or (), right.logprobs or ()
    logprob_position = _first([logprob_record(e) for e in left_entries], [logprob_record(e) for e in right_entries])
    here, there = _at(left_entries, position), _at(right_entries, position)
    return Difference(
        choice=index,
        position=position,
        logprob_position=logprob_position,
        reference_token=_name(left, position),
        token=_name(right, position),
        gap=_gap(here, there),
        logprob_delta=_delta(_at(left_entries, logprob_position), _at(right_entries, logprob_position)),
    )


def _at(entries: tuple[TokenLogprob, ...], position: int | None) -> TokenLogprob | None:
    return entries[position] if position is not None and position < len(entries) else None


def _name(choice: Choice, position: int | None) -> str | None:
    entry = _at(choice.logprobs or (), position)
    if entry is not None:
        return entry.token
    tokens = choice.tokens
    return str(tokens[position]) if position is not None and position < len(tokens) else None


def _gap(here: TokenLogprob | None, there: TokenLogprob | None) -> float | None:
    """Prefer the reference's own numbers; where it did not list the other token, turn to the other answer's."""
    if here is None or there is None:
        return None
    for own, other in ((here, there.token), (there, here.token)):
        candidates = dict(own.top)
        if own.logprob is not None and other in candidates:
            return abs(own.logprob - candidates[other])
    return None


def _delta(here: TokenLogprob | None, there: TokenLogprob | None) -> float | None:
    if here is None or there is None:
        return None
    left, right = dict(here.top), dict(there.top)
    if here.token == there.token and here.logprob is not None and there.logprob is not None:
        left[here.token], right[there.token] = here.logprob, there.logprob
    return max((abs(left[token] - right[token]) for token in left.keys() & right.keys()), default=None)
