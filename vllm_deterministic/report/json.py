"""The run record itself, as JSON. docs/run-record.md describes it.

``python -m vllm_deterministic.report.json`` prints its JSON schema, which ships as run-record.schema.json.
"""

import json

from vllm_deterministic.verify.record import RunRecord


def render(record: RunRecord) -> str:
    """The record as one line of JSON; its lists of tokens would make an indented one endless."""
    return record.model_dump_json() + "\n"


def load(text: str) -> RunRecord:
    """Read a record back. Raises pydantic.ValidationError where it is none, or of another major version."""
    return RunRecord.model_validate_json(text)


def schema() -> str:
    """The JSON schema of the record."""
    return json.dumps(RunRecord.model_json_schema(mode="serialization"), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
