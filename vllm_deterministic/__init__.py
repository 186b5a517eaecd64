"""Deterministic serving for vLLM, and the tools that verify it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_deterministic.aten.context import deterministic_ops

__all__ = ["__version__", "deterministic_ops"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The base install has no torch.
    if name == "deterministic_ops":
        from vllm_deterministic.aten.context import deterministic_ops

        return deterministic_ops
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
