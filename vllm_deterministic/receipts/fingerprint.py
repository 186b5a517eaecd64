"""Fingerprints of a server: whether one promises anything, its parts, and in which of them two differ."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from vllm_deterministic.verify.client import CannotRun, Client

_COVERAGE = "/plugins/deterministic/coverage"


class _Fingerprint(BaseModel):
    value: str
    parts: dict[str, Any]


class _Coverage(BaseModel):
    fingerprint: _Fingerprint


def why_no_promise(value: str | None) -> str | None:
    """Why a server with this ``system_fingerprint`` promises nothing; None where it does."""
    if value is None:
        return "tells no system_fingerprint, so it is no vLLM with --enable-deterministic"
    if value.startswith("not-deterministic-"):
        return f"has the fingerprint {value!r}: it was started with --deterministic-allow-uncovered and has gaps"
    if not value.startswith("det-"):
        return (
            f"has the fingerprint {value!r}, not one of --enable-deterministic: start it with that option, and without "
            "--fingerprint-mode"
        )
    return None


async def told_parts(client: Client) -> dict[str, dict[str, Any]]:
    """The parts of the server's fingerprint, by its value; empty where the server does not tell them."""
    try:
        coverage = _Coverage.model_validate(await client.get_json(_COVERAGE))
    except (CannotRun, ValidationError):
        return {}
    return {coverage.fingerprint.value: coverage.fingerprint.parts}


def differing_parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that differ, by their path, such as ``machine.threads``; None stands for one that is not there."""
    left, right = dict(_leaves(old)), dict(_leaves(new))
    paths = sorted(left.keys() | right.keys())
    return {path: (left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)}


def _leaves(parts: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in parts.items():
        if isinstance(value, Mapping) and value:
            leaves += _leaves(value, f"{above}{name}.")
        else:
            leaves.append((above + name, value))
    return leaves
