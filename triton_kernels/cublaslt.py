"""cuBLASLt at algorithms that are named and kept, where torch lets the library choose anew for every M.

The library's products vary with M because its choice does, and because some of what it chooses cuts K. An algorithm
without split-K that is named once is a tile like any other: it adds K in ascending order, and ``certify`` compares its
bytes with the class reference.
"""

import contextlib
import ctypes
import functools
from dataclasses import astuple, dataclass
from typing import Any

import torch

# cudaDataType_t, cublasComputeType_t, cublasOperation_t, cublasLtReductionScheme_t
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_FP32, _TRANSPOSED, _NO_REDUCTION = 68, 1, 0
# Attributes of a cublasLtMatmulDesc, a cublasLtMatmulPreference and a cublasLtMatrixLayout.
_TRANSPOSE_A = 3
_MAX_WORKSPACE, _REDUCTION_SCHEMES, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_BATCH_COUNT, _BATCH_STRIDE = 5, 6
# Bytes that every matrix and its rows must be aligned to, as for tensor descriptors.
ALIGNMENT = 16


@dataclass(frozen=True, order=True)
class Algorithm:
    """One algorithm, by the numbers that the library gives its parts (cublasLtMatmulAlgoConfigAttributes_t)."""

    algorithm: int
    tile: int
    stages: int
    cluster: int
    swizzle: int
    inner: int
    custom: int


# Attribute and C type of each field but the first.
_FIELDS: tuple[tuple[int, Any], ...] = (
    (1, ctypes.c_int32),
    (6, ctypes.c_int32),
    (8, ctypes.c_int16),
    (4, ctypes.c_int32),
    (7, ctypes.c_int16),
    (5, ctypes.c_int32),
)
_IDENTIFIER = 0


class _Opaque(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Suggestion(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Opaque),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasLt:
    """The library on one device. Errors of the library are ``RuntimeError`` with the function and its status.

    Attributes:
        version: of the library, such as 130100.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t
        self.version = int(self._library.cublasLtGetVersion())
        self._device = device
        with torch.cuda.device(device):
            self._handle = self._create("cublasLtCreate")
        self._product = self._create("cublasLtMatmulDescCreate", _COMPUTE_FP32, _TYPES[torch.float32])
        self._set("cublasLtMatmulDesc", self._product, _TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
        self._preference = self._create("cublasLtMatmulPreferenceCreate")
        for attribute, value in (
            (_MAX_WORKSPACE, ctypes.c_uint64(0)),
            (_REDUCTION_SCHEMES, ctypes.c_uint32(_NO_REDUCTION)),
            *((alignment, ctypes.c_uint32(ALIGNMENT)) for alignment in _ALIGNMENTS),
        ):
            self._set("cublasLtMatmulPreference", self._preference, attribute, value)

    def suggest(self, dtype: torch.dtype, m: int, n: int, k: int, segments: int, count: int = 1) -> list[Algorithm]:
        """The library's own choices for a shape, the best first, none of which splits K or needs memory.

        Args:
            dtype: bf16 or fp16.
            m, n, k: of ``x[M, K] @ w[N, K].T``.
            segments: parts that K is cut into, each a product of its own.
            count: at most so many.
        """
        found, number = (_Suggestion * count)(), ctypes.c_int()
        out = _TYPES[dtype if segments == 1 else torch.float32]
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._product,
            self._layout(_TYPES[dtype], k // segments, n, k, segments, k // segments),
            self._layout(_TYPES[dtype], k // segments, m, k, segments, k // segments),
            *[self._layout(out, n, m, n, segments, m * n)] * 2,
            self._preference, count, found, ctypes.byref(number),
        )  # fmt: skip
        if status:
            return []
        return [self._name(suggestion.algorithm) for suggestion in found[: number.value] if suggestion.state == 0]

    def product(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, algorithm: Algorithm) -> None:
        """``out = x @ w.T``, or ``out[s]`` the product of the s-th part of K where ``out`` has three dimensions.

        Args:
            x: ``[M, K]``, bf16 or fp16; it and the others as ``allows`` says.
            w: ``[N, K]`` of the same dtype.
            out: ``[M, N]`` of the same dtype, or ``[S, M, N]`` in fp32, contiguous.
            algorithm: any that ``suggest`` gave, for whatever M, or another that the library knows.

        Raises:
            RuntimeError: the library does not know the algorithm or cannot run it on this shape.
        """
        segments = out.shape[0] if out.dim() == 3 else 1
        (m, k), n = x.shape, w.shape[0]
        part = k // segments
        layout = self._layout(
            _TYPES[out.dtype], n, m, out.stride(-2) if m > 1 else n, segments, m * n if segments > 1 else 0
        )
        self._call(
            "cublasLtMatmul", self._handle, self._product, ctypes.byref(ctypes.c_float(1)),
            ctypes.c_void_p(w.data_ptr()), self._layout(_TYPES[w.dtype], part, n, w.stride(0), segments, part),
            ctypes.c_void_p(x.data_ptr()),
            self._layout(_TYPES[x.dtype], part, m, x.stride(0) if m > 1 else k, segments, part),
            ctypes.byref(ctypes.c_float(0)),
            ctypes.c_void_p(out.data_ptr()), layout, ctypes.c_void_p(out.data_ptr()), layout,
            ctypes.byref(self._build(algorithm, _TYPES[x.dtype], _TYPES[out.dtype])), None, ctypes.c_size_t(0),
            ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream),
        )  # fmt: skip

    def _name(self, opaque: _Opaque) -> Algorithm:
        values = [self._get(opaque, _IDENTIFIER, ctypes.c_int32)]
        return Algorithm(*values, *(self._get(opaque, attribute, kind) for attribute, kind in _FIELDS))

    def _get(self, opaque: _Opaque, attribute: int, kind: Any) -> int:
        value, written = kind(), ctypes.c_size_t()
        arguments = attribute, ctypes.byref(value), ctypes.sizeof(value), ctypes.byref(written)
        self._call("cublasLtMatmulAlgoConfigGetAttribute", ctypes.byref(opaque), *arguments)
        return int(value.value)

    @functools.cache  # noqa: B019 (there is one object a device, and it is kept)
    def _build(self, algorithm: Algorithm, operand: int, out: int) -> _Opaque:
        opaque = _Opaque()
        types = _COMPUTE_FP32, _TYPES[torch.float32], operand, operand, out, out
        self._call("cublasLtMatmulAlgoInit", self._handle, *types, algorithm.algorithm, ctypes.byref(opaque))
        for (attribute, kind), number in zip(_FIELDS, astuple(algorithm)[1:], strict=True):
            self._set("cublasLtMatmulAlgoConfig", ctypes.byref(opaque), attribute, kind(number))
        return opaque

    @functools.lru_cache(4096)  # noqa: B019
    def _layout(self, kind: int, rows: int, columns: int, stride: int, batch: int, batch_stride: int) -> "_Layout":
        """A matrix in the library's column-major terms: what is ``[rows of ours, columns of ours]`` is transposed."""
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride)
        layout = _Layout(self._library, self._create("cublasLtMatrixLayoutCreate", kind, *sizes))
        if batch > 1:
            self._set("cublasLtMatrixLayout", layout, _BATCH_COUNT, ctypes.c_int32(batch))
            self._set("cublasLtMatrixLayout", layout, _BATCH_STRIDE, ctypes.c_int64(batch_stride))
        return layout

    def _create(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made

    def _set(self, kind: str, target: Any, attribute: int, value: Any) -> None:
        self._call(f"{kind}SetAttribute", target, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} failed with cuBLAS status {status}")


class _Layout:
    """A cublasLtMatrixLayout that is freed with this object."""

    def __init__(self, library: ctypes.CDLL, pointer: ctypes.c_void_p) -> None:
        self._as_parameter_ = pointer
        self._destroy = library.cublasLtMatrixLayoutDestroy

    def __del__(self) -> None:
        self._destroy(self._as_parameter_)


@functools.cache
def cublaslt(device: torch.device) -> CublasLt | None:
    """The library on ``device``; None where there is none: on a CPU, and where torch came without it."""
    if device.type == "cuda":
        with contextlib.suppress(OSError):
            return CublasLt(device)
    return None


def allows(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the library can read ``x`` ``[M, K]`` and ``w`` ``[N, K]`` and write ``out`` ``[M, N]`` as they lie."""
    return x.dtype in (torch.bfloat16, torch.float16) and all(_is_aligned(matrix) for matrix in (x, w, out))


def _is_aligned(matrix: torch.Tensor) -> bool:
    rows_apart = len(matrix) == 1 or (
        matrix.stride(0) >= matrix.shape[1] and matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0
    )
    return rows_apart and matrix.stride(1) == 1 and matrix.data_ptr() % ALIGNMENT == 0
