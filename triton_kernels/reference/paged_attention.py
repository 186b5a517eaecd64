"""Attention of a step's tokens over the paged KV cache, by plan."""

import math
from collections.abc import Sequence

import torch

from .attention import KEY_TILE, Partial, merge, split_partial
from .attention_plan import QueryTiles, cache_unit


def cache_units(kv_cache: torch.Tensor, block_size: int) -> torch.Tensor:
    """The cache as units of keys and values.

    Keys of one unit and one head lie together, so a key tile is read without rearranging it.

    Args:
        kv_cache: contiguous, ``blocks * H * block_size * 2 * D`` elements in ``[blocks, H, block_size, 2 * D]``.
        block_size: slots in a block.

    Returns:
        a view ``[units, 2, H, slots in a unit, D]``; index 0 of the second dimension holds keys, 1 values.
    """
    _, H, _, D2 = kv_cache.shape
    return kv_cache.view(-1, 2, H, cache_unit(block_size), D2 // 2)


def write_cache(units: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store keys and values ``[T, H, D]`` at their slots ``[T]``; negative slots are padding.

    A unit is cleared when its first slot is written: a masked key has weight zero, and zero times a NaN that an earlier
    request left behind would not be zero.
    """
    slots = units.shape[3]
    if bool((slot_mapping < 0).any()):
        used = slot_mapping >= 0
        k, v, slot_mapping = k[used], v[used], slot_mapping[used]
    unit, slot = slot_mapping // slots, slot_mapping % slots
    units[unit[slot == 0]] = 0
    units[unit, 0, :, slot] = k
    units[unit, 1, :, slot] = v


class Workspace:
    """Memory for the key tiles in use, kept from layer to layer: fresh pages cost several times the copy into them."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and dtype with any content, valid until the next call with the same name and dtype."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


def paged_attention(
    q: torch.Tensor,
    units: torch.Tensor,
    plan: Sequence[QueryTiles],
    *,
    scale: float,
    min_batch: int,
    workspace: Workspace,
    out: torch.Tensor,
) -> None:
    """Attention of every row in ``plan``, written to ``out``.

    Args:
        q: ``[T, query heads, D]``, bf16, fp16 or fp32.
        units: the KV cache from ``cache_units``, in ``q.dtype``.
        plan: from ``attention_plan.plan_attention`` for the same block size.
        scale: factor of the scores.
        min_batch: see ``split_partial``.
        workspace: may serve any number of calls, one at a time.
        out: ``[T, query heads, D]``; rounded once to its dtype.
    """
    halves = units.view(-1, *units.shape[2:])
    H, D = units.shape[2], units.shape[4]
    group = q.shape[1] // H
    for tiles in plan:
        rows = _tile_rows(q, tiles, H).float() * scale
        state = Partial(
            rows.new_full(rows.shape[:3], float("-inf")), rows.new_zeros(rows.shape[:3]), torch.zeros_like(rows)
        )
        for batch in tiles.batches:
            splits = len(batch.tile)
            k, v = (
                _read(halves, batch.units * 2 + half, name, workspace).view(splits, -1, H, KEY_TILE, D)
                for half, name in enumerate(("k", "v"))
            )
            partial = split_partial(rows[batch.tile], k, v, batch.visible, min_batch)
            for begin, end in batch.runs:
                _fold(state, batch.tile[begin:end], partial, slice(begin, end))
        result = state.weighted / state.total.unsqueeze(-1)
        result = result[:, :, : tiles.tokens * group].view(-1, H, group, tiles.tokens, D)
        result = result.permute(0, 3, 1, 2, 4).reshape(-1, tiles.tokens, q.shape[1], D)
        out[tiles.token[tiles.valid]] = result[tiles.valid].to(out.dtype)


def _tile_rows(q: torch.Tensor, tiles: QueryTiles, H: int) -> torch.Tensor:
    """``[I, H, R, D]``: for each KV head the tokens of its first query head, then of its second; the rest repeats."""
    D = q.shape[-1]
    rows = q[tiles.token].view(-1, tiles.tokens, H, q.shape[1] // H, D).permute(0, 2, 3, 1, 4).flatten(2, 3)
    lacking = tiles.rows - rows.shape[2]
    return rows if not lacking else torch.cat([rows, rows[:, :, -1:].expand(-1, -1, lacking, -1)], dim=2)


def _read(halves: torch.Tensor, index: torch.Tensor, name: str, workspace: Workspace) -> torch.Tensor:
    """Key tiles ``[C * T, H, KEY_TILE, D]`` as fp32."""
    _, H, slots, D = halves.shape
    read = workspace.take(name, (len(index), H, slots, D), halves.dtype)
    torch.index_select(halves, 0, index, out=read)
    if slots < KEY_TILE:
        read = read.view(-1, KEY_TILE // slots, H, slots, D).transpose(1, 2).reshape(-1, H, KEY_TILE, D)
    if read.dtype == torch.float32:
        return read
    return workspace.take(f"{name} widened", read.shape, torch.float32).copy_(read)


def _fold(state: Partial, tile: torch.Tensor, partial: Partial, part: slice) -> None:
    merged = merge(
        Partial(state.maximum[tile], state.total[tile], state.weighted[tile]),
        Partial(partial.maximum[part], partial.total[part], partial.weighted[part]),
    )
    state.maximum[tile], state.total[tile], state.weighted[tile] = merged.maximum, merged.total, merged.weighted
