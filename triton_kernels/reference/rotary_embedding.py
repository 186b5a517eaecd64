"""Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

import torch


def rotary_embedding(
    positions: torch.Tensor, x: torch.Tensor, cos_sin_cache: torch.Tensor, head_size: int, is_neox_style: bool
) -> torch.Tensor:
    """Rotate the first ``rotary_dim`` elements of each head by its token's position; the others pass through.

    Products and sums are fp32, each rounded by itself, with one rounding to ``x.dtype`` at the end.

    Args:
        positions: ``[T]`` int64.
        x: ``[T, heads * head_size]``, bf16, fp16 or fp32.
        cos_sin_cache: ``[max_position, rotary_dim]``: the cosines, then the sines.
        head_size: elements in a head.
        is_neox_style: pairs are (i, i + rotary_dim / 2); otherwise (2 i, 2 i + 1).

    Returns:
        ``[T, heads * head_size]`` in ``x.dtype``.
    """
    rotary_dim = cos_sin_cache.shape[-1]
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    heads = x.view(x.shape[0], -1, head_size)
    rotated = heads[..., :rotary_dim].float()
    if is_neox_style:
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    parts = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(parts, dim=-1) if is_neox_style else torch.stack(parts, dim=-1).flatten(-2)
    return torch.cat([rotated.to(x.dtype), heads[..., rotary_dim:]], dim=-1).view(x.shape)
