"""The attention backend on CPU: fixed-split KV over vLLM's paged cache, one fold for decode and prefill."""

import functools
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.bit_class import certified_row_tiles, mirrored
from vllm_deterministic.triton_kernels.reference.attention import KEY_TILE
from vllm_deterministic.triton_kernels.reference.attention_plan import QueryTiles
from vllm_deterministic.triton_kernels.reference.paged_attention import Workspace, cache_units, write_cache

from .config import DeterministicConfig, RefusalError
from .fixed_splits import FixedSplitBackend, refuse_features

logger = init_logger("vllm.deterministic")

BASE_ROWS = 16
CANDIDATE_ROWS = (4, 8, 32, 64, 128)
# Keys times rows of one batch of splits: with eight KV heads their fp32 scores take two megabytes.
MAX_SPLIT_ROWS = 1 << 16


class DeterministicCPUAttentionBackend(FixedSplitBackend, CPUAttentionBackend):
    """Takes the place of CPU_ATTN; layout and sizes of the cache stay as vLLM's own backend has them."""

    @staticmethod
    def get_impl_cls() -> "type[DeterministicCPUAttentionImpl]":
        return DeterministicCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> "type[DeterministicCPUAttentionMetadataBuilder]":
        return DeterministicCPUAttentionMetadataBuilder


@dataclass(frozen=True)
class DeterministicCPUAttentionMetadata:
    """``plans``: by window, the work of one step. The others: see ``reference.paged_attention``."""

    num_actual_tokens: int
    min_batch: int
    workspace: Workspace
    plans: dict[int | None, tuple[QueryTiles, ...]]


class DeterministicCPUAttentionMetadataBuilder(AttentionMetadataBuilder[DeterministicCPUAttentionMetadata]):
    """Plans a step once for all layers of a KV cache group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.kv_split = DeterministicConfig.serving(vllm_config).kv_split
        impls = [layer.impl for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()]
        self.windows = sorted({impl.window for impl in impls}, key=lambda window: window or 0)
        self.group_size = impls[0].num_queries_per_kv
        self.min_batch = torch.get_num_threads()
        self.workspace = Workspace()
        self.row_tiles = certified_attention_rows(self.group_size, kv_cache_spec.head_size, self.min_batch)
        logger.info("deterministic attention: KV split %d, query tiles of %s rows", self.kv_split, self.row_tiles)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DeterministicCPUAttentionMetadata:
        common = common_attn_metadata
        plans = {
            window: reference.plan_attention(
                common.query_start_loc,
                common.seq_lens,
                common.block_table_tensor,
                block_size=self.kv_cache_spec.block_size,
                kv_split=self.kv_split,
                group_size=self.group_size,
                row_tiles=self.row_tiles,
                window=window,
                max_split_rows=MAX_SPLIT_ROWS,
            )
            for window in self.windows
        }
        return DeterministicCPUAttentionMetadata(common.num_actual_tokens, self.min_batch, self.workspace, plans)


class DeterministicCPUAttentionImpl(AttentionImpl[DeterministicCPUAttentionMetadata]):
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
        others = {
            "ALiBi": alibi_slopes is not None,
            "a soft-cap of the scores": bool(logits_soft_cap),
            "attention sinks": sinks is not None,
        }
        refuse_features("CPU", kv_sharing_target_layer_name, attn_type, kv_cache_dtype, others)
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.num_queries_per_kv = num_heads // num_kv_heads
        self.scale = float(scale)
        self.window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the step's keys and values, ``[T, KV heads, D]``."""
        num_tokens = slot_mapping.shape[0]
        write_cache(cache_units(kv_cache, kv_cache.shape[2]), key[:num_tokens], value[:num_tokens], slot_mapping.long())

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DeterministicCPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[T, heads, D]`` into ``output``; keys and values are in the cache already."""
        if attn_metadata is None:  # warming up
            return output
        tokens = attn_metadata.num_actual_tokens
        reference.paged_attention(
            query[:tokens],
            cache_units(kv_cache, kv_cache.shape[2]),
            attn_metadata.plans[self.window],
            scale=self.scale,
            min_batch=attn_metadata.min_batch,
            workspace=attn_metadata.workspace,
            out=output[:tokens],
        )
        return output


@functools.cache
def certified_attention_rows(group_size: int, head_size: int, min_batch: int) -> tuple[int, ...]:
    """The numbers of rows of a query tile that are one bit class for both products of a key tile.

    Args:
        group_size: query heads to a KV head; a tile holds at least one token of each.
        head_size: elements in a head.
        min_batch: the least number of products in a call.

    Raises:
        RefusalError: a row's bytes depend on where it stands or on the number of products.
    """
    base = max(BASE_ROWS, 1 << (group_size - 1).bit_length())
    candidates = [rows for rows in CANDIDATE_ROWS if rows >= group_size and rows != base]
    generator = torch.Generator().manual_seed(1)
    keys = mirrored(KEY_TILE, head_size, sign=1, dtype=torch.float32, generator=generator)
    values = mirrored(head_size, KEY_TILE, sign=1, dtype=torch.float32, generator=generator).t().contiguous()
    # The scores read keys transposed, the weighted sum reads values as they lie.
    products = ((keys.t(), "scores"), (values, "weighted sum"))
    certified = set(candidates) | {base}
    for right, name in products:
        try:
            certified &= set(_certify_product(right, base, candidates, min_batch))
        except ValueError as error:
            raise RefusalError(
                f"attention, {name}: {error}. This CPU's batched matmul cannot be made batch-invariant with "
                f"{min_batch} threads: try another number of cores (VLLM_CPU_OMP_THREADS_BIND)."
            ) from None
    return tuple(sorted(certified))


def _certify_product(right: torch.Tensor, base: int, candidates: list[int], min_batch: int) -> tuple[int, ...]:
    # The number of products in a call and the place of one among them must not matter either.
    calls = [(n, place) for n in (min_batch, min_batch + 1, 3 * min_batch + 1) for place in {0, n // 2, n - 1}]

    def product(rows: torch.Tensor) -> torch.Tensor:
        outs = []
        for n, place in calls:
            left = rows.new_zeros(n, *rows.shape)
            left[place] = rows
            repeated = torch.empty_strided((n, *right.shape), (right.numel(), *right.stride())).copy_(right)
            outs.append(torch.bmm(left, repeated)[place])
        return torch.cat(outs, dim=1)

    each = product(torch.randn(base, right.shape[0])).chunk(len(calls), dim=1)
    if not all(torch.equal(out, each[0]) for out in each):
        raise ValueError(f"the bytes of {base} rows depend on the number of products in a call")
    rows = mirrored(max([base, *candidates]), right.shape[0], sign=-1, dtype=torch.float32, generator=torch.Generator())
    return certified_row_tiles(product, rows, base=base, candidates=candidates)
