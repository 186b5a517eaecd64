"""The context in which PyTorch's operations are batch-invariant.

They are overridden in PyTorch's dispatcher (``torch.library``), once in a process: the first context registers the
overrides, and from then on a call asks whether a context is open and goes to PyTorch's own kernel if not, which costs
about a microsecond. To register and remove them with each context would not be safe: a thread that waits for the
interpreter at the door of an override that another thread removes enters freed memory, and PyTorch's assertions fail
within seconds. A dispatch mode would need no registration, but it slows every operation down, by ten times as much, and
threads started within it would be left out.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from . import products, rows

# What has kernels of its own for each device. Variants that write to a given tensor are made from these.
_KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "mm": products.mm,
    "bmm": products.bmm,
    "addmm": products.addmm,
    "addmv": products.addmv,
    "baddbmm": products.baddbmm,
    "dot": products.dot,
    "mean.dim": rows.mean,
    "_softmax": rows.softmax,
    "_log_softmax": rows.log_softmax,
}
_OUT = ("mm", "bmm", "addmm", "addmv", "baddbmm", "mean", "_softmax", "_log_softmax")
_IN_PLACE = ("addmm", "addmv", "baddbmm")
# What PyTorch composes of the above, by rules that ask for strides as well: a batch and its slice would part.
_COMPOSITES: dict[str, Callable[..., torch.Tensor]] = {
    "linear": products.linear,
    "matmul": products.matmul,
    "scaled_dot_product_attention": products.scaled_dot_product_attention,
    "rms_norm": rows.rms_norm,
    "layer_norm": rows.layer_norm,
}
# What sums rows but takes no kernel of ours, and what to do instead.
_REFUSED = {
    **{
        f"{name}.{variant}": "cast the result instead of giving out_dtype"
        for name in ("mm", "bmm", "addmm", "baddbmm")
        for variant in ("dtype", "dtype_out")
    },
    **dict.fromkeys(
        ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
        "call torch.backends.mha.set_fastpath_enabled(False)",
    ),
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_overrides: dict[str, "_Overrides"] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def deterministic_ops(*, _device: str = "CUDA") -> Iterator[None]:
    """Make plain PyTorch inference on CUDA batch-invariant: the bytes of a row do not depend on the rows beside it.

    Covered are ``mm``, ``addmm``, ``bmm``, ``baddbmm``, ``mv``, ``dot``, ``matmul``, ``linear``, ``mean``, ``softmax``,
    ``log_softmax``, ``rms_norm`` and ``layer_norm``, called directly, by modules or by other operations, and
    ``scaled_dot_product_attention``, which runs as the products and the softmax that it consists of. The rows of a
    product are those of its left operand. Products of bf16 and fp16 accumulate in fp32, those of fp32 are never TF32.

    It holds for all threads from the first entry to the last exit, which may be another thread's; contexts nest, and an
    exception ends one as usual. A CUDA graph captured inside keeps the kernels it was captured with.

    Not covered: tensors on other devices; integers, whose sums are exact; other reductions (``sum``, ``var``,
    convolutions); code made by ``torch.compile``, which writes kernels of its own.

    Raises:
        RuntimeError: there is no CUDA device. Inside, from an operation: an input requires a gradient while gradients
            are recorded (use ``torch.inference_mode()``), or its dtype is not bf16, fp16 or fp32.
        ValueError: inside, from an operation: its inputs have shapes, dtypes or devices that do not agree.
    """
    overrides = _registered(_device)
    overrides.enter()
    try:
        yield
    finally:
        overrides.leave()


def _registered(device: str) -> "_Overrides":
    if device == "CUDA" and not torch.cuda.is_available():
        raise RuntimeError("deterministic_ops() needs a CUDA device")
    with _lock:
        if device not in _overrides:
            _overrides[device] = _Overrides(device)
        return _overrides[device]


class _Overrides:
    """The overrides of one device's operations, and the number of contexts that are open."""

    def __init__(self, device: str) -> None:
        self.contexts = 0
        self.lock = threading.Lock()
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name, run in _KERNELS.items():
                self._register(name, device, run)
            for name in _OUT:
                run = _KERNELS["mean.dim" if name == "mean" else name]
                self._register(f"{name}.out", device, functools.partial(_into_out, run))
            for name in _IN_PLACE:
                self._register(f"{name}_", device, functools.partial(_in_place, _KERNELS[name]))
            for name, run in _COMPOSITES.items():
                # Where gradients may be recorded a composite is taken apart before a device's kernel is asked for.
                self._register(name, f"Autograd{device}", run)
                self._register(name, device, run)
            for name, remedy in _REFUSED.items():
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", device):
                    self._register(name, device, functools.partial(_refuse, name, remedy))

    def enter(self) -> None:
        with self.lock:
            self.contexts += 1

    def leave(self) -> None:
        with self.lock:
            self.contexts -= 1

    def _register(self, name: str, key: str, run: Callable[..., torch.Tensor]) -> None:
        original = torch.library.get_kernel(f"aten::{name}", key)

        def override(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if self.contexts and _is_covered(name, args, kwargs):
                return run(*args, **kwargs)
            return original.call_boxed(keyset, *args, **kwargs)

        self.library.impl(name, override, key, with_keyset=True)


def _is_covered(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the kernels take the call over: there is something to add up, and not in integers.

    Raises:
        RuntimeError: they should but cannot.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    dtypes = {kwargs.get("dtype") or x.dtype for x in tensors}
    empty = any(not x.numel() for x in tensors if x is not kwargs.get("out"))
    if empty or not any(x.is_floating_point or x.is_complex for x in dtypes):
        return False
    unknown = [str(x) for x in dtypes if (x.is_floating_point or x.is_complex) and x not in _DTYPES]
    if unknown:
        raise RuntimeError(
            f"aten::{name} has no batch-invariant kernel for {', '.join(unknown)}: cast to bfloat16, float16 or "
            "float32, or call it outside deterministic_ops()"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"aten::{name} inside deterministic_ops() has no backward: an input requires a gradient. "
            "Use torch.inference_mode() or torch.no_grad()"
        )
    return True


def _into_out(run: Callable[..., torch.Tensor], *args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    result = run(*args, **kwargs)
    if out.dtype != result.dtype:
        raise RuntimeError(f"out is {out.dtype}, but the result is {result.dtype}")
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _in_place(run: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return x.copy_(run(x, *args, **kwargs))


def _refuse(name: str, remedy: str, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(f"aten::{name} has no batch-invariant kernel: {remedy}")
