# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.cublaslt import Algorithm
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan

from vllm_deterministic.certify import cache, plans
from vllm_deterministic.certify.cache import VerdictCache
from vllm_deterministic.certify.report import render_console
from vllm_deterministic.certify.verdict import PlanVerdict, TileVerdict

from ..triton_kernels.faults import ordered_matmul

SMALL, LARGE = Tile(16, 16, 16, 4, 1), Tile(32, 32, 16, 4, 1, swapped=True)
PLAN = TilePlan(9, 64, 1, ((4, SMALL), (1 << 30, LARGE)))
VERDICT = PlanVerdict(
    n=9,
    k=64,
    dtype="float16",
    segments=1,
    every_m=False,
    error=0.1,
    refusal="",
    tiles=(TileVerdict(SMALL, "in class"), TileVerdict(LARGE, "outside", "normal, M=1")),
)
IDENTITY = {"gpu": "a", "driver": "1"}


@pytest.fixture
def kept(tmp_path: Path) -> VerdictCache:
    kept = VerdictCache(IDENTITY, tmp_path / "new")
    kept.add([VERDICT])
    return kept


def find(
    kept: VerdictCache, plan: TilePlan = PLAN, dtype: str = "float16", every_m: bool = False
) -> PlanVerdict | None:
    return kept.find(plan, dtype, every_m=every_m)


def test_a_verdict_comes_back(kept: VerdictCache) -> None:
    again = VerdictCache(IDENTITY, kept.path.parent)
    assert find(again) == VERDICT
    assert [path.name for path in kept.path.parent.iterdir()] == [kept.path.name]


def test_a_verdict_holds_for_its_own_plan_and_set_up_alone(kept: VerdictCache) -> None:
    assert find(kept, replace(PLAN, k=128)) is None
    assert find(kept, replace(PLAN, segments=2)) is None
    assert find(kept, replace(PLAN, ranges=PLAN.ranges[1:])) is None
    assert find(kept, dtype="bfloat16") is None
    for other in ({**IDENTITY, "gpu": "b"}, {**IDENTITY, "driver": "2"}):
        assert find(VerdictCache(other, kept.path.parent)) is None


def test_a_verdict_on_an_algorithm_of_the_library_comes_back(kept: VerdictCache) -> None:
    algorithm = Algorithm(66, 10, 35, 5, 0, 0, 3)
    plan = replace(PLAN, library=((64, None), (1 << 30, algorithm)))
    assert find(kept, plan) is None
    verdict = replace(VERDICT, tiles=(*VERDICT.tiles, TileVerdict(algorithm, "in class")))
    kept.add([verdict])
    assert find(kept, plan) == verdict
    table = render_console(IDENTITY, [verdict], {})
    assert "cuBLASLt 66 tile 10 stages 35 cluster 5 custom 3" in table


def test_a_verdict_over_every_m_serves_for_fewer(kept: VerdictCache) -> None:
    assert find(kept, every_m=True) is None
    thorough = replace(VERDICT, every_m=True)
    kept.add([thorough])
    assert find(kept, every_m=True) == find(kept) == thorough


def test_verdicts_gather_in_one_file(kept: VerdictCache) -> None:
    other = replace(VERDICT, k=128)
    VerdictCache(IDENTITY, kept.path.parent).add([other])
    assert find(kept) == VERDICT
    assert find(kept, replace(PLAN, k=128)) == other


def test_what_did_not_run_is_tried_again(kept: VerdictCache) -> None:
    failed = TileVerdict(LARGE, "failed", "RuntimeError: a")
    kept.add([replace(VERDICT, k=128, refusal="it did not run"), replace(VERDICT, k=256, tiles=(failed,))])
    assert len(json.loads(kept.path.read_text())["verdicts"]) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"identity": {"gpu": "b"}, "verdicts": []}',
        '{"identity": {"gpu": "a", "driver": "1"}, "verdicts": [{}]}',
        '{"identity": {"gpu": "a", "driver": "1"}, "verdicts": [{"tiles": [{"tile": {"x": 1}}]}]}',
        "\udcff",
    ],
)
def test_a_corrupt_or_foreign_file_is_told_of_and_replaced(
    kept: VerdictCache, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept.path.write_bytes(content.encode(errors="surrogateescape"))
    assert find(kept) is None
    assert str(kept.path) in caplog.text
    kept.add([VERDICT])
    assert find(kept) == VERDICT


def test_a_directory_that_cannot_be_written_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = VerdictCache(IDENTITY, tmp_path / "file" / "below")
    kept.add([VERDICT])
    assert find(kept) is None
    assert "cannot keep verdicts" in caplog.text


def test_the_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / "vllm-deterministic" / "certified"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_directory() == tmp_path / "home" / ".cache" / "vllm-deterministic" / "certified"


class Server:
    """`certified_plans` as a server calls it, on CPU with another product than the kernel."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.lines, self.calls = directory, list[str](), 0
        self.outside: tuple[Tile, ...] = ()
        monkeypatch.setattr(plans, "identity", lambda device: IDENTITY)
        monkeypatch.setattr(plans, "tile_plan", lambda dtype, capability, n, k, library: replace(PLAN, n=n, k=k))
        certify_plan = plans.certify_plan
        monkeypatch.setattr(
            plans, "certify_plan", lambda *args, **given: certify_plan(*args, **{**given, "rows": (1, 8)})
        )

    def matmul(self, x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        self.calls += 1
        return ordered_matmul(x, w, 4 if tile in self.outside else segments).to(x.dtype)

    def start(self, *shapes: tuple[int, int]) -> dict[tuple[int, int], TilePlan]:
        self.calls, self.lines = 0, []
        return plans.certified_plans(
            shapes,
            torch.float16,
            torch.device("cpu"),
            self.lines.append,
            cache_directory=self.directory,
            matmul=self.matmul,
        )


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def test_a_server_certifies_once(server: Server) -> None:
    made = server.start((9, 64), (7, 32), (9, 64))
    assert made == {(9, 64): PLAN, (7, 32): replace(PLAN, n=7, k=32)}
    assert server.calls
    assert [line.partition(": ")[2] for line in server.lines] == ["N=9, K=64", "N=7, K=32"]
    assert server.start((9, 64), (7, 32)) == made
    assert (server.calls, server.lines) == (0, [])
    server.start((9, 64), (5, 32))
    assert [line.partition(": ")[2] for line in server.lines] == ["N=5, K=32"]


def test_a_server_leaves_a_tile_out_and_says_so(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.outside = (SMALL,)
    for _ in range(2):  # the second from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            plan = server.start((9, 64))[9, 64]
        assert plan.tiles == (LARGE,)
        assert "N=9, K=64" in caplog.text
        assert "block_m=16" in caplog.text


def test_a_tile_that_takes_anothers_place_is_tried_there(server: Server) -> None:
    """The larger tile is outside its class at M = 1 alone, where only the smaller one's loss brings it."""
    exact = server.matmul

    def planted(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        return exact(x, w, tile=tile, segments=4 if tile == LARGE and len(x) == 1 else segments)

    server.matmul = planted  # type: ignore[method-assign]
    assert server.start((9, 64))[9, 64] == PLAN
    server.directory /= "anew"
    server.outside = (SMALL,)
    with pytest.raises(plans.NoTileError):
        server.start((9, 64))


def test_a_server_refuses_when_no_tile_is_left(server: Server) -> None:
    server.outside = (SMALL, LARGE)
    with pytest.raises(plans.NoTileError, match="N=9, K=64, float16"):
        server.start((9, 64))


def test_a_server_refuses_when_the_reference_is_wrong(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    exact: Callable[..., torch.Tensor] = server.matmul
    monkeypatch.setattr(server, "matmul", lambda *args, **given: exact(*args, **given) * 2)
    with pytest.raises(plans.NoTileError, match="off by"):
        server.start((9, 64))
