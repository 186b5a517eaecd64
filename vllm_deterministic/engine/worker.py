"""What the workers of both kinds of device do once the model is loaded: walk it, refuse or certify, take the
fingerprint."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger

from . import fingerprint
from .config import DeterministicConfig
from .coverage import Coverage
from .covered_modules import walk
from .covered_settings import setting_gaps
from .devices import Device
from .weights import weights_part

logger = init_logger("vllm.deterministic")


class DeterministicWorker:
    """Stands before vLLM's worker among the bases of a class, which says what is its device's own."""

    kind: ClassVar[Device]
    vllm_config: Any
    model_runner: Any
    rank: int

    @staticmethod
    def prepare() -> None:
        """Replace vLLM's parts in this process, before a model is built."""
        raise NotImplementedError

    def certify(self, model: torch.nn.Module) -> Mapping[str, Any]:
        """Certify the products of a loaded model: what was certified, by the shape of the weight.

        Raises:
            RefusalError: some product cannot be made batch-invariant.
        """
        raise NotImplementedError

    def machine_part(self) -> dict[str, Any]:
        """The machine, for the fingerprint."""
        raise NotImplementedError

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model as vLLM does, refuse what is not covered, certify, and tell what came out.

        Raises:
            RefusalError: something is not covered, and the user has not accepted that.
        """
        super().load_model(load_dummy_weights=load_dummy_weights)  # type: ignore[misc]
        config, model = self.vllm_config, self.model_runner.get_model()
        deterministic = DeterministicConfig.of(config)
        if deterministic is None:
            raise RuntimeError("the worker of a deterministic engine was started without its settings")
        found = Coverage(
            config.model_config.model,
            self.kind.name,
            (
                *setting_gaps(config, deterministic, self.kind),
                *walk(model, config, type(self.model_runner.sampler), self.kind),
            ),
            deterministic.allow_uncovered,
        )
        self._publish(found, deterministic)
        found.refuse()
        certified = self.certify(model)
        taken = fingerprint.collect(
            config,
            deterministic,
            weights=weights_part(config, model, deterministic.fingerprint_weights),
            machine=self.machine_part(),
            attention=[entry.name for entry in found.entries if entry.part == "attention"],
            tiles=dict(certified),
            uncovered=[entry.name for entry in found.uncovered],
        )
        self._coverage = replace(found, fingerprint=taken)
        self._publish(self._coverage, deterministic)
        log = logger.warning if found.uncovered else logger.info
        log("deterministic %s", self._coverage.table())

    def deterministic_coverage(self) -> str:
        """The coverage with the fingerprint as JSON: the frontend asks for it by name.

        As text, since vLLM answers nothing at all where it cannot send a type, a kind of string from torch among them.
        """
        return json.dumps(self._coverage.to_json())

    def _publish(self, coverage: Coverage, deterministic: DeterministicConfig) -> None:
        if deterministic.coverage_file is not None and self.rank == 0:
            coverage.write(deterministic.coverage_file)
