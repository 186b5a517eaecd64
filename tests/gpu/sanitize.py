"""Every kernel once or twice at small and odd sizes, for `make test-sanitizer` to watch each access to memory.

    compute-sanitizer --error-exitcode 1 python3 -P tests/gpu/sanitize.py
    compute-sanitizer --error-exitcode 1 python3 -P tests/gpu/sanitize.py --plant    # must be reported

torch must not keep freed memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1): what lies past an allocation would be another one.
"""

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from vllm_deterministic.triton_kernels.attention import attention
from vllm_deterministic.triton_kernels.cublaslt import cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.matmul import batched_matmul, matmul
from vllm_deterministic.triton_kernels.tile_table import tile_plan
from vllm_deterministic.triton_kernels.tiles import class_reference
from vllm_deterministic.triton_kernels.token_logprobs import token_logprobs
from vllm_deterministic.triton_kernels.top_k_top_p import top_k_top_p

DEVICE = torch.device("cuda", 0)
ROWS = (1, 3, 130)
# Odd and unaligned, aligned and no multiple of a tile, two segments, and larger than every tile.
SHAPES = ((77, 1001), (1000, 296), (520, 4096), (2056, 264))
WIDEST = 40_000


@triton.jit
def _write_past_the_end(out, size, block: tl.constexpr):
    tl.store(out + tl.arange(0, block), 1.0, mask=tl.arange(0, block) <= size)


def row_kernels() -> None:
    """The operations of `test_row_kernels.py` at their narrower widths."""
    spec = importlib.util.spec_from_file_location("row_kernels", Path(__file__).with_name("test_row_kernels.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["row_kernels"] = module
    spec.loader.exec_module(module)
    for op in module.OPS:
        for dtype in (torch.bfloat16, torch.float32):
            for width in op.widths:
                if width <= WIDEST:
                    for rows in ROWS[:2]:
                        op(torch.randn(rows, width, device=DEVICE).to(dtype))
        torch.cuda.synchronize()
        print(op.name, flush=True)


def products() -> None:
    """Every tile that the table may choose for the shapes, and some algorithms of cuBLASLt."""
    for dtype in (torch.bfloat16, torch.float32):
        for n, k in SHAPES:
            plan = tile_plan(dtype, capability(DEVICE), n, k, cublaslt(DEVICE))
            w, bias = torch.randn(n, k, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE).to(dtype)
            for rows in ROWS:
                x = torch.randn(rows, k, device=DEVICE).to(dtype)
                for tile in (*plan.tiles, class_reference(dtype)):
                    matmul(x, w, tile=tile, segments=plan.segments)
                matmul(x, w, bias)
                matmul(x, w.t().contiguous().t())
                batched_matmul(x.expand(2, rows, k), w.t().expand(2, k, n))
            torch.cuda.synchronize()
            print(f"matmul {dtype} {n}x{k}, {len(plan.tiles)} tiles", flush=True)


def attention_roads(block_size: int) -> None:
    """Decodes, chunks and both in one batch, over pages that hold less than a block in the end."""
    head_dim, lengths = 128, (1, 37, 600, 1100)
    blocks = [-(-length // block_size) for length in lengths]
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32, device=DEVICE)
    numbers = iter(range(sum(blocks)))
    for row, count in zip(table, blocks, strict=True):
        row[:count] = torch.tensor([next(numbers) for _ in range(count)])
    k, v = (torch.randn(sum(blocks), block_size, 2, head_dim, device=DEVICE).bfloat16() for _ in range(2))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for queries in ((1, 1, 1, 1), (1, 37, 1, 300), (1, 3, 3, 3)):
        start = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32, device=DEVICE)
        q = torch.randn(sum(queries), 8, head_dim, device=DEVICE).bfloat16()
        for window in (None, 100):
            attention(q, k, v, table, start, seq_lens, scale=0.1, max_query_len=max(queries), window=window)
    torch.cuda.synchronize()
    print(f"attention, blocks of {block_size}", flush=True)


def sampling() -> None:
    """Cuts among candidates and in rows, whose logits are peaked or flat, and logprobs."""
    for width, rows, scale in itertools.product((77, 9001, WIDEST), ROWS, (8.0, 0.5)):
        x = torch.randn(rows, width, device=DEVICE) * scale
        token_logprobs(x.bfloat16(), torch.randint(width, (rows, 33), device=DEVICE))
        k = torch.full((rows,), 20, dtype=torch.int32, device=DEVICE)
        k[::2] = width
        top_k_top_p(x, k, torch.full((rows,), 0.95, device=DEVICE))
    torch.cuda.synchronize()
    print("sampling", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plant", action="store_true", help="write one element past an output instead")
    if parser.parse_args().plant:
        _write_past_the_end[(1,)](torch.empty(512, device=DEVICE), 512, block=1024)
        torch.cuda.synchronize()
        return
    row_kernels()
    sampling()
    for block_size in (16, 64):  # a tile of keys is gathered from smaller ones, and loaded at once from larger ones
        attention_roads(block_size)
    products()


if __name__ == "__main__":
    main()
