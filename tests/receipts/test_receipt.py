"""The document: it comes back as it was written, and whatever happened to it meanwhile is noticed."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_deterministic.receipts.answer import Answer, ChoiceAnswer
from vllm_deterministic.receipts.receipt import Fingerprint, Prompt, Receipt, parse, to_line

from .fake_server import COMPLETION, PARTS, ReceiptServer, take

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "receipts.md"
RECEIPT = take(ReceiptServer(parts=PARTS), {**COMPLETION, "n": 2, "user": "Zoë"}, token_ids=True)
LINE = to_line(RECEIPT)


def sealed(document: dict[str, Any]) -> bytes:
    """A document with the digest that belongs to it."""
    rest = {name: value for name, value in document.items() if name != "receipt_digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "receipt_digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


def test_it_comes_back_as_it_was() -> None:
    assert parse(LINE.encode()) == RECEIPT
    assert LINE.isascii()
    assert LINE.count("\n") == 1


def test_taken_twice_it_is_the_same_to_the_byte() -> None:
    again = take(ReceiptServer(parts=PARTS), {**COMPLETION, "n": 2, "user": "Zoë"}, token_ids=True)
    assert to_line(again) == LINE


def test_another_layout_is_the_same_receipt() -> None:
    document = json.loads(LINE)
    pretty = json.dumps(dict(reversed(document.items())), indent=2, ensure_ascii=False)
    assert parse(pretty.encode()) == RECEIPT


def test_it_is_small() -> None:
    receipt = take(ReceiptServer(), {**COMPLETION, "max_tokens": 100})
    assert len(to_line(receipt)) < 1000 + 8 * 100


def test_every_cut_is_noticed() -> None:
    for end in range(len(LINE) - 1):
        with pytest.raises(ValueError, match="no receipt, or cut off"):
            parse(LINE[:end].encode())


def test_every_changed_value_is_noticed() -> None:
    """A digit or letter anywhere, as a bit that flipped on a disk."""
    places = [at for at, letter in enumerate(LINE) if letter.isalnum()]
    for at in places[:: len(places) // 200]:
        changed = LINE[:at] + ("1" if LINE[at] != "1" else "2") + LINE[at + 1 :]
        with pytest.raises(ValueError, match=r"damaged|no receipt|schema version"):
            parse(changed.encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no receipt, or cut off"),
        (b"\xff\xfe", "no receipt, or cut off"),
        (b"[]", "there is no schema_version"),
        (b'{"schema_version": 1}', "there is no schema_version"),
        (b'{"choices": []}', "there is no schema_version"),
        (b'{"schema_version": "1.0"}', "damaged"),
        (b'{"schema_version": "1.0", "request": 1e999, "receipt_digest": ""}', "damaged"),
        (sealed({"schema_version": "1.0"}), r"no receipt \(endpoint: Field required\)"),
        (sealed({**json.loads(LINE), "schema_version": "2.0"}), r"schema version '2.0', and .* reads 1.x"),
        (sealed({**json.loads(LINE), "fingerprint": {"value": "vllm-x", "parts": None}}), "fingerprint.value"),
        (sealed({**json.loads(LINE), "endpoint": "/v1/embeddings"}), "endpoint"),
    ],
)
def test_what_is_no_receipt_is_refused_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse(content)
    assert "\n" not in str(raised.value)


def test_a_later_minor_version_is_read() -> None:
    later = sealed({**json.loads(LINE), "schema_version": "1.7", "weather": "fine"})
    assert parse(later) == RECEIPT.model_copy(update={"schema_version": "1.7"})


def test_the_documentation_shows_a_receipt_and_names_every_field() -> None:
    text = DOCUMENTATION.read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert parse(example.encode()).fingerprint.value.startswith("det-")
    for model in (Receipt, Answer, ChoiceAnswer, Prompt, Fingerprint):
        for name in model.model_fields:
            assert name in example, f"{model.__name__}.{name}"
            assert name in text.replace(example, "") or model is Prompt, f"{model.__name__}.{name}"
