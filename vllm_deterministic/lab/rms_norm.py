"""RMSNorm: ten ways in which the mean square of a row can be added up."""

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

import torch
from torch.nn.functional import pad

from vllm_deterministic.triton_kernels import reference

from .family import Family, Inputs, Strategy, has_kernels
from .inputs import massive, mixed
from .record import Order
from .sums import by_halves, chunk_sums, in_order
from .thread_pool import Merge, merge_by_cat, merge_by_index, merge_in_pairs, merge_on_arrival

CHUNK = 64
MOST_LANES = 32
EPSILON = 1e-6


def standard(x: torch.Tensor) -> torch.Tensor:
    """The library's own mean."""
    return (x * x).mean(-1)


def sequential(x: torch.Tensor) -> torch.Tensor:
    """One square after the other, in index order."""
    return in_order((x * x).t().contiguous().unbind()) / x.shape[-1]


def batch_chunks(x: torch.Tensor) -> torch.Tensor:
    """Chunks of 64 x batch size, added in index order: the larger the batch, the longer the chunk (the fault)."""
    chunk = min(CHUNK * len(x), x.shape[-1])
    return in_order(chunk_sums(x * x, chunk)) / x.shape[-1]


def batch_lanes(x: torch.Tensor) -> torch.Tensor:
    """A row is split over 32 / batch size lanes, which take turns: small batches fill the machine too (the fault)."""
    lanes = max(1, MOST_LANES // len(x))
    squares = pad(x * x, (0, -x.shape[-1] % lanes)).unflatten(-1, (-1, lanes))
    return by_halves(in_order(squares.movedim(-2, 0).contiguous().unbind())) / x.shape[-1]


def fixed_chunks(x: torch.Tensor) -> torch.Tensor:
    """Chunks of 64 added in index order, whatever the batch size."""
    return in_order(chunk_sums(x * x, CHUNK)) / x.shape[-1]


def threaded(merge: Merge, pool: Executor, x: torch.Tensor) -> torch.Tensor:
    """The mean square with chunks of 64 summed by the threads of ``pool``, and brought together by ``merge``."""
    return merge(pool, (x * x).split(CHUNK, -1)) / x.shape[-1]


def kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """This project's Triton kernel: the order follows the width alone."""
    from vllm_deterministic.triton_kernels.rms_norm import rms_norm

    return rms_norm(x, weight, EPSILON)


def without_kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """This project's road without Triton: the library's sum over rows that lie one after the other, never over one."""
    return reference.rms_norm(x, weight, EPSILON)


def family(device: torch.device, pool: Executor) -> Family:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` for x ``[M, H]``."""

    def strategy(
        name: str, mean_square: Callable[[torch.Tensor], torch.Tensor], order: Order, rule: object
    ) -> Strategy:
        def normalize(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(mean_square(x) + EPSILON).unsqueeze(-1) * weight

        return Strategy.of(name, normalize, order, rule)

    merges: tuple[tuple[str, Merge, Order], ...] = (
        ("threads, merged by index", merge_by_index, "fixed"),
        ("threads, lock, as they arrive", merge_on_arrival, "arrival"),
        ("threads, in pairs", merge_in_pairs, "fixed"),
        ("threads, cat + sum", merge_by_cat, "library"),
    )
    own = kernel if has_kernels(device) else without_kernel
    return Family(
        title="RMSNorm",
        strategies=(
            strategy("standard (mean)", standard, "library", standard),
            strategy("sequential", sequential, "fixed", sequential),
            strategy("chunks that follow the batch", batch_chunks, "batch", batch_chunks),
            strategy("lanes that follow the batch", batch_lanes, "batch", batch_lanes),
            strategy("fixed chunks of 64", fixed_chunks, "fixed", fixed_chunks),
            *(strategy(name, partial(threaded, merge, pool), order, merge) for name, merge, order in merges),
            Strategy.of("this project's", own, "fixed", own),
        ),
        inputs=_inputs,
        oracle=_oracle,
    )


def _inputs(data: str, hidden: int, rows: int, generator: torch.Generator) -> Inputs:
    make = mixed if data == "mixed" else massive
    return Inputs(rows=(make(rows, hidden, generator),), shared=(mixed(1, hidden, generator)[0],))


def _oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight
