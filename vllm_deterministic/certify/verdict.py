"""What certification found for one weight, and its form in a file."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from vllm_deterministic.triton_kernels.cublaslt import Algorithm
from vllm_deterministic.triton_kernels.tiles import Tile

Status = Literal["in class", "outside", "failed"]


@dataclass(frozen=True)
class TileVerdict:
    """One tile.

    Attributes:
        tile: the tile, or the library's algorithm in its place.
        status: "in class", "outside" (other bytes than the reference's) or "failed" (it did not run).
        detail: where it is outside (family, M, first element), or why it did not run; empty in class.
    """

    tile: Tile | Algorithm
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class PlanVerdict:
    """All tiles of one weight.

    Attributes:
        n, k: the weight's shape ``[N, K]``.
        dtype: bfloat16, float16 or float32.
        segments: parts that K was cut into.
        every_m: whether every tile ran at every M, or only where the table may choose it.
        error: of the class reference against float64: Frobenius norm of the difference over that of the result.
        refusal: why no tile at all may be used: the reference did not run or is wrong; empty else.
        tiles: the verdict of each tile.
    """

    n: int
    k: int
    dtype: str
    segments: int
    every_m: bool
    error: float
    refusal: str
    tiles: tuple[TileVerdict, ...]

    @property
    def dropped(self) -> tuple[Tile | Algorithm, ...]:
        """The tiles that may not be used."""
        return tuple(verdict.tile for verdict in self.tiles if verdict.status != "in class")

    @property
    def in_class(self) -> bool:
        """Whether every tile may be used."""
        return not self.refusal and not self.dropped

    def to_json(self) -> dict[str, Any]:
        """The verdict in plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The verdict that ``to_json`` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        tiles = tuple(TileVerdict(_tile(tile["tile"]), tile["status"], tile["detail"]) for tile in data["tiles"])
        return cls(**{**data, "tiles": tiles})


def _tile(fields: dict[str, Any]) -> Tile | Algorithm:
    return Algorithm(**fields) if "algorithm" in fields else Tile(**fields)
