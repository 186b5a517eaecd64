"""The worker of a deterministic engine on a GPU; vLLM starts it by the name that ``plugin.py`` puts in the config."""

import os
from typing import Any

import vllm.envs
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_worker import Worker

from . import coverage, cuda_linear, patches
from . import cuda_ops as cuda_ops  # defines the operations


class DeterministicCUDAWorker(Worker):
    """Switches on vLLM's guards, replaces its layers before the model is built, certifies them once it is loaded."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        switch_on_guards()
        patches.apply(patches.CUDA_WORKER)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model as vLLM does, refuse what is not covered, certify the linear layers' tiles."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        model = self.model_runner.get_model()
        coverage.check_model(model)
        coverage.check_flash_attention(model)
        cuda_linear.certify(model, self.device, self.scheduler_config.max_num_batched_tokens)


def switch_on_guards() -> None:
    """Switch on vLLM's batch-invariant mode in this process, which has not built anything of the engine yet.

    The mode gives FlashAttention one split and keeps TF32 out. vLLM reads the variable when it builds what depends on
    it, all of it in the worker; only LoRA and the Triton attention backend read it on import, and both are refused. In
    the frontend it would switch torch.compile off for the shapes that vLLM's own product has tiles for.
    """
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    # FlashInfer samples a request only where no neighbour is greedy or seeded.
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    # An earlier engine of this process has made vLLM remember what it read.
    vllm.envs.disable_envs_cache()
