# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

import triton
import triton.language as tl
from triton import JITFunction, knobs
from vllm_deterministic.triton_kernels import bit_class

from .interpreter import interpreting


@triton.jit
def _sum_kernel(x_ptr, out_ptr, width: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, width)), axis=0))


def _language() -> dict[tuple[str, str], object]:
    places = {name: module for name, module in sys.modules.items() if f"{name}.".startswith("triton.language.")}
    places |= {"tensor": tl.tensor, "dtype": tl.dtype}
    return {(place, name): value for place, holder in places.items() for name, value in vars(holder).items()}


def test_interprets_within_the_context_and_leaves_triton_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any module of the package will do: the kernels are looked for in all of them.
    monkeypatch.setattr(bit_class, "_sum_kernel", _sum_kernel, raising=False)
    before = _language()
    for _ in range(2):
        with interpreting():
            assert knobs.runtime.interpret
            out = torch.zeros(1)
            bit_class._sum_kernel[(1,)](torch.arange(8.0), out, width=8)
            assert out.item() == 28
        assert not knobs.runtime.interpret
        assert isinstance(bit_class._sum_kernel, JITFunction)
        after = _language()
        assert [key for key, value in before.items() if after[key] is not value] == []


def test_is_one_threads_at_a_time() -> None:
    def interprets() -> bool:
        with interpreting():
            return knobs.runtime.interpret

    with ThreadPoolExecutor(1) as other:
        with interpreting():
            with pytest.raises(RuntimeError, match="another thread"):
                other.submit(interprets).result()
            assert interprets()
            assert knobs.runtime.interpret
        assert not knobs.runtime.interpret
        assert other.submit(interprets).result()
    assert not knobs.runtime.interpret
