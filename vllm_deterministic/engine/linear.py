"""Linear layers and the LM head: the library's matmul, called at certified tiles of rows alone."""

from collections.abc import Callable
from typing import ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.bit_class import certified_row_tiles, mirrored

from .config import RefusalError

logger = init_logger("vllm.deterministic")

# Sixteen rows define the class: if nothing else is certified they cost one request little and feed a batch well.
BASE_ROWS = 16
CANDIDATE_ROWS = (1, 2, 4, 8, 32, 64, 128, 256)

LibraryLinear = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class RowTiledLinear:
    """One layer's matmul; vLLM's choice of library and its packed weights stay as they are."""

    # An opaque operation can carry a name but no object, and compiled code outlives the process that made it.
    named: ClassVar[dict[str, "RowTiledLinear"]] = {}

    def __init__(self, library_linear: LibraryLinear, weight: torch.Tensor | None, out_features: int) -> None:
        self.library_linear, self.weight, self.out_features = library_linear, weight, out_features
        self.tiles: tuple[int, ...] = (BASE_ROWS,)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``[..., K]``."""
        rows = x.reshape(-1, x.shape[-1])
        out = reference.matmul(rows, lambda tile: self.library_linear(tile, self.weight, bias), self.tiles)
        return out.view(*x.shape[:-1], self.out_features)


def tile_rows(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Put every linear layer of a loaded model on certified tiles: their rows, by the shape of the weight.

    Args:
        model: after vLLM has packed its weights.
        dtype: of the activations.

    Raises:
        RefusalError: for some layer no tile gives a row the same bytes wherever it stands.
    """
    certified: dict[tuple[int, int], tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "cpu_linear"):
            continue
        in_features = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
        out_features = getattr(layer, "output_size_per_partition", None) or layer.num_embeddings_per_partition
        weight = layer.weight if layer.weight.numel() else None
        linear = RowTiledLinear(layer.cpu_linear, weight, out_features)
        shape = (out_features, in_features)
        if shape not in certified:
            certified[shape] = _certify(name, *shape, dtype)
        linear.tiles = certified[shape]
        RowTiledLinear.named[name] = linear
        layer.cpu_linear = lambda x, weight, bias, name=name: torch.ops.vllm_deterministic.linear(x, bias, name)
    for (n, k), tiles in certified.items():
        logger.info("deterministic linear N=%d K=%d: tiles of %s rows", n, k, ", ".join(map(str, tiles)))
    return {f"{n}x{k}": tiles for (n, k), tiles in certified.items()}


def _certify(name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    # The library chooses by shape and dtype, so one layer of the shape with weights made to cancel stands for all.
    generator = torch.Generator().manual_seed(0)
    probe = torch.nn.Module()
    weight = mirrored(out_features, in_features, sign=1, dtype=dtype, generator=generator)
    probe.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(probe, remove_weight=False)
    x = mirrored(max(BASE_ROWS, *CANDIDATE_ROWS), in_features, sign=-1, dtype=dtype, generator=generator)
    try:
        return certified_row_tiles(
            lambda rows: probe.cpu_linear(rows, probe.weight, None), x, base=BASE_ROWS, candidates=CANDIDATE_ROWS
        )
    except ValueError as error:
        raise RefusalError(
            f"linear layer {name}: {error}. This CPU's matmul cannot be made batch-invariant with "
            f"{torch.get_num_threads()} threads: try another number of cores (VLLM_CPU_OMP_THREADS_BIND)."
        ) from None
