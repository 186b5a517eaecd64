"""Bit classes: the tile shapes whose order of additions is the same, found by comparing bytes.

A library chooses its kernel, and with it its order of additions, by the shape of a call and the number of threads.
Tiles that give the same bytes on inputs made to cancel are of one class and may replace one another.
"""

from collections.abc import Callable, Sequence

import torch


def cancelling(*shape: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers whose magnitudes spread over 2^±12 along ``dim``, so that another order of additions shows.

    Args:
        shape: the result's shape.
        dim: the dimension that will be summed over.
        dtype: bf16, fp16 or fp32.
        generator: source of the numbers, on the device that they are wanted on.
    """
    device = generator.device
    exponent_shape = [1] * len(shape)
    exponent_shape[dim] = shape[dim]
    exponent = torch.rand(exponent_shape, generator=generator, dtype=torch.float32, device=device) * 24 - 12
    return (torch.randn(shape, generator=generator, dtype=torch.float32, device=device) * exponent.exp2()).to(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes: unlike ``torch.equal``, NaN is NaN and 0 is not -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)))


def first_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...] | None:
    """The index of the first element whose bytes differ, NaN being equal to NaN whatever its bits; None without one.

    Args:
        a, b: of one shape and dtype: bf16, fp16 or fp32.
    """
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    differing = (a.contiguous().view(bits) != b.contiguous().view(bits)) & ~(a.isnan() & b.isnan())
    if not differing.any():
        return None
    first = differing.flatten().to(torch.uint8).argmax()
    return tuple(int(i) for i in torch.unravel_index(first, a.shape))


def mirrored(rows: int, columns: int, *, sign: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers whose second half of columns repeats the first, times ``sign``.

    The product of a matrix with sign -1 and the transpose of one with sign 1 is zero but for the rounding errors on the
    way: they are the whole result, so another order of additions shows even where the result is rounded to eight bits.

    Args:
        rows, columns: the shape; an odd last column is zero.
        sign: 1 or -1.
        dtype: bf16, fp16 or fp32.
        generator: source of the numbers, on the device that they are wanted on.
    """
    # The factor 8 a side keeps the rounding errors of fp32 sums above the subnormals of fp16.
    half = (torch.randn(rows, columns // 2, generator=generator, dtype=torch.float32, device=generator.device) * 8).to(
        dtype
    )
    return torch.cat([half, sign * half, half.new_zeros(rows, columns % 2)], dim=1)


def certified_row_tiles(
    apply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, base: int, candidates: Sequence[int]
) -> tuple[int, ...]:
    """The numbers of rows for which ``apply`` gives the bytes that it gives for ``base`` rows.

    Args:
        apply: a row-wise operation, ``[T, k]`` to ``[T, n]``.
        x: ``[R, k]``, inputs on which another order of additions shows; at least ``base`` and every candidate rows.
        base: the tile that defines the class.
        candidates: other tiles to try.

    Returns:
        the certified tiles in ascending order, ``base`` among them.

    Raises:
        ValueError: at ``base`` rows a row's bytes depend on where it stands or on a neighbour that is NaN, so there is
            no class; or ``x`` has too few rows, those past the last whole tile of ``base`` not counted, to try every
            candidate.
    """
    given, largest = len(x), max((base, *candidates))
    x = x[: given // base * base]
    if len(x) < largest:
        raise ValueError(f"{given} rows are too few to try tiles of {base} and {largest}")
    expected = torch.cat([apply(rows.clone()) for rows in x.split(base)])

    def same(tile: int) -> bool:
        # oneDNN's bf16 products on AMX read on into the next row where k fills no tile of its own, and NaN times the
        # weight of zero that stands there is NaN.
        among_nan = x[:tile].clone()
        among_nan[1::2] = float("nan")
        if not same_bytes(apply(among_nan)[::2], expected[:tile:2]):
            return False
        for start in range(0, len(x) - tile + 1, max(tile, len(x) // 4)):
            rows, wanted = x[start : start + tile], expected[start : start + tile]
            if not same_bytes(apply(rows.clone()), wanted):
                return False
            if not same_bytes(apply(rows.roll(1, dims=0)).roll(-1, dims=0), wanted):
                return False
        return True

    if not same(base):
        raise ValueError(
            f"at {base} rows of {x.shape[1]} columns in {x.dtype} a row's result depends on where it stands "
            "or on its neighbours"
        )
    return tuple(sorted({base, *(tile for tile in candidates if same(tile))}))
