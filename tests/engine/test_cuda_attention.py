"""The attention backend for GPUs on CPU tensors, its kernels interpreted: vLLM's cache and metadata in, rows out."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_deterministic.engine import cuda_attention
from vllm_deterministic.engine.config import RefusalError
from vllm_deterministic.engine.cuda_attention import (
    PREFERRED_BLOCK_SIZE,
    ROADS,
    DeterministicCUDAAttentionBackend,
    DeterministicCUDAAttentionImpl,
    DeterministicCUDAAttentionMetadata,
    DeterministicCUDAAttentionMetadataBuilder,
)

from ..triton_kernels.attention_oracle import attention_oracle
from ..triton_kernels.interpreter import interpreting
from ..triton_kernels.oracles import assert_close
from ..triton_kernels.paged_requests import LAYOUTS, Piece, paged, random_tokens, whole

# Numpy warns of the NaN in unused slots, which a device computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HEADS, KV_HEADS, HEAD_DIM, SCALE, SPLIT = 4, 2, 64, 0.2, 128


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreting():
        yield


def impl(split: int = SPLIT, road: str = "triton", **features: Any) -> DeterministicCUDAAttentionImpl:
    config = VllmConfig(additional_config={"deterministic": {"kv_split": split, "attention": road}})
    with set_current_vllm_config(config):
        return DeterministicCUDAAttentionImpl(HEADS, HEAD_DIM, SCALE, KV_HEADS, **features)


def serve(
    layer: DeterministicCUDAAttentionImpl, pieces: list[Piece], padding: int = 0, layout: str = LAYOUTS[0]
) -> torch.Tensor:
    """The rows of all pieces by vLLM's road, with rows of padding behind them."""
    q, keys, values, table, starts, lengths = paged(pieces, 16, layout)
    cache = torch.cat((keys, values), dim=-1).transpose(1, 2)  # [blocks, KV heads, block size, 2 * D]
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(pieces),
        num_actual_tokens=len(q),
        max_query_len=max(map(len, pieces)),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(0),
    )
    metadata = DeterministicCUDAAttentionMetadataBuilder.build(SimpleNamespace(), 0, common)  # type: ignore[arg-type]
    query = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, padding), value=float("nan"))
    output = torch.full_like(query, 7.0)
    assert layer.forward(SimpleNamespace(), query, query, query, cache, metadata, output) is output  # type: ignore[arg-type]
    assert bool((output[len(q) :] == 7.0).all())
    return output[: len(q)]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"sliding_window": 50},
        {"logits_soft_cap": 3.0},
        {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
        {"sinks": True},
    ],
    ids=lambda features: next(iter(features), "none"),
)
def test_features_reach_the_kernel(features: dict[str, Any], road: str) -> None:
    tokens = random_tokens(150, HEADS, KV_HEADS, HEAD_DIM, torch.float32, torch.Generator().manual_seed(0))
    sinks = torch.linspace(-1, 2, HEADS) if "sinks" in features else None
    layer = impl(road=road, **features | ({"sinks": sinks} if sinks is not None else {}))
    slopes = features.get("alibi_slopes")
    expected = attention_oracle(
        tokens,
        scale=SCALE,
        window=features.get("sliding_window"),
        softcap=features.get("logits_soft_cap"),
        alibi_slopes=None if slopes is None else torch.tensor(slopes),
        sinks=sinks,
    )
    assert_close(serve(layer, [whole(tokens)]), expected)
    mixed = serve(layer, [Piece(tokens, 149, 150), Piece(tokens, 0, 70), Piece(tokens, 140, 145)], padding=3)
    assert_close(mixed, torch.cat((expected[149:150], expected[:70], expected[140:145])))


def test_the_split_decides_the_bytes() -> None:
    tokens = random_tokens(300, HEADS, KV_HEADS, HEAD_DIM, torch.float32, torch.Generator().manual_seed(0))
    piece = [Piece(tokens, 290, 300)]
    assert torch.equal(serve(impl(), piece), serve(impl(), piece, layout=LAYOUTS[1]))
    assert not torch.equal(serve(impl(), piece), serve(impl(split=256), piece))


def test_memory_is_measured_without_metadata() -> None:
    output = torch.ones(3, HEADS, HEAD_DIM)
    layer: Any = SimpleNamespace()
    impl().forward(layer, output, output, output, torch.empty(0), None, output)
    assert not output.any()


@pytest.mark.parametrize(
    ("features", "what"),
    [
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8 is not covered"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention of type .*encoder_only.* is not covered"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV sharing between layers is not covered"),
    ],
)
def test_refused(features: dict[str, Any], what: str) -> None:
    with pytest.raises(RefusalError, match=f"(?i){what}"):
        impl(**features)


def test_only_of_a_deterministic_engine() -> None:
    with set_current_vllm_config(VllmConfig()), pytest.raises(RuntimeError, match="start the other engine"):
        DeterministicCUDAAttentionImpl(HEADS, HEAD_DIM, SCALE, KV_HEADS)


def reasons(**changes: Any) -> list[str]:
    """Why vLLM would not take the backend for a layer."""
    layer: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 64,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": AttentionType.DECODER,
        "has_sliding_window": True,
        "use_batch_invariant": True,
    }
    return DeterministicCUDAAttentionBackend.validate_configuration(**layer | changes)


def test_vllm_takes_it_for_what_it_covers() -> None:
    assert reasons() == []
    for block_size in (16, 32, 64, 128, None):
        assert reasons(block_size=block_size) == []
    for changes, why in (
        ({"head_size": 112}, "head_size not supported"),
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": AttentionType.ENCODER}, f"attention type {AttentionType.ENCODER} not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
    ):
        assert reasons(**changes) == [why]


def test_what_vllm_asks_of_a_backend() -> None:
    backend = DeterministicCUDAAttentionBackend
    assert backend.get_preferred_block_size(16) == PREFERRED_BLOCK_SIZE
    layouts = backend.supported_kv_cache_layouts()
    assert layouts[0] is KVCacheLayout.LBHNC
    assert set(layouts) == set(KVCacheLayout)
    builder: Any = backend.get_builder_cls()
    for road, support in (("triton", AttentionCGSupport.ALWAYS), ("flex", AttentionCGSupport.NEVER)):
        config = VllmConfig(additional_config={"deterministic": {"attention": road}})
        assert builder.get_cudagraph_support(config, None) is support
    assert DeterministicCUDAAttentionMetadata.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("starts", "decodes"), [([0], 0), ([0, 1], 1), ([0, 1, 2], 2), ([0, 1, 2, 7, 8], 2), ([0, 3, 4], 0), ([0, 0, 1], 0)]
)
def test_leading_decodes(starts: list[int], decodes: int) -> None:
    assert cuda_attention._leading_decodes(torch.tensor(starts, dtype=torch.int32)) == decodes
