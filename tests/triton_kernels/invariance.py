"""The check of every operation: a row's bytes are those that it has alone, whatever lies beside it."""

import math
from collections.abc import Callable, Sequence

import torch
from vllm_deterministic.triton_kernels.bit_class import same_bytes

Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise AssertionError that names the first element whose bytes differ."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if same_bytes(actual, expected):
        return
    width = actual.element_size()
    left, right = (x.contiguous().flatten().view(torch.uint8).view(-1, width) for x in (actual, expected))
    differing = (left != right).any(dim=-1).nonzero().squeeze(-1)
    first = int(differing[0])
    value, wanted = actual.flatten()[first].item(), expected.flatten()[first].item()
    raise AssertionError(
        f"{what}: {len(differing)} of {len(left)} elements differ, the first is {first}: {value!r}, not {wanted!r}"
    )


def assert_batch_invariant(op: Op, *inputs: torch.Tensor, sizes: Sequence[int] = (2, 3, 4, 5, 8, 17, 33)) -> None:
    """Compare each row of ``op`` in batches of many sizes with the same row alone.

    Args:
        op: maps tensors to a tensor or a tuple of them, the batch in dimension 0 of each.
        inputs: rows to choose from, as many in each tensor.
        sizes: of the batches; in one batch of each size every other row is NaN, infinite, zero or huge.

    Raises:
        AssertionError: naming the first element that differs.
    """
    alone = [_outputs(op(*(x[row : row + 1].clone() for x in inputs))) for row in range(len(inputs[0]))]
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for hostile in (slice(0, 0), slice(size % 2, None, 2)):
            picked = torch.randint(len(alone), (size,), generator=generator)
            kept = torch.ones(size, dtype=torch.bool)
            kept[hostile] = False
            batch = [x[picked] for x in inputs]
            for x in batch:
                if x.is_floating_point():
                    contents = (math.nan, math.inf, 0.0, -math.inf, torch.finfo(x.dtype).max)
                    for number, row in enumerate((~kept).nonzero().flatten().tolist()):
                        x[row] = contents[number % len(contents)]
            outs = _outputs(op(*batch))
            for place in kept.nonzero().flatten().tolist():
                for out, expected in zip(outs, alone[int(picked[place])], strict=True):
                    assert_same_bytes(out[place], expected[0], f"row {place} of {size}, hostile neighbours {hostile}")


def _outputs(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
