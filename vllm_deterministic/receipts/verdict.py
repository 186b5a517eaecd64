"""What became of a receipt that was replayed, as a document and in a sentence."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_deterministic.receipts.answer import Answer, Divergence, find_divergence
from vllm_deterministic.receipts.fingerprint import differing_parts, why_no_promise
from vllm_deterministic.receipts.receipt import Prompt, Receipt

Status = Literal["identical", "diverged", "fingerprint_differs", "prompt_differs", "not_replayed"]
EXIT_CODES: dict[Status, int] = {
    "identical": 0,
    "diverged": 1,
    "fingerprint_differs": 2,
    "prompt_differs": 2,
    "not_replayed": 2,
}
_LONGEST_VALUE = 24  # of a part, in a sentence; hashes are longer


class FingerprintDifference(BaseModel):
    """Two fingerprints, and what differs between them."""

    model_config = ConfigDict(frozen=True)

    receipt: str
    server: str | None
    parts: dict[str, tuple[Any, Any]] | None = Field(
        description="by path, the value in the receipt and the server's; null where either does not tell them"
    )


class Verdict(BaseModel):
    """One receipt, replayed or not. ``divergence`` is told whatever the fingerprint."""

    model_config = ConfigDict(frozen=True)

    receipt: str = Field(description="the file, and the line where it has several")
    status: Status
    message: str
    divergence: Divergence | None = None
    fingerprint: FingerprintDifference | None = None

    @property
    def exit_code(self) -> int:
        """0 identical, 1 diverged, 2 there was nothing to compare that is promised to be the same."""
        return EXIT_CODES[self.status]


def judge(
    name: str, receipt: Receipt, answer: Answer, prompt: Prompt, value: str | None, parts: dict[str, Any] | None
) -> Verdict:
    """Hold an answer against a receipt.

    Args:
        name: of the receipt.
        receipt: what is expected.
        answer: what came, with token ids.
        prompt: what the server made of the prompt.
        value: the server's fingerprint.
        parts: of that fingerprint; None where the server does not tell them.
    """
    divergence = find_divergence(receipt.answer, answer)
    found = _where(divergence, receipt.answer, answer) if divergence else f"identical: {_extent(answer)}"
    difference: FingerprintDifference | None = None
    status: Status = "diverged" if divergence else "identical"
    message = found
    if value != receipt.fingerprint.value:
        difference = _difference(receipt, value, parts)
        status, message = "fingerprint_differs", f"fingerprint differs {_parts(difference)}; the answer: {found}"
    elif prompt != receipt.prompt:
        status = "prompt_differs"
        message = (
            f"prompt differs: the server made other tokens of it ({prompt.tokens}; the receipt has "
            f"{receipt.prompt.tokens}); compare the chat templates, and dates that they write"
        )
    return Verdict(receipt=name, status=status, message=message, divergence=divergence, fingerprint=difference)


def _difference(receipt: Receipt, value: str | None, parts: dict[str, Any] | None) -> FingerprintDifference:
    known = receipt.fingerprint.parts
    differing = None if known is None or parts is None else differing_parts(known, parts)
    return FingerprintDifference(receipt=receipt.fingerprint.value, server=value, parts=differing)


def _extent(answer: Answer) -> str:
    several = f" in {len(answer.choices)} choices" if len(answer.choices) > 1 else ""
    return f"{answer.tokens} tokens and their logprobs{several}"


def _where(divergence: Divergence, receipt: Answer, answer: Answer) -> str:
    if divergence.choice is None:
        return "diverged, at a token that the marks do not tell"
    if divergence.choice >= min(len(receipt.choices), len(answer.choices)):
        return f"diverged in the number of choices: {len(answer.choices)}, not {len(receipt.choices)}"
    of_choice = f" of choice {divergence.choice}" if len(receipt.choices) > 1 else ""
    position, logprob_position = divergence.position, divergence.logprob_position
    if position is not None:
        swap = ""
        if divergence.receipt_token is not None and divergence.token is not None:
            swap = f" (id {divergence.token}, not {divergence.receipt_token})"
        earlier = logprob_position is not None and logprob_position < position
        before = f", in logprobs from token {logprob_position} on" if earlier else ""
        return f"diverged at token {position}{of_choice}{swap}{before}"
    if logprob_position is not None:
        return f"diverged in the logprobs of token {logprob_position}{of_choice}; the tokens agree"
    old, new = (a.choices[divergence.choice].finish_reason for a in (receipt, answer))
    return f"diverged in the finish reason{of_choice}: {new}, not {old}; the tokens agree"


def _parts(difference: FingerprintDifference) -> str:
    lacking = why_no_promise(difference.server)
    if lacking is not None:
        return f"from {difference.receipt}: the server {lacking}"
    if not difference.parts:
        return (
            f"({difference.server}, not {difference.receipt}); in which parts is told where receipt and server "
            "both know them, with the server's VLLM_PLUGINS=deterministic"
        )
    return "in " + ", ".join(_change(path, *values) for path, values in difference.parts.items())


def _change(path: str, old: Any, new: Any) -> str:
    if max(len(str(old)), len(str(new))) > _LONGEST_VALUE:
        return path
    return f"{path} ({new}, not {old})"
