"""Sum over the last dimension in an order that follows its length alone."""

import torch


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row by torch's own reduction.

    Torch sums a contiguous last dimension row by row in an order that its length decides, with one exception: a single
    output is cut across threads. So one row is summed beside a copy of itself.

    Args:
        x: ``[..., H]`` fp32.

    Returns:
        ``[...]`` fp32.
    """
    rows = x.contiguous().view(-1, x.shape[-1])
    if rows.shape[0] == 1:
        rows = torch.cat([rows, rows])
    return rows.sum(-1)[: x.numel() // x.shape[-1]].view(x.shape[:-1])
