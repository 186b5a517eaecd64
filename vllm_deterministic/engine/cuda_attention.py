"""The attention backend on a GPU: fixed splits over vLLM's paged cache, one fold for decode and prefill."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_deterministic.triton_kernels.attention import HEAD_DIMS, attention
from vllm_deterministic.triton_kernels.attention_plan import BUSY_TILES, MOST_SHORT_ROWS, AttentionFold
from vllm_deterministic.triton_kernels.flex_attention import split_flex_attention

from .config import DeterministicConfig
from .fixed_splits import FixedSplitBackend, refuse_features

KEY_TILE = 64
# Blocks of a key tile each let the copy engine load a tile at once.
PREFERRED_BLOCK_SIZE = 64
ROADS: dict[str, Callable[..., torch.Tensor]] = {"triton": attention, "flex": split_flex_attention}


class DeterministicCUDAAttentionBackend(FixedSplitBackend, AttentionBackend):
    """vLLM's member CUSTOM; layout and sizes of the cache stay as vLLM's own backends have them."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, PREFERRED_BLOCK_SIZE)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Slots of a head in a row first: a tile of keys and values is then one piece of memory."""
        first = KVCacheLayout.LBHNC
        return (first, *(layout for layout in KVCacheLayout if layout is not first))

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: the host's query lengths say which requests decode."""
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> "type[DeterministicCUDAAttentionImpl]":
        return DeterministicCUDAAttentionImpl

    @staticmethod
    def get_builder_cls() -> "type[DeterministicCUDAAttentionMetadataBuilder]":
        return DeterministicCUDAAttentionMetadataBuilder


@dataclass(frozen=True)
class DeterministicCUDAAttentionMetadata:
    """One step, in tensors that lie on the device already; see ``triton_kernels.attention``."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    decodes: int
    max_query_len: int
    max_seq_len: int


class DeterministicCUDAAttentionMetadataBuilder(AttentionMetadataBuilder[DeterministicCUDAAttentionMetadata]):
    """Hands a step's tensors on: plans follow from what the host knows, so nothing is read back from the device."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """FlexAttention's calls follow from the longest context: a graph would hold those of the longest possible."""
        road = DeterministicConfig.serving(vllm_config).attention
        return AttentionCGSupport.ALWAYS if road == "triton" else AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        impls = {layer.impl.kernel: layer.impl for layer in layers}
        for impl in impls.values():
            impl.compile(kv_cache_spec.block_size, kv_cache_spec.dtype, device)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> DeterministicCUDAAttentionMetadata:
        """Metadata of a graph, which is replayed on other batches: it promises nothing of this one."""
        return replace(self.build(0, common_attn_metadata), decodes=0)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DeterministicCUDAAttentionMetadata:
        common = common_attn_metadata
        return DeterministicCUDAAttentionMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            _leading_decodes(common.query_start_loc_cpu),
            common.max_query_len,
            common.max_seq_len,
        )


class DeterministicCUDAAttentionImpl(AttentionImpl[DeterministicCUDAAttentionMetadata]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refuse_features("a GPU", kv_sharing_target_layer_name, attn_type, kv_cache_dtype)
        deterministic = DeterministicConfig.serving(get_current_vllm_config())
        self.attention = ROADS[deterministic.attention]
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale = float(scale)
        self.window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.fold = AttentionFold(deterministic.kv_split, KEY_TILE)
        self.sinks = sinks
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.softcap = logits_soft_cap or None

    @property
    def kernel(self) -> tuple[Any, ...]:
        """What this layer's kernels are compiled for, its cache apart."""
        features = self.window is not None, self.softcap is not None, self.alibi_slopes is not None
        return self.num_heads, self.num_kv_heads, self.head_size, *features, self.sinks is not None

    def compile(self, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile the kernels of every load: while serving it would be a spike of latency."""
        cache = torch.zeros(1, self.num_kv_heads, block_size, 2 * self.head_size, dtype=dtype, device=device)
        for requests, tokens, positions in _loads(self.num_heads // self.num_kv_heads, self.num_kv_heads, self.fold):
            columns = -(-max(tokens, positions) // block_size)
            metadata = DeterministicCUDAAttentionMetadata(
                requests * tokens,
                torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens,
                torch.full((requests,), tokens, dtype=torch.int32, device=device),
                torch.zeros(requests, columns, dtype=torch.int32, device=device),
                0,
                tokens,
                max(tokens, positions),
            )
            query = torch.zeros(requests * tokens, self.num_heads, self.head_size, dtype=dtype, device=device)
            self._attend(query, cache, metadata, torch.empty_like(query))
        torch.cuda.synchronize(device)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the step's keys and values, ``[T, KV heads, D]``."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        ops.reshape_and_cache_flash(
            key, value, keys, values, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DeterministicCUDAAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[T, heads, D]`` into ``output``; keys and values are in the cache already."""
        if attn_metadata is None:  # memory is measured
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        self._attend(query[:tokens], kv_cache, attn_metadata, output[:tokens])
        return output

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: DeterministicCUDAAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        promises = {"decodes": metadata.decodes} if self.attention is attention else {}
        self.attention(
            query,
            keys,
            values,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=self.scale,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            fold=self.fold,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            out=output,
            **promises,
        )


def _leading_decodes(query_start_loc: torch.Tensor) -> int:
    """How many of the first requests have one query token; vLLM puts them first. ``query_start_loc`` is the host's."""
    query_lens = query_start_loc.diff()
    longer = (query_lens != 1).nonzero()
    return int(longer[0]) if len(longer) else len(query_lens)


def _loads(group: int, kv_heads: int, fold: AttentionFold) -> Iterator[tuple[int, int, int]]:
    """Requests, their query tokens and positions: one load for each kernel that a plan may ask for."""
    for positions in (2 * fold.split, 16 * fold.split):
        for requests in (1, BUSY_TILES // kv_heads + 1):
            yield requests, 1, positions
    for rows in (16, 32, MOST_SHORT_ROWS):
        yield 1, rows // group + 1, 2 * fold.split
