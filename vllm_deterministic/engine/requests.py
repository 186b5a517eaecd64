"""What requests may ask for: what is not proven of an architecture is refused one by one, and the others are served."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from .architectures import open_cells
from .devices import CUDA, Device

# Cells of the table of architectures that a request decides on: of its sampling parameters, whether it uses them.
_USES: dict[str, Callable[[Any], bool]] = {
    "prompt logprobs": lambda params: params.prompt_logprobs is not None,
    "n": lambda params: params.n > 1,
    "structured output": lambda params: params.structured_outputs is not None,
}


def refused_in_requests(architectures: Sequence[str], device: Device) -> tuple[str, ...]:
    """The cells that are open for a model and that requests decide on."""
    if device is not CUDA:
        return ()
    still_open = {cell for architecture in architectures for cell in open_cells().get(architecture, ())}
    return tuple(cell for cell in _USES if cell in still_open)


def check_request(params: Any, refused: Sequence[str]) -> None:
    """Refuse a request that uses what is not proven.

    Raises:
        VLLMValidationError: names it; the server answers with status 400.
    """
    for cell in refused:
        if _USES[cell](params):
            raise VLLMValidationError(
                f"{cell} is not proven deterministic for this model's architecture on GPUs, and this server promises "
                "determinism: ask without it, or serve with --deterministic-allow-uncovered"
            )
