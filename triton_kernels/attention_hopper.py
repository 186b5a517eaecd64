"""Attention of long queries on Hopper, by a warp-specialized kernel with the bytes of ``attention_kernel``."""

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_hopper_kernel import WARPGROUP_ROWS, attention_hopper_kernel
from .attention_plan import HopperTile, long_tiles
from .launch import capability

_HEAD_DIMS = (64, 128)
# With larger ones the state does not fit the registers.
_KEY_TILE = 64
_ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Of a warpgroup.
_WARPS = 4
# Registers of a thread at launch (the register file shared by all warps, rounded down to 8), and what the loading warp
# keeps and each consumer takes after that, by number of consumers.
_REGISTERS = {2: (168, 24, 240), 3: (128, 32, 160)}


def takes(q: torch.Tensor, key_tile: int) -> bool:
    """Whether ``attention_hopper`` can run, the caches being readable by descriptor."""
    return capability(q.device) == (9, 0) and q.shape[2] in _HEAD_DIMS and key_tile == _KEY_TILE


def attention_hopper(
    q: torch.Tensor,
    k: Sequence[Any],
    v: Sequence[Any],
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    tile: HopperTile,
    decodes: int,
    short_rows: int,
    max_seq_len: int,
    factor: float,
    window: int | None,
    sinks: torch.Tensor | None,
    block_size: int,
    kv_heads: int,
    split: int,
    pdl: bool,
) -> None:
    """Attention of the requests of more than ``short_rows`` rows, as ``attention`` defines it, on sm_90.

    Args:
        q, block_table, query_start_loc, seq_lens, decodes, window, sinks, out: as ``attention`` has them; D is 64 or
            128.
        k, v: half a cache each: its descriptor of ``[key tile, D]`` and, as it counts, the rows of a block, the rows of
            a head and the columns of a head.
        tile: decides speed alone.
        factor: of the products, log2(e) included.
        block_size: slots of a block, a multiple of the key tile.
        split: positions of a split.
    """
    group = q.shape[1] // kv_heads
    tiles = long_tiles(len(q), len(seq_lens), decodes, group, tile.warpgroups * WARPGROUP_ROWS.value)
    at_launch, loading, consuming = _REGISTERS[tile.warpgroups]
    layout = gl.NVMMASharedLayout.get_default_for(k[0].block_shape, _ELEMENT[q.dtype])
    k_desc, v_desc = (TensorDescriptor(x[0].base, x[0].shape, x[0].strides, x[0].block_shape, layout) for x in (k, v))
    attention_hopper_kernel[(tiles * kv_heads,)](
        q, k_desc, v_desc, block_table, query_start_loc, seq_lens, sinks, out,
        len(seq_lens), decodes, tiles, short_rows, max_seq_len, factor, window or 0,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), block_table.stride(0), *k[1:], *v[1:],
        KV_HEADS=kv_heads, G=group, BLOCK_SIZE=block_size, SPLIT=split, CONSUMERS=tile.warpgroups,
        STAGES=tile.stages, SINKS=sinks is not None, WINDOW=window is not None,
        LOAD_REGISTERS=loading, REGISTERS=consuming, PDL=pdl,
        num_warps=_WARPS, maxnreg=at_launch, launch_pdl=pdl, enable_fp_fusion=False,
    )  # fmt: skip
