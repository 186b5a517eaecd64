from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_deterministic.cli import app
from vllm_deterministic.report import console, json
from vllm_deterministic.report.pair import Agreement, Pair, names_of

from .conftest import Recorded


async def test_equal_servers_agree(recorded: Recorded) -> None:
    pair = Pair(await recorded(), await recorded(), ("a", "b"))
    agreement = pair.agreement
    assert agreement.requests == agreement.same_tokens == agreement.same_bytes > 20
    assert pair.one_fingerprint
    assert pair.set_apart == []


async def test_answers_fingerprints_and_settings_that_differ_are_found(recorded: Recorded) -> None:
    settings = {"arms": ["identical"]}
    left = await recorded(settings=settings)
    right = await recorded(
        settings=settings | {"num_prompts": 14}, swap_token_of=lambda incoming: True, fingerprints=("fp-1",)
    )
    pair = Pair(left, right, ("a", "b"))
    assert pair.agreement == Agreement(requests=1, same_tokens=0, same_bytes=0)
    assert not pair.one_fingerprint
    assert pair.set_apart == [("system fingerprint", "fp-0", "fp-1"), ("--num-prompts", "12", "14")]


async def test_logprobs_alone_may_differ(recorded: Recorded) -> None:
    settings = {"arms": ["identical"], "max_concurrency": 1}
    pair = Pair(await recorded(settings=settings), await recorded(settings=settings, vary_logprob_beyond=0), ("a", "b"))
    assert pair.agreement == Agreement(requests=1, same_tokens=1, same_bytes=0)


async def test_ratios_are_of_the_second_to_the_first(recorded: Recorded) -> None:
    settings = {"arms": ["identical"], "max_concurrency": 1}
    fast, slow = await recorded(settings=settings), await recorded(settings=settings, latency_s=0.05)
    rows = {row.measure: row for row in Pair(fast, slow, ("fast", "slow")).rows("identical")}
    assert float(rows["requests/s"].ratio) < 1 < float(rows["latency p50, s"].ratio)
    assert rows["unique outputs"].ratio == ""


async def test_an_arm_of_one_run_alone_has_dashes(recorded: Recorded) -> None:
    pair = Pair(await recorded(), await recorded(settings={"arms": ["identical"]}), ("a", "b"))
    assert pair.arm_names == ["identical", "mixed", "prefix", "sampled"]
    assert {row.right for row in pair.rows("mixed")} == {"–"}
    page = console.render_pair(pair)
    assert "a: identical. Each of" in page
    assert "--arms: " in page


@pytest.mark.parametrize(
    ("left", "right", "names"),
    [
        ("x/default.json", "x/deterministic.json", ("default", "deterministic")),
        ("x/run.json", "y/run.json", ("x/run.json", "y/run.json")),
        ("run.json", "run.json", ("run.json (1)", "run.json (2)")),
    ],
)
def test_a_run_is_called_after_its_file(left: str, right: str, names: tuple[str, str]) -> None:
    assert names_of(Path(left), Path(right)) == names


async def test_the_command_compares_two_files(recorded: Recorded, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.render(await recorded(settings={"arms": ["identical"]})))
    words = ["report", f"{tmp_path}/one.json", "--compare", f"{tmp_path}/two.json"]
    page = f"{tmp_path}/pair.html"
    done = CliRunner().invoke(app, [*words, "--output", "kind=markdown", "kind=console", f"kind=html,path={page}"])
    assert done.exit_code == 0
    assert "### ✅ one: identical" in done.stdout
    assert "two: identical. Each of" in done.stdout
    assert "<title>one against two</title>" in Path(page).read_text()
    for kind in ("json", "junit"):
        refused = CliRunner().invoke(app, [*words, "--output", f"kind={kind}"])
        assert refused.exit_code == 2
        assert f"'{kind}' is not a kind of output; choose one of console, html, markdown" in refused.stderr
    missing = CliRunner().invoke(app, [*words[:-1], f"{tmp_path}/three.json"])
    assert (missing.exit_code, "cannot read" in missing.stderr) == (2, True)


async def test_a_terminal_gets_colors_and_a_file_none(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    record = await recorded(swap_token_beyond=3, settings={"arms": ["mixed"]})
    assert "\x1b[1;31mdiverged\x1b[0m" in console.render(record, color=True)
    assert "\x1b" not in console.render(record)
    assert "\x1b" not in console.render_pair(Pair(record, record, ("a", "b")))
