"""Triton's interpreter for the kernels of this project alone, so that they run without a GPU.

Triton decides when a module is imported whether its kernels are compiled or interpreted, by TRITON_INTERPRET: too
coarse for a process that also tests the engine. Here the kernels are imported as usual and exchanged for interpreted
ones while a test runs; afterwards everything stands as before.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import triton.language as tl
from triton import JITFunction, knobs
from triton.runtime.interpreter import InterpretedFunction

# The marks of a module whose tests run interpreted. Numpy warns of NaN and infinity, which a device computes silently.
INTERPRETED = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
# The interpreter cuts digits off where it should round to bf16: bf16 is tested on a device, or where none is rounded.
ROUNDED = (torch.float16, torch.float32)

# Triton's own library (tl.sum, tl.cdiv) consists of kernels too.
_INTERPRETED = ("triton.language.", "vllm_deterministic.triton_kernels.")
# What the interpreter patches when one kernel calls another, and leaves patched.
_PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.condition, tl.core.tensor_descriptor_base)


_one_thread = threading.RLock()


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Run every kernel of this project by Triton's interpreter, on CPU tensors, until the context ends.

    Contexts nest in one thread. Those of two threads that overlap would not: the last to end would restore what it
    found, which is the interpreter of the other.

    Raises:
        RuntimeError: another thread has such a context open.
    """
    if not _one_thread.acquire(blocking=False):
        raise RuntimeError("another thread runs the kernels interpreted")
    try:
        with _exchanged():
            yield
    finally:
        _one_thread.release()


@contextlib.contextmanager
def _exchanged() -> Iterator[None]:
    before = [(place, name, value) for place in _PATCHED for name, value in vars(place).items()]
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith(_INTERPRETED)]
    # By the Python function: a JITFunction hashes its whole source, and what that refers to.
    exchanged: dict[Callable[..., object], InterpretedFunction] = {}
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        try:
            for module in modules:
                for name, value in list(vars(module).items()):
                    if isinstance(value, JITFunction):
                        before.append((module, name, value))
                        setattr(module, name, exchanged.setdefault(value.fn, InterpretedFunction(value.fn)))
            yield
        finally:
            for place, name, value in before:
                if vars(place).get(name) is not value:
                    setattr(place, name, value)
