import re

from vllm_deterministic.report import json, markdown
from vllm_deterministic.report.pair import Pair

from .conftest import Recorded


async def test_verdict_arms_and_how_to_repeat(recorded: Recorded) -> None:
    record = await recorded()
    text = markdown.render(record)
    assert text.startswith("### ✅ Determinism: identical\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| identical", "| mixed", "| prefix", "| sampled"]
    assert len({row.count("|") for row in rows}) == 1
    assert f"```console\n{record.command}\n```" in text
    assert text.count("<details>") == text.count("</details>") == 1


async def test_what_differed_and_where(recorded: Recorded) -> None:
    text = markdown.render(await recorded(swap_token_beyond=3, settings={"arms": ["mixed"]}))
    assert text.startswith("### ❌ Determinism: diverged\n")
    assert "| ❌ diverged | 6 |" in text
    assert "| **2** | **2** |" in text
    assert re.search(r"- ` \d answers? of 6 part at token 8: 'token_id:2402' became 'token_id:2403'", text)


async def test_a_comment_has_room_for_any_run(recorded: Recorded) -> None:
    record = await recorded(swap_token_on_cache_hit=True, swap_token_beyond=2, unstable_seeds=True)
    huge = json.load(json.render(record).replace("token_id:", "x" * 10_000))
    text = markdown.render(huge)
    assert "more variants" in text
    assert len(text) < 65_536


async def test_what_servers_and_users_say_is_no_markup(recorded: Recorded) -> None:
    bad = "`` | <b>@someone #1 **x** [a](http://b) `"
    record = await recorded(swap_token_beyond=3, settings={"arms": ["mixed"], "metadata": {bad: bad}})
    record = record.model_copy(update={"message": bad, "notes": [bad]})
    lines = markdown.render(json.load(json.render(record).replace("token_id:", "`|``"))).splitlines()
    escaped = r"\`\` \| \<b\>@" + "\u200b" + r"someone \#1 \*\*x\*\* \[a\]\(http://b\) \`"
    assert lines[2] == escaped
    assert f"> {escaped}" in lines
    assert f"- {escaped}: ``` {bad} ```" in lines
    assert any(line.startswith("- ``` ") and line.endswith(" ```") and "'`|``2402'" in line for line in lines)


async def test_two_runs_stand_side_by_side(recorded: Recorded) -> None:
    settings = {"arms": ["identical", "mixed"]}
    pair = Pair(await recorded(swap_token_beyond=3, settings=settings), await recorded(settings=settings), ("a|b", "c"))
    text = markdown.render_pair(pair)
    assert "### ❌ a\\|b: diverged" in text
    assert "### ✅ c: identical" in text
    assert "|  | a\\|b | c | ratio |" in text
    assert "| mixed: unique outputs | 2 | 1 |  |" in text
    assert pair.agreement.sentence in text
