"""Matrix product: five ways in which the terms of one element can be added up."""

from concurrent.futures import Executor

import torch
from torch.nn.functional import linear

from vllm_deterministic.triton_kernels import reference

from .family import Family, Inputs, Strategy, has_kernels
from .inputs import mirrored, mixed
from .sums import in_order

COLUMNS = 256
TILE = 16
SEGMENT = 256
MOST_SEGMENTS = 32


def library(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """One call of the library for all rows of the batch; its kernel, and with it its order, is the library's choice."""
    return linear(x, w)


def batch_segments(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """K cut into 32 / batch size segments, so that small batches fill the machine too (split-K, the fault)."""
    segments = max(1, MOST_SEGMENTS // len(x))
    return _segmented(x, w, x.shape[1] // segments)


def fixed_tile(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The library called for 16 rows at a time, the last call filled up with zero rows: it sees one shape only."""
    return reference.matmul(x, lambda rows: linear(rows, w), (TILE,))


def fixed_segments(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """K cut into segments of 256, each at tiles of 16 rows, added in index order: split-K whatever the batch size."""
    return _segmented(x, w, SEGMENT)


def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """This project's Triton kernel: K in an order that follows the shape of the weight alone."""
    from vllm_deterministic.triton_kernels.matmul import matmul

    return matmul(x, w)


def _segmented(x: torch.Tensor, w: torch.Tensor, segment: int) -> torch.Tensor:
    pairs = zip(x.split(segment, 1), w.split(segment, 1), strict=True)
    return in_order([fixed_tile(part, weight.contiguous()) for part, weight in pairs])


def family(device: torch.device, pool: Executor) -> Family:
    """``x @ w.T`` for x ``[M, K]`` and w ``[256, K]``. Without the kernel the fixed tile is what this project runs."""
    own = [Strategy.of("this project's", kernel, "fixed", kernel)] if has_kernels(device) else []
    return Family(
        title="Matrix product",
        strategies=(
            Strategy.of("library", library, "library", library),
            Strategy.of("segments that follow the batch", batch_segments, "batch", batch_segments),
            Strategy.of("fixed segments of 256", fixed_segments, "fixed", fixed_segments),
            Strategy.of("fixed tile of 16 rows", fixed_tile, "fixed", fixed_tile),
            *own,
        ),
        inputs=_inputs,
        oracle=lambda x, w: linear(x.double(), w.double()),
    )


def _inputs(data: str, hidden: int, rows: int, generator: torch.Generator) -> Inputs:
    if data == "mixed":
        return Inputs((mixed(rows, hidden, generator),), (mixed(COLUMNS, hidden, generator),))
    return Inputs((mirrored(rows, hidden, -1, generator),), (mirrored(COLUMNS, hidden, 1, generator),))
