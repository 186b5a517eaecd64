"""The receipt: one line of JSON that holds a request and what a deterministic server answered to it.

``schema_version`` is ``MAJOR.MINOR`` as in the run record. docs/receipts.md describes every field.
"""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_deterministic.receipts.answer import Answer, Digest
from vllm_deterministic.receipts.request import Endpoint
from vllm_deterministic.verify.completion import load_json

SCHEMA_VERSION = "1.0"
_MAJOR = "1."
_DIGEST = "receipt_digest"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Prompt(_Part):
    """What the server made of the prompt: a chat template is no part of the fingerprint, and may change it."""

    tokens: Annotated[int, Field(ge=1)]
    digest: Digest = Field(description="SHA-256 of the prompt's token ids as JSON")

    @classmethod
    def of(cls, token_ids: tuple[int, ...] | None) -> "Prompt":
        """The length and hash of a prompt. Raises ValueError where the server told none."""
        if not token_ids:
            raise ValueError(
                "the server told no token ids of the prompt, which vLLM does where return_token_ids is set"
            )
        return cls(tokens=len(token_ids), digest=_sha256(list(token_ids)))


class Fingerprint(_Part):
    """What the answer depends on beside the request."""

    value: str = Field(pattern="^det-")
    parts: dict[str, Any] | None = Field(description="null where the server does not tell them")


class Receipt(_Part):
    """A request, the fingerprint of the server that answered it, and the answer's hashes."""

    schema_version: Annotated[str, Field(pattern=r"^1\.\d+$")] = SCHEMA_VERSION
    endpoint: Endpoint
    request: dict[str, Any] = Field(description="the body as it was sent")
    prompt: Prompt
    fingerprint: Fingerprint
    answer: Answer


def to_line(receipt: Receipt) -> str:
    """The receipt as one line of ASCII, with the hash of all else in ``receipt_digest``."""
    content = receipt.model_dump(mode="json")
    return json.dumps(content | {_DIGEST: _sha256(content)}, separators=(",", ":"), allow_nan=False) + "\n"


def parse(content: bytes) -> Receipt:
    """Read a receipt. Raises ValueError, in one line, where it is none, of another version, or was changed."""
    try:
        document = load_json(content)
    except ValueError as error:
        raise ValueError(f"it is no receipt, or cut off: invalid JSON ({error})") from None
    if not isinstance(document, dict) or not isinstance(version := document.get("schema_version"), str):
        raise ValueError("it is no receipt: there is no schema_version in it")
    if not version.startswith(_MAJOR):
        raise ValueError(f"it has schema version {version!r}, and this vllm-deterministic reads {_MAJOR}x")
    # Over the document, not the model: a later minor version has fields that this one does not know.
    digest = document.pop(_DIGEST, None)
    try:
        intact = digest == _sha256(document)
    except ValueError:
        intact = False  # a number beyond JSON's
    if not intact:
        raise ValueError("it was changed or damaged since it was taken: receipt_digest does not fit it")
    try:
        return Receipt.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"it is no receipt ({where}: {first['msg']})") from None


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
