"""Proof, on the machine at hand, that the tiles of the matrix product give one another's bytes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plans import NoTileError, certified_plans

__all__ = ["NoTileError", "certified_plans"]


def __getattr__(name: str) -> Any:
    # The command line, which works without torch, imports this package for its command.
    if name in __all__:
        from . import plans

        return getattr(plans, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
