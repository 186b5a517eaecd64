"""Linear layers and the LM head on a GPU: one matrix product, each shape of weight at its own certified tiles."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_deterministic.certify import certified_plans
from vllm_deterministic.triton_kernels.matmul import matmul
from vllm_deterministic.triton_kernels.tiles import TilePlan

from .config import RefusalError

logger = init_logger("vllm.deterministic")


class PlannedMatmul:
    """``x @ w.T + bias`` at the tile that the plan of ``w``'s shape has for this number of rows."""

    # The operation is called from compiled code, which outlives the process that made it and can carry no object.
    plans: ClassVar[dict[tuple[torch.dtype, int, int], TilePlan]] = {}

    @classmethod
    def run(cls, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[..., N]`` of ``x`` ``[..., K]`` and ``w`` ``[N, K]``.

        Raises:
            RuntimeError: no plan was made for this shape.
        """
        n, k = w.shape
        plan = cls.plans.get((w.dtype, n, k))
        if plan is None:
            raise RuntimeError(
                f"no tiles are certified for a weight of shape [{n}, {k}] in {w.dtype}: this process serves a "
                "deterministic engine; start another engine in another process"
            )
        return matmul(x, w, bias, plan=plan)


def certify(model: torch.nn.Module, device: torch.device, max_rows: int) -> dict[str, TilePlan]:
    """Certify and compile the tiles of every linear layer and of the LM head: the plans, by the shape of the weight.

    Args:
        model: with its weights on ``device``.
        device: the GPU.
        max_rows: the most rows of a step.

    Raises:
        RefusalError: for some shape no tile is left.
    """
    layers = {(w.dtype, *w.shape, bias is not None): (w, bias) for w, bias in _linear_layers(model)}
    for dtype in {w.dtype for w, _ in layers.values()}:
        shapes = sorted({(n, k) for layer_dtype, n, k, _ in layers if layer_dtype == dtype})
        try:
            plans = certified_plans(shapes, dtype, device, logger.info)
        except ValueError as error:
            raise RefusalError(f"linear layers: {error}") from None
        PlannedMatmul.plans.update({(dtype, n, k): plan for (n, k), plan in plans.items()})
    for w, bias in layers.values():
        _compile_tiles(w, bias, max_rows)
    # What certifying took from torch's allocator is for the KV cache.
    torch.cuda.empty_cache()
    return {f"{dtype} {n}x{k}": PlannedMatmul.plans[dtype, n, k] for dtype, n, k, _ in sorted(layers, key=str)}


def _linear_layers(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            yield module.weight, getattr(module, "bias", None)


def _compile_tiles(w: torch.Tensor, bias: torch.Tensor | None, max_rows: int) -> None:
    """Launch every tile once: compiled while serving it would hold up the requests of that step."""
    plan = PlannedMatmul.plans[w.dtype, *w.shape]
    for rows in sorted({before + 1 for tile in plan.tiles for before, _ in plan.rows(tile)}):
        if rows <= max_rows:
            PlannedMatmul.run(w.new_zeros(rows, w.shape[1]), w, bias)
