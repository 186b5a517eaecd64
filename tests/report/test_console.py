from vllm_deterministic.report import console

from .conftest import Recorded


async def test_tells_arms_cache_hits_verdict_and_how_to_repeat(recorded: Recorded) -> None:
    page = console.render(await recorded())
    for arm in ("identical", "mixed", "prefix", "sampled"):
        assert arm in page
    assert "prefix: cached tokens found: growing" in page
    assert "Verdict: identical. Each of" in page
    assert "Repeat with: vllm-deterministic verify --base-url http://fake" in page


async def test_tells_where_answers_part_and_beside_what(recorded: Recorded) -> None:
    page = console.render(await recorded(swap_token_beyond=3, settings={"arms": ["mixed"]}))
    assert "mixed: the request got different outputs" in page
    assert "part at token 8: 'token_id:" in page
    assert "logprob gap 0.125" in page
    assert "beside mixed-" in page


async def test_tells_what_changed_where_tokens_agree(recorded: Recorded) -> None:
    page = console.render(await recorded(vary_logprob_beyond=3, settings={"arms": ["mixed"]}))
    assert "got different logprobs (the tokens agree)" in page
    assert "part at logprobs of token 1 by 1.19e-07" in page


async def test_spells_out_a_few_variants_and_counts_the_rest(recorded: Recorded) -> None:
    page = console.render(await recorded(swap_token_on_cache_hit=True, settings={"arms": ["prefix"]}))
    assert page.count("part at token") == 3
    assert "more variants; --output kind=json,path=FILE holds all" in page


async def test_says_how_far_an_unfinished_run_came(recorded: Recorded) -> None:
    page = console.render(await recorded(status_after=(6, 500)))
    assert "incomplete" in page
    assert "of 12" in page
    assert "Verdict: error." in page


async def test_a_run_that_never_began_is_a_verdict_alone(recorded: Recorded) -> None:
    page = console.render(await recorded(logprobs=False))
    assert "Verdict: error." in page
    assert "unique" not in page
