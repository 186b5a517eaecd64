"""What a study compares: strategies that compute the same thing in different orders."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Self

import torch

from .record import Order


@dataclass(frozen=True)
class Strategy:
    """One way to compute an operation. ``order``: what, by its rule, its order of additions follows."""

    name: str
    rule: str
    order: Order
    run: Callable[..., torch.Tensor]

    @classmethod
    def of(cls, name: str, run: Callable[..., torch.Tensor], order: Order, documented: object) -> Self:
        """A strategy whose rule is the docstring of ``documented``."""
        return cls(name, " ".join((inspect.getdoc(documented) or "").split()), order, run)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one entry a row, and tensors that all rows share, in the order in which strategies take them."""

    rows: tuple[torch.Tensor, ...]
    shared: tuple[torch.Tensor, ...] = ()

    def batch(self, size: int) -> tuple[torch.Tensor, ...]:
        """A batch of ``size`` rows whose row ``size // 2`` is always the same, row 0 of the inputs."""
        order = list(range(1, size))
        order.insert(size // 2, 0)
        return (*(x[order] for x in self.rows), *self.shared)

    def to(self, device: torch.device) -> "Inputs":
        """The same inputs on ``device``."""
        return Inputs(tuple(x.to(device) for x in self.rows), tuple(x.to(device) for x in self.shared))


@dataclass(frozen=True)
class Family:
    """The strategies of one operation, its inputs and its float64 oracle.

    ``inputs(data, hidden, rows, generator)`` are made on the CPU; ``oracle`` takes what strategies take, on the CPU.
    """

    title: str
    strategies: tuple[Strategy, ...]
    inputs: Callable[[str, int, int, torch.Generator], Inputs]
    oracle: Callable[..., torch.Tensor]


def has_kernels(device: torch.device) -> bool:
    """Whether this project's Triton kernels run there."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from vllm_deterministic.triton_kernels.launch import MINIMUM_CAPABILITY, capability

    return bool(capability(device) >= MINIMUM_CAPABILITY)
