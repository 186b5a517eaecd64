"""The shapes on which matmul's speed is measured: the linear layers of served models, whole and on eight ranks."""

import argparse
from collections.abc import Iterable, Sequence

Shape = tuple[int, int]
M_VALUES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def _layers(
    hidden: int, inner: int, heads: int, kv_heads: int, ranks: int, head: int = 128
) -> dict[str, tuple[int, int]]:
    """``[N, K]`` of the four linear layers of a decoder block on one of ``ranks``."""
    return {
        "qkv": ((heads + 2 * kv_heads) * head // ranks, hidden),
        "o": (hidden, heads * head // ranks),
        "gate_up": (2 * inner // ranks, hidden),
        "down": (hidden, inner // ranks),
    }


_MODELS = {
    "Qwen3-8B": (4096, 12288, 32, 8),
    "Llama-3.1-8B": (4096, 14336, 32, 8),
    "Qwen3-32B": (5120, 25600, 64, 8),
    "Llama-3.1-70B": (8192, 28672, 64, 8),
}


def shapes() -> dict[Shape, str]:
    """Every distinct ``(N, K)`` with the first layer that has it."""
    named: dict[Shape, str] = {}
    for name, sizes in _MODELS.items():
        for ranks in (1, 8):
            for layer, shape in _layers(*sizes, ranks).items():
                named.setdefault(shape, f"{name} {layer}" + (f" /{ranks}" if ranks > 1 else ""))
    for layer, shape in _layers(2048, 6144, 16, 8, 1).items():
        named.setdefault(shape, f"Qwen3-1.7B {layer}")
    named.setdefault((151936, 2048), "Qwen3-1.7B lm_head")
    return named


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The options by which some shapes and numbers of rows are chosen."""
    parser.add_argument("--only", type=_shape, nargs="+", default=[], metavar="N,K", help="these shapes; all if absent")
    parser.add_argument("--rows", type=int, nargs="+", default=[], metavar="M", help="these numbers; all if absent")


def arguments(args: argparse.Namespace) -> list[str]:
    """The selection as a command line."""
    only, rows = [f"{n},{k}" for n, k in args.only], [str(m) for m in args.rows]
    return [*(["--only", *only] if only else []), *(["--rows", *rows] if rows else [])]


def selected(only: Sequence[Shape]) -> Iterable[Shape]:
    """The chosen shapes, or all."""
    return only or shapes()


def _shape(text: str) -> Shape:
    n, k = map(int, text.split(","))
    return n, k
