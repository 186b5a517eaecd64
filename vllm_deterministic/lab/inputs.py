"""Data for the studies: magnitudes as in real activations, and numbers that show the order of additions."""

import torch

from vllm_deterministic.triton_kernels import bit_class

DATA = ("mixed", "adversarial")


def mixed(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, width]`` fp32 normal numbers: by chance a quarter of them x 10, a half x 1, a quarter x 0.1."""
    quarter = torch.randint(4, (rows, width), generator=generator)
    return torch.randn(rows, width, generator=generator) * torch.tensor([10.0, 1.0, 1.0, 0.1])[quarter]


def massive(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, width]`` fp32 normal numbers, but the first of each row is 2^12, as some activations of real models are.

    Squares cannot cancel. Next to the square of 2^12 that of a small number is half a unit in the last place: added
    alone it is rounded away, added after its neighbours it counts.
    """
    x = torch.randn(rows, width, generator=generator)
    x[:, 0] = 2.0**12
    return x


def mirrored(rows: int, width: int, sign: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, width]`` fp32 whose second half repeats the first, times ``sign``.

    A product of sign -1 with sign 1 is zero but for the rounding errors on the way.
    """
    return bit_class.mirrored(rows, width, sign=sign, dtype=torch.float32, generator=generator)
