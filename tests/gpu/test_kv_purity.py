"""What lies in the KV cache for a request follows its tokens alone, however they came there."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the extra 'cuda'")
import torch
from vllm import LLM, SamplingParams
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm_deterministic.triton_kernels.attention_plan import AttentionFold

from vllm_deterministic.engine.cuda_attention import ROADS

from .models import MODES, counter, prompt, write_model

pytestmark = pytest.mark.gpu

LENGTH = 1300
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)


class Caches:
    """Hashes of every layer's keys and values, taken when a request gives its blocks back."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.of_prompt: dict[int, list[str]] = {}

    def take(self, manager: KVCacheManager, request: Any) -> None:
        (blocks,) = manager.get_block_ids(request.request_id)
        assert self.llm is not None
        config = self.llm.llm_engine.vllm_config
        layers = get_layers_from_vllm_config(config, Attention).values()
        hashes = []
        for layer in layers:
            # [blocks, KV heads, block size, 2 * D] -> [positions, KV heads, 2 * D]
            slots = layer.kv_cache[torch.tensor(blocks, device="cuda")].transpose(1, 2).flatten(0, 1)
            # The last token was sampled and never read.
            content = slots[: request.num_tokens - 1].contiguous().view(torch.int16).cpu().numpy().tobytes()
            hashes.append(hashlib.sha256(content).hexdigest())
        self.of_prompt[request.num_prompt_tokens] = hashes


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Caches:
    found = Caches()
    original = KVCacheManager.free

    def free(self: KVCacheManager, request: Any) -> None:
        if request.is_finished():
            found.take(self, request)
        original(self, request)

    monkeypatch.setattr(KVCacheManager, "free", free)
    return found


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"), "Qwen3ForCausalLM")


def serve(llm: LLM, *lengths: int) -> None:
    llm.generate([prompt(length) for length in lengths], GREEDY, use_tqdm=False)


def prefix_of(length: int, kept: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": prompt(length)["prompt_token_ids"][:kept]}


CROWD = (LENGTH, 1100, 1201, 1250, 1333, 1017)


@pytest.mark.parametrize("road", ROADS)
def test_however_a_request_is_served(road: str, qwen3: Path, start: Callable[..., LLM], caches: Caches) -> None:
    """Alone and whole, among neighbours in chunks, on a cached prefix, preempted and computed again."""
    common = {
        "additional_config": {"deterministic": {"attention": road, "allow_uncovered": True}},
        "disable_log_stats": False,
        "max_model_len": 1536,
    }
    caches.llm = llm = start(qwen3, **common, **MODES["eager"], max_num_batched_tokens=2048, async_scheduling=False)
    serve(llm, LENGTH)
    expected = caches.of_prompt[LENGTH]
    assert len(set(expected)) == len(expected), "layers are told apart"
    for scenario in ("cached", "half cached", "in chunks among neighbours"):
        if scenario != "cached":
            assert llm.reset_prefix_cache()
        if scenario == "half cached":
            llm.generate(prefix_of(LENGTH, LENGTH // 2), GREEDY, use_tqdm=False)
        hits = counter(llm, "prefix_cache_hits")
        serve(llm, *(CROWD[::-1] if "neighbours" in scenario else [LENGTH]))
        assert (counter(llm, "prefix_cache_hits") > hits) == ("cached" in scenario), scenario
        assert caches.of_prompt[LENGTH] == expected, scenario
    together = dict(caches.of_prompt)

    # All prompts fit as they come; with what is generated they do not.
    blocks = sum(-(-length // 16) for length in CROWD) + 8
    caches.llm = llm = start(
        qwen3, **common, **MODES["compiled"], max_num_batched_tokens=256, block_size=16, num_gpu_blocks_override=blocks
    )
    serve(llm, *CROWD)
    assert counter(llm, "num_preemptions") > 0, "no request was preempted: the test proves nothing of it"
    for length in CROWD:
        assert caches.of_prompt[length] == together[length], f"{length}, preempted, in blocks of 16, compiled"


def test_a_split_that_follows_the_step_is_seen(
    qwen3: Path, start: Callable[..., LLM], caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as long where a step holds several requests: answers may agree, what is cached does not."""
    caches.llm = llm = start(qwen3, **MODES["eager"])
    serve(llm, LENGTH)
    expected = caches.of_prompt[LENGTH]
    layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).values()
    for layer in layers:
        real = layer.impl.attention

        def attend(*args: Any, real: Any = real, fold: AttentionFold, **options: Any) -> torch.Tensor:
            split = fold.split // 2 if len(args[5]) > 1 else fold.split
            return real(*args, fold=AttentionFold(split, fold.key_tile), **options)

        monkeypatch.setattr(layer.impl, "attention", attend)
    assert llm.reset_prefix_cache()
    serve(llm, LENGTH)
    assert caches.of_prompt[LENGTH] == expected
    assert llm.reset_prefix_cache()
    serve(llm, *CROWD)
    assert caches.of_prompt[LENGTH] != expected
