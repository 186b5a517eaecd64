"""Bit classes: the tile shapes whose order of additions is the same, found by comparing bytes.

A library chooses its kernel, and with it its order of additions, by the shape of a call and the number of threads. Tiles
that give the same bytes on inputs made to cancel are of one class and may replace one another.
"""

from collections.abc import Callable, Sequence

import torch


def cancelling(*shape: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers whose magnitudes spread over 2^±12 along ``dim``, so that another order of additions shows.

    Args:
        shape: the result's shape.
        dim: the dimension that will be summed over.
        dtype: bf16, fp16 or fp32.
        generator: source of the numbers.
    """
    exponent_shape = [1] * len(shape)
    exponent_shape[dim] = shape[dim]
    exponent = torch.rand(exponent_shape, generator=generator) * 24 - 12
    return (torch.randn(shape, generator=generator) * exponent.exp2()).to(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes (unlike ``torch.equal``: NaN equals NaN, 0 is not -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def certified_row_tiles(
    apply: Callable[[torch.Tensor], torch.Tensor],
    k: int,
    dtype: torch.dtype,
    *,
    base: int,
    candidates: Sequence[int],
) -> tuple[int, ...]:
    """The numbers of rows for which ``apply`` gives the bytes that it gives for ``base`` rows.

    Args:
        apply: a row-wise operation, ``[T, k]`` to ``[T, n]``.
        k: columns of the input.
        dtype: of the input.
        base: the tile that defines the class.
        candidates: other tiles to try.

    Returns:
        the certified tiles in ascending order, ``base`` among them.

    Raises:
        ValueError: at ``base`` rows a row's bytes depend on where it stands, so there is no class.
    """
    generator = torch.Generator().manual_seed(0)
    longest = max(base, *candidates) if candidates else base
    x = cancelling(-(-longest // base) * base, k, dim=1, dtype=dtype, generator=generator)
    x[0, ::2], x[0, 1::2] = x[0, ::2].abs(), -x[0, ::2].abs()[: k // 2]
    expected = torch.cat([apply(x[i : i + base].clone()) for i in range(0, len(x), base)])
    shifted = apply(x[:base].roll(1, dims=0)).roll(-1, dims=0)
    if not same_bytes(shifted, expected[:base]):
        raise ValueError(f"at {base} rows of {k} columns in {dtype} the result of a row depends on where it stands")
    certified = {base}
    for tile in candidates:
        rows = x[:tile].clone()
        if same_bytes(apply(rows), expected[:tile]) and same_bytes(
            apply(rows.roll(1, dims=0)).roll(-1, dims=0), expected[:tile]
        ):
            certified.add(tile)
    return tuple(sorted(certified))
