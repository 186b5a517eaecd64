"""Verdicts kept on disk, one file for each set-up that they hold for."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_deterministic.triton_kernels.tiles import TilePlan

from .verdict import PlanVerdict
from .whole_file import write_whole

logger = logging.getLogger("vllm.deterministic.certify")

_Key = tuple[str, int, int, int]


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/vllm-deterministic/certified``, in ``~/.cache`` where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "vllm-deterministic" / "certified"


class VerdictCache:
    """The verdicts of one set-up. Never raises for what is in the file or for a file that cannot be written."""

    def __init__(self, identity: dict[str, str], directory: Path | None = None) -> None:
        self.identity = identity
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (directory or default_directory()) / f"{name}.json"

    def find(self, plan: TilePlan, dtype: str, *, every_m: bool) -> PlanVerdict | None:
        """The verdict on this very plan; one over every M serves where fewer are asked for."""
        verdict = self._read().get((dtype, plan.n, plan.k, plan.segments))
        if verdict is None or (every_m and not verdict.every_m):
            return None
        return verdict if tuple(tile.tile for tile in verdict.tiles) == plan.tiles else None

    def add(self, verdicts: Iterable[PlanVerdict]) -> None:
        """Keep verdicts, but those with a tile that did not run: what stopped it may be gone the next time."""
        known = self._read()
        for verdict in verdicts:
            if not verdict.refusal and all(tile.status != "failed" for tile in verdict.tiles):
                known[_key(verdict)] = verdict
        content = {"identity": self.identity, "verdicts": [verdict.to_json() for verdict in known.values()]}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(content, indent=1))
        except OSError as error:
            logger.warning("cannot keep verdicts in %s: %s", self.path, error.strerror)

    def _read(self) -> dict[_Key, PlanVerdict]:
        try:
            content: Any = json.loads(self.path.read_text(encoding="utf-8"))
            if content["identity"] != self.identity:
                raise ValueError("it is of another set-up")
            return {_key(verdict): verdict for verdict in map(PlanVerdict.from_json, content["verdicts"])}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "ignoring the verdicts in %s (%s: %s); certifying anew", self.path, type(error).__name__, error
            )
            return {}


def _key(verdict: PlanVerdict) -> _Key:
    return verdict.dtype, verdict.n, verdict.k, verdict.segments
