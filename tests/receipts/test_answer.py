"""Hashes of answers, and where two of them part."""

import hashlib
from dataclasses import replace

import pytest

from vllm_deterministic.receipts.answer import Answer, Divergence, answer_of, find_divergence
from vllm_deterministic.verify.completion import Choice, Completion, TokenLogprob


def entry(token: int, logprob: float = -0.25) -> TokenLogprob:
    return TokenLogprob(f"token_id:{token}", logprob, ((f"token_id:{token}", logprob), ("token_id:1", -2.5)))


def choice(*tokens: int, finish_reason: str = "length") -> Choice:
    return Choice("", tokens, finish_reason, tuple(entry(token) for token in tokens))


def answer(*choices: Choice) -> Answer:
    return answer_of(Completion(choices), token_ids=True)


WHOLE = choice(*range(100, 132))


def test_marks_are_what_the_documentation_says() -> None:
    (found,) = answer(choice(12, 345)).choices
    lines = [b"12\n", b"345\n"]
    assert found.token_marks == "".join(hashlib.sha256(b"".join(lines[:n])).hexdigest()[:4] for n in (1, 2))
    record = (
        b'["token_id:12","-0x1.0000000000000p-2",'
        b'[["token_id:12","-0x1.0000000000000p-2"],["token_id:1","-0x1.4000000000000p+1"]]]\n'
    )
    assert found.logprob_marks[:4] == hashlib.sha256(record).hexdigest()[:4]
    assert len(found.logprob_marks) == len(found.token_marks) == 8


def test_token_ids_are_kept_only_where_asked_for() -> None:
    assert answer_of(Completion((WHOLE,)), token_ids=False).choices[0].token_ids is None
    assert answer(WHOLE).choices[0].token_ids == list(range(100, 132))


def test_equal_answers_have_no_divergence() -> None:
    assert find_divergence(answer(WHOLE, WHOLE), answer(WHOLE, WHOLE)) is None


@pytest.mark.parametrize("position", [0, 1, 15, 30, 31])
def test_a_token_is_found_where_it_is(position: int) -> None:
    tokens = list(range(100, 132))
    tokens[position] = 7
    found = find_divergence(answer(choice(5), WHOLE), answer(choice(5), choice(*tokens)))
    expected = {"position": position, "logprob_position": position, "receipt_token": 100 + position, "token": 7}
    assert found == Divergence(choice=1, **expected)


@pytest.mark.parametrize("position", [0, 15, 31])
@pytest.mark.parametrize("logprob", [-0.25 * (1 - 2**-52), 0.25, -0.0])
def test_a_logprob_is_found_where_it_is(position: int, logprob: float) -> None:
    assert WHOLE.logprobs is not None
    entries = list(WHOLE.logprobs)
    entries[position] = entry(100 + position, logprob)
    found = find_divergence(answer(WHOLE), answer(replace(WHOLE, logprobs=tuple(entries))))
    assert found is not None
    assert (found.choice, found.position, found.logprob_position) == (0, None, position)


def test_zero_and_minus_zero_differ() -> None:
    plus, minus = (replace(choice(5), logprobs=(entry(5, zero),)) for zero in (0.0, -0.0))
    found = find_divergence(answer(plus), answer(minus))
    assert found is not None
    assert found.logprob_position == 0


@pytest.mark.parametrize("length", [0, 1, 31])
def test_an_answer_that_ends_early_or_goes_on(length: int) -> None:
    short = answer(choice(*range(100, 100 + length)))
    for pair in ((answer(WHOLE), short), (short, answer(WHOLE))):
        found = find_divergence(*pair)
        assert found is not None
        assert (found.position, found.logprob_position) == (length, length)
        assert None in (found.token, found.receipt_token)


def test_the_finish_reason_counts() -> None:
    found = find_divergence(answer(choice(5)), answer(choice(5, finish_reason="stop")))
    assert found == Divergence(choice=0, position=None, logprob_position=None, receipt_token=None, token=None)


def test_the_number_of_choices_counts() -> None:
    found = find_divergence(answer(WHOLE), answer(WHOLE, WHOLE))
    assert found is not None
    assert found.choice == 1


def test_the_digests_decide_where_no_mark_differs() -> None:
    """A mark can be equal by chance, at the last token with none after it."""
    one = answer(WHOLE)
    found = find_divergence(one, one.model_copy(update={"logprob_digest": "0" * 64}))
    assert found is not None
    assert found.choice is None


@pytest.mark.parametrize(("field", "message"), [("token_ids", "told no token ids"), ("logprobs", "told no logprobs")])
def test_what_the_server_does_not_tell_is_refused(field: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(replace(WHOLE, **{field: None}))
