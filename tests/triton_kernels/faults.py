"""Operations whose order of additions follows the batch, as a library's may: what the checks must see."""

import torch


def ordered_matmul(x: torch.Tensor, weight: torch.Tensor, segments: int) -> torch.Tensor:
    """``x @ weight.T`` with K cut in ``segments``, each summed in ascending order, then added."""
    x, weight = x.float(), weight.float()
    total = None
    for xs, ws in zip(x.chunk(segments, dim=1), weight.chunk(segments, dim=1), strict=True):
        segment = torch.zeros(len(x), len(weight))
        for column in range(xs.shape[1]):
            segment = segment + xs[:, column, None] * ws[:, column]
        total = segment if total is None else total + segment
    return total


def row_sum_by_batch(x: torch.Tensor) -> torch.Tensor:
    """``row_sum`` with more partial sums to a row where there are fewer rows, as a kernel does that fills a device."""
    rows = x.reshape(-1, x.shape[-1])
    lanes = 128 if len(rows) < 4 else 16
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % lanes))
    total = torch.zeros(len(rows), lanes)
    for part in rows.split(lanes, dim=1):
        total = total + part
    while total.shape[1] > 1:
        total = total[:, 0::2] + total[:, 1::2]
    return total.view(x.shape[:-1])
