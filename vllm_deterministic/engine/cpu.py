"""The worker of a deterministic engine on CPU; vLLM starts it by the name that ``plugin.py`` puts in the config."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from . import coverage, linear, patches


class DeterministicCPUWorker(CPUWorker):
    """Replaces vLLM's layers before the model is built, checks and certifies them once it is loaded."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        patches.apply(patches.CPU_WORKER)
        # vLLM ignores a request for another backend on CPU, but honours another class under its own name.
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "vllm_deterministic.engine.attention.DeterministicCPUAttentionBackend"
        )
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model as vLLM does, refuse what is not covered, certify the linear layers' tiles."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        model = self.model_runner.get_model()
        coverage.check_model(model)
        linear.tile_rows(model, self.model_config.dtype)
