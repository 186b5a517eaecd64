"""How the fingerprint gets into the responses: asked from the workers, handed to vLLM as its own setting."""

import argparse
import json
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.deterministic")


async def ask_workers(engine_client: Any) -> dict[str, Any]:
    """The coverage of a started engine, from its first worker; see ``Coverage.to_json``."""
    coverages = await engine_client.collective_rpc("deterministic_coverage")
    return dict(json.loads(coverages[0]))


def with_fingerprint(args: argparse.Namespace, coverage: dict[str, Any]) -> argparse.Namespace:
    """The server's arguments with the engine's fingerprint for ``system_fingerprint``.

    A user who chose another ``--fingerprint-mode`` than vLLM's default keeps it, and is told what is lost.
    """
    value = coverage["fingerprint"]["value"]
    if not coverage["deterministic"]:
        gaps = ", ".join(entry["name"] for entry in coverage["entries"] if entry["covered_by"] is None)
        logger.warning("NOT DETERMINISTIC: equal requests may get different answers; not covered: %s", gaps)
    mode = getattr(args, "fingerprint_mode", "full")
    if mode != "full":
        logger.warning(
            "--fingerprint-mode %s is kept, so responses do not carry the deterministic fingerprint %s", mode, value
        )
        return args
    logger.info("system_fingerprint of every response: %s", value)
    return argparse.Namespace(**{**vars(args), "fingerprint_mode": "custom", "fingerprint_value": value})
