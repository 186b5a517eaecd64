"""A fault in the worker of a real server: a linear layer cuts K in two where a batch has more than four rows.

Loaded by ``--worker-extension-cls planted_fault.Extension``.
"""

import torch

from vllm_deterministic.engine.linear import RowTiledLinear

_original = RowTiledLinear.__call__


def _rows_follow_m(self: RowTiledLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[0] <= 4:
        return _original(self, x, bias)
    left = x.clone()
    left[..., x.shape[-1] // 2 :] = 0
    return _original(self, left, bias) + _original(self, x - left, None)


RowTiledLinear.__call__ = _rows_follow_m  # type: ignore[method-assign]


class Extension:
    """Nothing to add: loading the module plants the fault."""
