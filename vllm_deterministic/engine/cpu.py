"""The worker of a deterministic engine on CPU; vLLM starts it by the name that ``plugin.py`` puts in the config."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from . import fingerprint, linear, patches
from .config import RefusalError
from .devices import CPU, Device, register_attention
from .sampling import DeterministicSampler
from .worker import DeterministicWorker


class DeterministicCPUWorker(DeterministicWorker, CPUWorker):
    """Replaces vLLM's layers before the model is built, checks and certifies them once it is loaded."""

    kind: ClassVar[Device] = CPU
    sampler: ClassVar[type] = DeterministicSampler

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.prepare()
        super().__init__(vllm_config, *args, **kwargs)

    @staticmethod
    def prepare() -> None:
        """See ``DeterministicWorker``."""
        patches.apply(patches.CPU_WORKER)
        register_attention(CPU)

    def certify(self, model: torch.nn.Module) -> Mapping[str, tuple[int, ...]]:
        """See ``DeterministicWorker``."""
        return linear.tile_rows(model, self.model_config.dtype)

    def machine_part(self) -> dict[str, Any]:
        """See ``DeterministicWorker``."""
        return fingerprint.cpu_part()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused: vLLM would pack the weights anew and call its library without the certified tiles.

        Raises:
            RefusalError: always.
        """
        raise RefusalError("reloading weights is not covered on CPU: start another server")

    def reset_weights(self) -> None:
        """Refused: the fingerprint would not follow.

        Raises:
            RefusalError: always.
        """
        raise RefusalError("resetting weights is not covered on CPU: start another server")
