"""An answer as hashes: whole ones that decide whether two are the same, and short ones that tell where they part."""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from vllm_deterministic.verify.compare import logprob_digest, logprob_record, output_digest
from vllm_deterministic.verify.completion import Choice, Completion

_MARK = 4  # hexadecimal digits: one place in 65,536 looks equal where it is not, and the next one tells

Marks = Annotated[str, Field(pattern=r"^([0-9a-f]{4})*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ChoiceAnswer(BaseModel):
    """One of the n choices. A mark is the start of a SHA-256 over all records up to its own; see docs/receipts.md."""

    model_config = ConfigDict(frozen=True)

    finish_reason: str | None
    token_marks: Marks = Field(description="four hexadecimal digits for each output token")
    logprob_marks: Marks = Field(description="the same for its logprob record")
    token_ids: list[int] | None = Field(description="null unless they were asked for")


class Answer(BaseModel):
    """All choices of an answer. The digests are those of a run record."""

    model_config = ConfigDict(frozen=True)

    output_digest: Digest = Field(description="SHA-256 of token ids and finish reasons")
    logprob_digest: Digest = Field(description="SHA-256 of the same and of the bits of all logprobs")
    choices: list[ChoiceAnswer] = Field(min_length=1)

    @property
    def tokens(self) -> int:
        """Output tokens of all choices."""
        return sum(len(choice.token_marks) // _MARK for choice in self.choices)


class Divergence(BaseModel):
    """Where an answer parts from a receipt, in the first choice that does; positions count output tokens from 0."""

    model_config = ConfigDict(frozen=True)

    choice: int | None = Field(description="null where the digests differ and no mark does")
    position: int | None = Field(description="first differing token; null where the tokens agree")
    logprob_position: int | None = Field(description="first differing logprob record; null where they agree")
    receipt_token: int | None = Field(description="token id at position, where the receipt holds token ids")
    token: int | None = Field(description="token id at position of the answer; null where it ended before")


def answer_of(completion: Completion, *, token_ids: bool) -> Answer:
    """Take the hashes of an answer, and its token ids where asked to.

    Raises ValueError where the server told no token ids, or no logprobs.
    """
    return Answer(
        output_digest=output_digest(completion),
        logprob_digest=logprob_digest(completion),
        choices=[_choice(choice, token_ids) for choice in completion.choices],
    )


def find_divergence(receipt: Answer, answer: Answer) -> Divergence | None:
    """The first choice in which an answer, taken with its token ids, is not that of the receipt; None if there is none.

    Where one has more choices than the other, and those of both agree, it is the first that only one has.
    """
    if (receipt.output_digest, receipt.logprob_digest) == (answer.output_digest, answer.logprob_digest):
        return None
    for index, (old, new) in enumerate(zip(receipt.choices, answer.choices, strict=False)):
        position = _first(old.token_marks, new.token_marks)
        logprob_position = _first(old.logprob_marks, new.logprob_marks)
        if position is not None or logprob_position is not None or old.finish_reason != new.finish_reason:
            return Divergence(
                choice=index,
                position=position,
                logprob_position=logprob_position,
                receipt_token=_at(old.token_ids, position),
                token=_at(new.token_ids, position),
            )
    lengths = len(receipt.choices), len(answer.choices)
    choice = min(lengths) if lengths[0] != lengths[1] else None
    return Divergence(choice=choice, position=None, logprob_position=None, receipt_token=None, token=None)


def _choice(choice: Choice, token_ids: bool) -> ChoiceAnswer:
    if choice.token_ids is None:
        raise ValueError("the server told no token ids, which vLLM does where return_token_ids is set")
    if choice.token_ids and not choice.logprobs:
        raise ValueError("the server told no logprobs")
    return ChoiceAnswer(
        finish_reason=choice.finish_reason,
        token_marks=_marks(choice.token_ids),
        logprob_marks=_marks(logprob_record(entry) for entry in choice.logprobs or ()),
        token_ids=list(choice.token_ids) if token_ids else None,
    )


def _marks(records: Iterable[object]) -> str:
    running, marks = hashlib.sha256(), []
    for record in records:
        running.update(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        marks.append(running.hexdigest()[:_MARK])
    return "".join(marks)


def _first(old: str, new: str) -> int | None:
    """The first mark that differs, or that only one of the two has."""
    for start in range(0, max(len(old), len(new)), _MARK):
        if old[start : start + _MARK] != new[start : start + _MARK]:
            return start // _MARK
    return None


def _at(token_ids: list[int] | None, position: int | None) -> int | None:
    if token_ids is None or position is None or position >= len(token_ids):
        return None
    return token_ids[position]
