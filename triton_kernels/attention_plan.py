"""What attention may choose by load, and what it may not.

The fold decides bytes and follows the model alone. The plan decides speed: tiles, warps and how work is dealt follow
the batch, and every plan of one fold gives the same bytes.
"""

from dataclasses import dataclass

import triton

# Rows of a request for which its splits are computed side by side.
MOST_SHORT_ROWS = 64
# Programs that keep a device busy, where there is as much work; a few tiles' splits go to as many.
_PROGRAMS = 2048
# Splits of a program, where as many programs as run at once on a Hopper GPU, two on each multiprocessor, have them: a
# program's first loads wait for each other.
_LEAST, _AT_ONCE = 4, 264
# Above as many tiles, one program takes all splits of most of them.
BUSY_TILES = 256
# Above this splits are folded in registers: no states of splits are kept. CUDA graphs hold it for the longest context.
WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True)
class AttentionFold:
    """The order of additions: splits of ``split`` positions from position 0, taken in tiles of ``key_tile`` keys."""

    split: int
    key_tile: int

    def __post_init__(self) -> None:
        if self.key_tile < 16 or self.key_tile & (self.key_tile - 1) or self.split < 1 or self.split % self.key_tile:
            raise ValueError(
                f"split is {self.split} and key_tile {self.key_tile}; key_tile must be a power of two of at least 16, "
                "split a multiple of it"
            )


DEFAULT_FOLD = AttentionFold(split=512, key_tile=64)


@dataclass(frozen=True)
class AttentionTile:
    """What one program takes: ``block_m`` rows on ``warps`` warps; more ``stages`` load key tiles further ahead.

    Loading by pointer takes two stages for a tile: its blocks' numbers come first.
    """

    block_m: int
    warps: int
    stages: int


@dataclass(frozen=True)
class HopperTile:
    """What one program of ``attention_hopper`` takes: 64 rows on each of 2 or 3 warpgroups, a ring of key tiles."""

    warpgroups: int
    stages: int

    def __post_init__(self) -> None:
        if self.warpgroups not in (2, 3) or self.stages < 2:
            raise ValueError(f"{self} is none of 2 or 3 warpgroups and at least 2 stages")


@dataclass(frozen=True)
class AttentionPlan:
    """How a batch is cut into programs.

    Requests of up to ``short_rows`` rows (query tokens times query heads of a KV head) take the tile ``short``; each
    tile's splits are dealt to up to ``parts`` programs, at least ``least`` to each, fewer where else less than
    ``at_once`` programs would have any (if all requests were as long), and merged by a second kernel, or in registers
    where one program has them all: ``busy`` says of most tiles. Requests of more rows take the tile ``long``. None
    where there are no such requests. ``descriptors``: whether ``long`` loads full key tiles by tensor descriptor where
    the cache allows it. ``hopper``: what takes the place of ``long`` where ``attention_hopper`` can.
    """

    short: AttentionTile | None
    short_rows: int
    parts: int
    long: AttentionTile | None
    least: int = 1
    at_once: int = 1
    busy: bool = False
    descriptors: bool = True
    hopper: HopperTile | None = None

    def __post_init__(self) -> None:
        if (
            (self.short is None) != (self.short_rows == 0)
            or min(self.parts, self.least, self.at_once) < 1
            or self.short is self.long is None
        ):
            raise ValueError(f"{self} takes no request, or short_rows, parts, least or at_once does not fit it")


_HOPPER = {64: HopperTile(warpgroups=3, stages=4), 128: HopperTile(warpgroups=2, stages=4)}


def attention_plan(
    *, head_dim: int, group: int, kv_heads: int, requests: int, max_query_len: int, max_splits: int
) -> AttentionPlan:
    """The plan for a batch, from what is known without asking the device.

    Args:
        head_dim: elements of a head.
        group: query heads to a KV head.
        kv_heads: KV heads.
        requests: requests in the batch.
        max_query_len: the most query tokens of a request.
        max_splits: the most splits that a request's rows see.
    """
    rows = max_query_len * group
    only_short = rows <= max(MOST_SHORT_ROWS, group)
    if not only_short and requests == 1:
        return AttentionPlan(None, 0, 1, _long_tile(head_dim), hopper=_HOPPER.get(head_dim))
    # Beside long requests the short ones are taken to be decodes.
    short_rows = rows if only_short else max(16, group)
    block_m = min(64, max(16, triton.next_power_of_2(short_rows)))
    tiles = requests * kv_heads * triton.cdiv(short_rows, block_m)
    busy = tiles > BUSY_TILES
    if block_m > 16:
        short = AttentionTile(block_m, warps=4, stages=3)
    elif busy or head_dim > 128:
        short = AttentionTile(16, warps=2, stages=3)
    else:
        short = AttentionTile(16, warps=4, stages=5)
    # A long request among many must not wait for one program alone.
    parts = min(max_splits, max(2, triton.cdiv(_PROGRAMS, tiles)), 65535)
    if workspace_bytes(requests, kv_heads, max_splits, short_rows, head_dim) > WORKSPACE_BYTES:
        parts = 1
    least, at_once = (triton.cdiv(tiles, 32), 1) if busy else (_LEAST, _AT_ONCE)
    if busy and least >= max_splits:
        parts = 1
    long, hopper = (None, None) if only_short else (_long_tile(head_dim), _HOPPER.get(head_dim))
    return AttentionPlan(short, short_rows, parts, long, least, at_once, busy, hopper=hopper)


def long_tiles(tokens: int, requests: int, decodes: int, group: int, block_m: int) -> int:
    """How many tiles of ``block_m`` rows the long road numbers, see ``request_of``: as many as needed, or more.

    Args:
        tokens: query tokens of all requests.
        requests: requests in the batch.
        decodes: the first ones, of one token each, whose tiles are left out.
        group: query heads to a KV head.
        block_m: rows of a tile.
    """
    # Rounded down each by itself, as the tiles' numbers are: of the difference it would be one too few at times.
    return tokens * group // block_m - decodes * group // block_m + requests - decodes


def workspace_bytes(requests: int, kv_heads: int, max_splits: int, short_rows: int, head_dim: int) -> int:
    """Bytes of the splits' states: for each row of each split ``head_dim`` sums, a maximum and a total in fp32."""
    return requests * kv_heads * max_splits * short_rows * (head_dim + 2) * 4


def _long_tile(head_dim: int) -> AttentionTile:
    if head_dim <= 128:
        return AttentionTile(64, warps=4, stages=2)
    return AttentionTile(64, warps=8, stages=2)
