"""Files of requests and receipts: one JSON document a line."""

from dataclasses import dataclass
from typing import BinaryIO

from vllm_deterministic.verify.completion import load_json


@dataclass(frozen=True, slots=True)
class Line:
    """A document, and where it stands: the file, and the line where it has several."""

    name: str
    content: bytes


def read_lines(file: BinaryIO) -> list[Line]:
    """The lines that are not blank. A file that is one document may have it over several lines."""
    content = file.read()
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    if len(lines) == 1 or _is_document(content):
        return [Line(file.name, content)]
    return [Line(f"{file.name}:{number}", line) for number, line in lines]


def _is_document(content: bytes) -> bool:
    try:
        load_json(content)
    except ValueError:
        return False
    return True
