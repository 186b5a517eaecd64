"""The worker of a deterministic engine on a GPU; vLLM starts it by the name that ``plugin.py`` puts in the config."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import vllm.envs
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu_worker import Worker

from vllm_deterministic.triton_kernels.tiles import TilePlan

from . import cuda_linear, fingerprint, patches
from . import cuda_ops as cuda_ops  # defines the operations
from .devices import CUDA, Device, register_attention
from .worker import DeterministicWorker


class DeterministicCUDAWorker(DeterministicWorker, Worker):
    """Switches on vLLM's guards, replaces its layers before the model is built, certifies them once it is loaded."""

    kind: ClassVar[Device] = CUDA
    sampler: ClassVar[type] = Sampler

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.prepare()
        super().__init__(vllm_config, *args, **kwargs)

    @staticmethod
    def prepare() -> None:
        """See ``DeterministicWorker``."""
        switch_on_guards()
        patches.apply(patches.CUDA_WORKER)
        register_attention(CUDA)

    def certify(self, model: torch.nn.Module) -> Mapping[str, TilePlan]:
        """See ``DeterministicWorker``."""
        return cuda_linear.certify(model, self.device, self.scheduler_config.max_num_batched_tokens)

    def machine_part(self) -> dict[str, Any]:
        """See ``DeterministicWorker``."""
        return fingerprint.cuda_part(self.device)


def switch_on_guards() -> None:
    """Switch on vLLM's batch-invariant mode in this process, which has not built anything of the engine yet.

    The mode keeps TF32 out and vLLM from choosing kernels by load. vLLM reads the variable when it builds what depends
    on it, all of it in the worker; only LoRA and the Triton attention backend read it on import, and both are refused.
    In the frontend it would switch torch.compile off for the shapes that vLLM's own product has tiles for.
    """
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    # FlashInfer samples a request only where no neighbour is greedy or seeded.
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    # An earlier engine of this process has made vLLM remember what it read.
    vllm.envs.disable_envs_cache()
