"""Times the heads and warps that a program of the fused query and key norm and rotation may take, bytes compared.

    python benchmarks/tune_rotary.py

How many heads share a program is free as long as each head lies over as many threads, and so is summed in one order.
The kernel's own choice is ``row_tile`` of the head's size. Times are medians of CUDA graph replays, rotated past the L2
cache; a share of 1 is the rate of a device copy.
"""

from dataclasses import replace

import torch
from bench_row_kernels import HEAD_SIZE, HEADS, KV_HEADS, case, microseconds
from vllm_deterministic.triton_kernels import rotary_embedding
from vllm_deterministic.triton_kernels.bit_class import same_bytes
from vllm_deterministic.triton_kernels.rows import row_tile

ROWS = (64, 1024, 8192)
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
# Heads and warps of a program.
CHOICES = ((16, 4), (16, 2), (16, 1), (8, 4), (8, 2), (8, 1), (4, 1), (32, 8), (32, 4), (32, 2))


def main() -> None:
    print(f"{'op':26} {'rows':>5} {'heads':>5} {'warps':>5} {'us':>8} {'of copy':>7}")
    for op in ("qk_norm_rotary_embedding", "qk_rotary_embedding"):
        for rows in ROWS:
            inputs = [torch.randn(rows, WIDTH, device="cuda").bfloat16() for _ in range(4)]
            ours, _, moved = case(op, WIDTH, inputs)
            copies = [torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2 * len(inputs))]

            def copy(i: int, copies: list[torch.Tensor] = copies) -> object:
                return copies[2 * i].copy_(copies[2 * i + 1])

            copy_us = microseconds(copy, len(inputs))
            expected = ours(0)
            for heads, warps in CHOICES:
                tile = replace(row_tile(HEAD_SIZE), rows=heads, warps=warps)
                rotary_embedding.row_tile = lambda size, tile=tile: tile
                us = microseconds(ours, len(inputs))
                same = all(same_bytes(a, b) for a, b in zip(ours(0), expected, strict=True))
                note = "" if same else "  other bytes"
                print(f"{op:26} {rows:5} {heads:5} {warps:5} {us:8.2f} {copy_us / us:7.3f}{note}", flush=True)
            rotary_embedding.row_tile = row_tile


if __name__ == "__main__":
    main()
