"""What every road of attention refuses of its arguments."""

import math

import torch

DTYPES = (torch.bfloat16, torch.float16)


def check_tensors(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Refuse tensors that do not fit together, and dtypes but ``DTYPES`` and on CPU fp32.

    Raises:
        ValueError: names the tensor, its shape or dtype and what is allowed.
    """
    dtypes = (*DTYPES, torch.float32) if q.device.type == "cpu" else DTYPES
    if q.dtype not in dtypes:
        raise ValueError(f"q is {q.dtype}; {', '.join(map(str, dtypes))} are allowed on {q.device}")
    if q.dim() != 3 or q.shape[2] < 16:
        raise ValueError(f"q is {tuple(q.shape)}; [T, query heads, D] is needed, D at least 16")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype or cache.device != q.device:
            raise ValueError(f"{name} is {cache.dtype} on {cache.device}, but q is {q.dtype} on {q.device}")
        if cache.dim() != 4 or cache.shape != k_cache.shape or cache.shape[3] != q.shape[2]:
            raise ValueError(
                f"{name} is {tuple(cache.shape)}; [blocks, block size, KV heads, {q.shape[2]}], k_cache and v_cache "
                "alike, is needed"
            )
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q has {q.shape[1]} heads and k_cache {k_cache.shape[2]}; they must divide")
    requests = len(seq_lens) if seq_lens.dim() else 0
    shapes = {
        "block_table": (block_table, (requests, block_table.shape[-1])),
        "query_start_loc": (query_start_loc, (requests + 1,)),
        "seq_lens": (seq_lens, (requests,)),
    }
    for name, (x, shape) in shapes.items():
        if x.shape != shape or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; int32 {list(shape)} on {q.device} is needed"
            )


def bounds(
    q: torch.Tensor, block_table: torch.Tensor, block_size: int, max_query_len: int | None, max_seq_len: int | None
) -> tuple[int, int]:
    """The most query tokens and positions of a request: as given, or what q and a row of the block table hold.

    Raises:
        ValueError: no batch has these; names both.
    """
    held = block_table.shape[1] * block_size
    max_query_len = max(1, len(q)) if max_query_len is None else max_query_len
    max_seq_len = max(1, held) if max_seq_len is None else max_seq_len
    if max_query_len < 1 or not 1 <= max_seq_len <= max(1, held):
        raise ValueError(
            f"max_query_len is {max_query_len} and max_seq_len {max_seq_len}; both must be at least 1, and max_seq_len "
            f"at most {held}, which the block table holds"
        )
    return max_query_len, max_seq_len


def check_features(
    q: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Refuse numbers that are not positive and finite, and anything but one number a query head.

    Raises:
        ValueError: names the argument, its value or shape.
    """
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be positive and finite")
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None and (x.shape != (q.shape[1],) or x.device != q.device):
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}; [{q.shape[1]}] on {q.device} is needed")
