"""vLLM's CPU model runner with the deterministic sampler."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from .sampling import DeterministicSampler, NoiseStream


class DeterministicCPUModelRunner(CPUModelRunner):
    """Each seeded request draws from a ``NoiseStream`` in the place of a torch generator."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.sampler = DeterministicSampler(self.model_config.logprobs_mode)

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # vLLM warms up its compiled sampler here, with torch generators; this sampler compiles nothing.
        return torch.tensor([])

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        result = super()._update_states(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            if params is None or params.sampling_type == SamplingType.GREEDY:
                continue
            if params.seed is None:
                raise RuntimeError(f"request {new.req_id} samples without a seed: the frontend must have set one")
            state = self.requests[new.req_id]
            state.generator = NoiseStream(params.seed, state.output_token_ids)
            self.input_batch.generators[self.input_batch.req_id_to_index[new.req_id]] = state.generator
        return result
