"""Data for the studies: magnitudes as in real activations, and numbers made to cancel."""

import torch

from vllm_deterministic.triton_kernels import bit_class

DATA = ("mixed", "cancelling")


def mixed(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, width]`` fp32 normal numbers: by chance a quarter of them x 10, a half x 1, a quarter x 0.1."""
    quarter = torch.randint(4, (rows, width), generator=generator)
    return torch.randn(rows, width, generator=generator) * torch.tensor([10.0, 1.0, 1.0, 0.1])[quarter]


def cancelling(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, width]`` fp32 whose magnitudes spread over 2^-12 to 2^12: squares never cancel, they hide each other."""
    return bit_class.cancelling(rows, width, dim=1, dtype=torch.float32, generator=generator)


def mirrored(rows: int, width: int, sign: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, width]`` fp32 whose second half repeats the first, times ``sign``.

    A product of sign -1 with sign 1 is zero but for the rounding errors on the way.
    """
    return bit_class.mirrored(rows, width, sign=sign, dtype=torch.float32, generator=generator)
