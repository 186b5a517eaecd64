import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_deterministic.verify.compare import compare, differences, logprob_digest, output_digest
from vllm_deterministic.verify.completion import Choice, Completion, TokenLogprob


def _completion(tokens: list[int], logprobs: list[float]) -> Completion:
    entries = tuple(
        TokenLogprob(f"t{token}", logprob, ((f"t{token}", logprob), (f"t{token + 1}", logprob - 0.5)))
        for token, logprob in zip(tokens, logprobs, strict=True)
    )
    return Completion((Choice("text", tuple(tokens), "length", entries),))


BASE = _completion([10, 20, 30], [-1.0, -0.25, -2.0])


def test_equal_answers_do_not_differ() -> None:
    assert compare(BASE, _completion([10, 20, 30], [-1.0, -0.25, -2.0])) is None


def test_names_the_token_and_the_gap_between_the_two_candidates() -> None:
    difference = compare(BASE, _completion([10, 21, 30], [-1.0, -0.25, -2.0]))
    assert difference is not None
    assert (difference.position, difference.logprob_position) == (1, 1)
    assert (difference.reference_token, difference.token) == ("t20", "t21")
    assert difference.gap == 0.5


def test_takes_the_gap_from_the_other_answer_where_the_reference_lists_no_such_token() -> None:
    difference = compare(BASE, _completion([10, 19, 30], [-1.0, -0.25, -2.0]))
    assert difference is not None
    assert difference.gap == 0.5


def test_gap_is_unknown_where_neither_lists_the_other() -> None:
    difference = compare(BASE, _completion([10, 99, 30], [-1.0, -0.25, -2.0]))
    assert difference is not None
    assert difference.gap is None


@given(st.floats(allow_nan=False, allow_infinity=False, max_value=0), st.integers(0, 2))
def test_sees_one_bit_of_one_logprob(logprob: float, place: int) -> None:
    logprobs = [-1.0, -0.25, -2.0]
    logprobs[place] = logprob
    moved = list(logprobs)
    moved[place] = math.nextafter(logprob, -math.inf)
    left, right = _completion([10, 20, 30], logprobs), _completion([10, 20, 30], moved)
    difference = compare(left, right)
    assert difference is not None
    assert (difference.position, difference.logprob_position) == (None, place)
    assert output_digest(left) == output_digest(right)
    assert logprob_digest(left) != logprob_digest(right)


def test_tells_zero_from_minus_zero() -> None:
    assert compare(_completion([1], [0.0]), _completion([1], [-0.0])) is not None


def test_sees_the_order_of_candidates() -> None:
    entry = TokenLogprob("a", -1.0, (("a", -1.0), ("b", -1.0)))
    swapped = replace(entry, top=entry.top[::-1])
    left, right = (Completion((Choice("a", (1,), "stop", (e,)),)) for e in (entry, swapped))
    assert compare(left, right) is not None


def test_sees_an_answer_that_stops_early() -> None:
    difference = compare(BASE, _completion([10, 20], [-1.0, -0.25]))
    assert difference is not None
    assert (difference.position, difference.token) == (2, None)


def test_sees_the_finish_reason() -> None:
    other = Completion((replace(BASE.choices[0], finish_reason="stop"),))
    assert output_digest(BASE) != output_digest(other)
    difference = compare(BASE, other)
    assert difference is not None
    assert difference.position is None


def test_sees_a_missing_choice_and_names_the_differing_one() -> None:
    two = Completion((*BASE.choices, *BASE.choices))
    assert compare(BASE, two) is not None
    other = Completion((BASE.choices[0], *_completion([10, 20, 31], [-1.0, -0.25, -2.0]).choices))
    difference = compare(two, other)
    assert difference is not None
    assert (difference.choice, difference.position) == (1, 2)


def test_text_stands_for_token_ids_that_are_missing() -> None:
    left, right = (Completion((Choice(text, None, "stop", None),)) for text in ("abc", "abd"))
    difference = compare(left, right)
    assert difference is not None
    assert (difference.position, difference.reference_token, difference.token) == (2, "c", "d")


def test_compares_sets_by_name() -> None:
    other = _completion([10, 21, 30], [-1.0, -0.25, -2.0])
    found = differences({"a": BASE, "b": BASE, "c": BASE}, {"a": BASE, "b": other, "d": BASE})
    assert list(found) == ["b", "c", "d"]
    assert found["c"] is None
    assert found["d"] is None
    assert found["b"] == compare(BASE, other)


@pytest.mark.parametrize("digest", [output_digest, logprob_digest])
def test_digests_do_not_depend_on_how_the_server_made_the_answer(digest) -> None:  # type: ignore[no-untyped-def]
    assert digest(BASE) == digest(replace(BASE, cached_tokens=7, system_fingerprint="fp"))
