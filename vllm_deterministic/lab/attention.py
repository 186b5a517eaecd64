"""Attention of one new token a request over its 1000 keys: three ways to cut the keys and fold the parts."""

import contextlib
import math
from collections.abc import Iterable
from concurrent.futures import Executor
from functools import reduce

import torch
from torch.nn.functional import pad

from vllm_deterministic.aten.context import deterministic_ops
from vllm_deterministic.triton_kernels.reference.attention import KEY_TILE, Partial, merge, split_partial

from .family import Family, Inputs, Strategy, has_kernels
from .inputs import mirrored, mixed

KEYS = 1000
HEAD_SIZE = 64
SPLIT = 256
MOST_SPLITS = 32


def batch_splits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys cut into 32 / batch size splits, so that small batches fill the machine too (the fault)."""
    splits = max(1, MOST_SPLITS // len(q))
    return _each_request(q, k, v, math.ceil(k.shape[1] / splits))


def fixed_splits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys cut every 256, whatever the batch size: 1000 keys are 3 x 256 + 232."""
    return _each_request(q, k, v, SPLIT)


def project(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """This project's fold: the same splits of 256, each in tiles of 64 keys, all requests in one call.

    On a GPU its products are this project's too: the library's follow the number of requests.
    """
    keys, lacking = k.shape[1], -k.shape[1] % SPLIT
    k, v = (pad(x, (0, 0, 0, lacking)).unflatten(1, (-1, SPLIT // KEY_TILE, 1, KEY_TILE)) for x in (k, v))
    visible = (torch.arange(keys + lacking, device=q.device) < keys).view(k.shape[1], 1, -1, 1, 1, KEY_TILE)
    rows = (q * q.shape[-1] ** -0.5).unsqueeze(1)
    # With fewer products than threads, a library cuts one product across threads.
    min_batch = torch.get_num_threads() + 1
    partials = (
        split_partial(rows, k[:, split], v[:, split], visible[split].expand(len(q), -1, -1, -1, -1), min_batch)
        for split in range(k.shape[1])
    )
    with deterministic_ops() if has_kernels(q.device) else contextlib.nullcontext():
        return _fold(partials).squeeze(1)


def _each_request(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, split: int) -> torch.Tensor:
    """One request after the other, so that no library call sees the batch; splits folded in index order."""
    outs = []
    for rows, keys, values in zip(q * q.shape[-1] ** -0.5, k, v, strict=True):
        parts = zip(keys.split(split), values.split(split), strict=True)
        outs.append(_fold(_partial(rows, *part) for part in parts))
    return torch.stack(outs)


def _partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial:
    scores = q @ k.t()
    maximum = scores.amax(-1)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    return Partial(maximum, weights.sum(-1), weights @ v)


def _fold(partials: Iterable[Partial]) -> torch.Tensor:
    whole = reduce(merge, partials)
    return whole.weighted / whole.total.unsqueeze(-1)


def family(device: torch.device, pool: Executor) -> Family:
    """``softmax(q k^T / 8) v`` for q ``[M, hidden / 64, 64]``, k and v ``[M, 1000, 64]``: all heads share the keys."""
    return Family(
        title="Attention",
        strategies=(
            Strategy.of("splits that follow the batch", batch_splits, "batch", batch_splits),
            Strategy.of("fixed splits of 256", fixed_splits, "fixed", fixed_splits),
            Strategy.of("this project's fold", project, "fixed", project),
        ),
        inputs=_inputs,
        oracle=_oracle,
    )


def _inputs(data: str, hidden: int, rows: int, generator: torch.Generator) -> Inputs:
    """Adversarial: the second half of the keys repeats the first, the values with the other sign."""
    q = torch.randn(rows, hidden // HEAD_SIZE, HEAD_SIZE, generator=generator)
    k = torch.randn(rows, KEYS, HEAD_SIZE, generator=generator)
    if data == "mixed":
        return Inputs((q, k, mixed(rows * KEYS, HEAD_SIZE, generator).view(rows, KEYS, HEAD_SIZE)))
    k[:, KEYS // 2 :] = k[:, : KEYS // 2]
    return Inputs((q, k, mirrored(rows * HEAD_SIZE, KEYS, -1, generator).view(rows, HEAD_SIZE, KEYS).mT.contiguous()))


def _oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT * HEAD_SIZE**-0.5, -1) @ v
