"""The worker of a deterministic engine on a GPU; vLLM starts it by the name that ``plugin.py`` puts in the config."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import vllm.envs
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu_worker import Worker

from vllm_deterministic.triton_kernels.tiles import TilePlan

from . import cuda_linear, fingerprint, patches
from . import cuda_ops as cuda_ops  # defines the operations
from .config import RefusalError
from .devices import CUDA, Device, register_attention
from .worker import DeterministicWorker


class DeterministicCUDAWorker(DeterministicWorker, Worker):
    """Switches on vLLM's guards, replaces its layers before the model is built, certifies them once it is loaded."""

    kind: ClassVar[Device] = CUDA
    sampler: ClassVar[type] = Sampler
    # Digests by name, from when something takes the weights away until the same bytes are back.
    _awaited_weights: dict[str, str] | None = None

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

    def sleep(self, level: int = 1) -> None:
        """As vLLM does; every level but 1 discards the weights."""
        if level != 1:
            self._await_weights()
        super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM does, with a KV cache of zeros as at the start.

        A tile may reach before a sliding window into a block that was never written: weights are 0 there, and 0 times
        the NaN of fresh memory is not.
        """
        super().wake_up(tags)
        if tags is None or "kv_cache" in tags:
            with torch.inference_mode():
                for cache in self.model_runner.kv_caches:
                    cache.zero_()

    def reset_weights(self) -> None:
        """As vLLM does; the weights are zero until they are loaded again."""
        self._await_weights()
        super().reset_weights()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does.

        Raises:
            RefusalError: other weights came than the engine started with.
        """
        self._await_weights()
        super().reload_weights(*args, **kwargs)
        self._check_weights()

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM does.

        Raises:
            RefusalError: the weights are not, or not yet, those that the engine started with.
        """
        self._check_weights()
        return super().execute_model(scheduler_output)

    def _await_weights(self) -> None:
        # Without the promise the weights are the user's to replace.
        if self._awaited_weights is None and not self._coverage.uncovered:
            self._awaited_weights = compute_tensor_digests(self.model_runner.get_model())

    def _check_weights(self) -> None:
        if self._awaited_weights is None:
            return
        found = compute_tensor_digests(self.model_runner.get_model())
        differing = [name for name, digest in self._awaited_weights.items() if found.get(name) != digest]
        if differing:
            raise RefusalError(
                f"{len(differing)} of {len(found)} weights are not those that the fingerprint was taken of "
                f"({differing[0]} is the first): after sleep level 2, wake up with tags ['weights'], call "
                "reload_weights, then wake up with tags ['kv_cache']; for other weights start another server"
            )
        self._awaited_weights = None


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
