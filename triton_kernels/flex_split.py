"""One call of torch's FlexAttention, compiled once: jobs of one shape, each a tile of queries over one split."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

# Rows of one program's tile, the same for a decode as for a prompt.
BLOCK_M = 64

ScoreMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SplitKernel:
    """What a kernel is compiled for beside shapes and dtypes; all as ``split_flex_attention`` takes it.

    ``group``: query heads to a KV head, which lie in a tile as rows ``token * group + head % group``.
    """

    group: int
    key_tile: int
    scale: float
    window: int | None
    softcap: float | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None

    def options(self, head_dim: int) -> dict[str, object]:
        """Torch's kernel options: every one of the forward kernel that a heuristic or a device would choose else."""
        return {
            # Fewer than 128 rows would go to another kernel, whose number of splits follows the batch.
            "FORCE_USE_FLEX_ATTENTION": True,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": self.key_tile,
            "num_warps": 4,
            "num_stages": 2 if head_dim <= 128 else 1,
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "USE_TMA": False,
            "FLOAT32_PRECISION": "'ieee'",
        }


def attend_splits(
    kernel: SplitKernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_blocks: torch.Tensor,
    block_order: torch.Tensor,
    position: torch.Tensor,
    last: torch.Tensor,
    first_key: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each job's rows over its split alone, and the log of the sum of its weights.

    Invariant: every call of one kernel has the same shapes, so one compiled program; a row's keys are taken in
    ascending tiles of ``kernel.key_tile``.

    Args:
        kernel: what is compiled.
        q: ``[jobs, KV heads, rows, D]``.
        k, v: ``[jobs, KV heads, split, D]``, dtype of q.
        key_blocks: ``[jobs, 1, rows / BLOCK_M]`` int32, the key tiles that a program takes; 0 writes zeros and -inf.
        block_order: ``[jobs, 1, rows / BLOCK_M, split / key_tile]`` int32, ascending along the last.
        position, last: ``[jobs]`` int32, positions of the first and the last query token.
        first_key: ``[jobs]`` int32, the position of the first key.
        alibi_slopes: ``[query heads]`` or None.

    Returns:
        Output ``[jobs, KV heads, rows, D]`` in ``q.dtype``, log-sum-exp ``[jobs, KV heads, rows]`` fp32; 0 and -inf for
        a row that sees nothing.
    """

    # Both are local functions, so that they are traced where their tensors are inputs.
    def positions(job: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Padding rows repeat the last token: a score_mod may look a position up in a table.
        return torch.minimum(position[job] + row // kernel.group, last[job]), first_key[job] + key

    def visible(job: torch.Tensor, kv_head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        at, key = positions(job, row, key)
        seen = key <= at
        if kernel.window is not None:
            seen = seen & (key > at - kernel.window)
        if kernel.mask_mod is not None:
            head = kv_head * kernel.group + row % kernel.group
            seen = seen & kernel.mask_mod(job * 0, head, at, torch.minimum(key, last[job]))
        return seen

    def modified(
        score: torch.Tensor, job: torch.Tensor, kv_head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        at, key = positions(job, row, key)
        head = kv_head * kernel.group + row % kernel.group
        # It is traced in the dtype of q, in which nothing may be rounded.
        score = score.float()
        if kernel.softcap is not None:
            score = kernel.softcap * torch.tanh(score / kernel.softcap)
        if alibi_slopes is not None:
            score = score + alibi_slopes[head] * (key - at)
        if kernel.score_mod is not None:
            score = kernel.score_mod(score, job * 0, head, at, torch.minimum(key, last[job]))
        return score

    # No tile is declared full: torch's kernel takes full ones after all others, in an order of their own.
    mask = BlockMask.from_kv_blocks(
        key_blocks,
        block_order,
        BLOCK_SIZE=(BLOCK_M, kernel.key_tile),
        mask_mod=visible,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=modified,
        block_mask=mask,
        scale=kernel.scale,
        kernel_options=kernel.options(q.shape[3]),
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


@functools.cache
def compiled_splits(device_type: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``attend_splits``, compiled for fixed shapes, for a type of device.

    On CPU torch's compiled FlexAttention returns no log-sum-exp: its own definition runs there, in library products.
    ``fullgraph``: past torch's limit of recompilations an error is raised, where it would compute uncompiled else.
    """
    backend = "eager" if device_type == "cpu" else "inductor"
    return torch.compile(attend_splits, backend=backend, fullgraph=True, dynamic=False)
