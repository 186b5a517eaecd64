"""Sampling on a GPU: what a row gives does not depend on other rows, its place, or what its neighbours ask for."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the extra 'cuda'")
import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu.sample import logprob
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler
from vllm_deterministic.triton_kernels.top_k_top_p import top_k_top_p

from vllm_deterministic.engine import patches

from ..engine.v2_sampler import PARAMETERS, Answer, Row, V2Sampler, alone, differences, rows
from . import models

pytestmark = pytest.mark.gpu

SLOTS = 320
# Around the 64 rows up to which vLLM's top-p takes another algorithm, and the multiprocessors of an H200.
SIZES = (2, 3, 17, 64, 65, 133, 300)
# A padded vocabulary, none of whose rows begins at a multiple of 16 bytes, and that of Qwen3.
WIDTHS = (32003, 151936)
Case = tuple[V2Sampler, list[Row], list[Answer]]


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        patches.apply(patches.CUDA_SAMPLING)
        yield


@pytest.fixture(scope="module")
def case(patched: None, device: Any) -> Case:
    """The larger vocabulary, with the answers of rows that are alone."""
    sampler, asked = V2Sampler(WIDTHS[-1], device, SLOTS), rows(WIDTHS[-1], device)
    return sampler, asked, alone(sampler, asked)


def test_neighbours_do_not_matter(case: Case) -> None:
    assert differences(*case, SIZES) == []


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "processed_logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_vocabulary(mode: str, dtype: torch.dtype, device: Any) -> None:
    sampler, asked = V2Sampler(WIDTHS[0], device, SLOTS, logprobs_mode=mode), rows(WIDTHS[0], device, dtype)
    assert differences(sampler, asked, alone(sampler, asked), (2, 65, 300)) == []


def test_neighbours_that_all_ask_for_one_thing(case: Case) -> None:
    """Each parameter makes vLLM take other branches for the batch; here all neighbours bring the same one."""
    sampler, asked, expected = case
    spread = [number for number, row in enumerate(asked) if row.name.endswith("spread")]
    found = []
    for neighbour in spread:
        for own in spread:
            answer = sampler([asked[neighbour], asked[own], asked[neighbour]], [5, 3, 200])[1]
            if what := answer.differs(expected[own]):
                found.append(f"{asked[own].name} beside {asked[neighbour].name}: {what}")
    assert found == []


def test_fault_noise_by_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = vllm_sampler.gumbel_sample

    def by_row(logits: Any, mapping: Any, temperature: Any, seed: Any, pos: Any, **rest: Any) -> Any:
        return draw(logits, mapping, temperature, seed, pos + torch.arange(len(pos), device=pos.device), **rest)

    monkeypatch.setattr(vllm_sampler, "gumbel_sample", by_row)
    assert any("token" in what for what in differences(*case, (17,)))


def test_fault_ties_by_torch_topk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "torch", torch)
    assert any("logprobs" in what for what in differences(*case, (17, 64)))


def test_fault_top_p_of_vllm(case: Case, monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    """Its algorithm for small batches is another than for large ones."""
    monkeypatch.setattr(vllm_sampler, "apply_top_k_top_p", topk_topp_sampler.apply_top_k_top_p)
    sampler, asked, _ = case
    top_p = [row for row in asked if row.name.startswith(("top-p,", "small top-p,"))]
    assert differences(sampler, top_p, alone(sampler, top_p), (65, 133)) != []


@pytest.mark.parametrize("width", [300, *WIDTHS])
@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
def test_kept_set_is_that_of_the_definition(width: int, scale: float, device: Any) -> None:
    """Flat rows, whose cut lies outside of the candidates, and peaked ones; continuous and full of ties."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(24, width, generator=generator, device=device) * scale
    x[::2] = x[::2].bfloat16().float()
    k = torch.tensor([1, 20, width, 1000, 50, width], dtype=torch.int32, device=device).repeat(4).clamp(max=width)
    p = torch.tensor([0.9513, 0.9013, 0.5013, 1.0, 0.9813], device=device).repeat(5)[:24]
    kept = top_k_top_p(x.clone(), k, p) > float("-inf")
    expected = _kept(x, k.unsqueeze(-1), p.double().unsqueeze(-1))
    differing = (kept != expected).sum(-1)
    # Rounding may move the cut by one of equal candidates, and by a few of many.
    assert (differing <= 1 + expected.sum(-1) // 10_000).all(), differing.tolist()
    by_count = p == 1
    assert torch.equal(kept[by_count], expected[by_count])


def _kept(x: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What rows keep, from the definition, in float64."""
    ordered, ids = x.double().sort(dim=-1, descending=True, stable=True)
    inside = torch.arange(x.shape[-1], device=x.device) < k
    masses = ordered.masked_fill(~inside, float("-inf")).softmax(-1)
    before = masses.cumsum(-1) - masses
    return torch.zeros_like(inside).scatter(-1, ids, inside & ((before < p) | (p >= 1)))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("qwen3"), "Qwen3ForCausalLM")


LENGTHS = (3, 17, 130, 300, 700)
ASKED = (
    *(
        models.Asked(
            name,
            LENGTHS[number % len(LENGTHS)],
            SamplingParams(
                **{
                    "temperature": 1.0,
                    "seed": 100 * number,
                    "max_tokens": 24,
                    "ignore_eos": True,
                    "detokenize": False,
                    **parameters,
                }
            ),
        )
        for number, (name, parameters) in enumerate(PARAMETERS.items())
    ),
    *(
        models.Asked(
            f"no seed, {n} choices",
            130,
            SamplingParams(n=n, temperature=1.0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=2),
        )
        for n in (1, 4)
    ),
)


def test_requests_alone_and_together(qwen3: Path, start: Callable[..., LLM]) -> None:
    """Every parameter and kind of request: alone, with prompts in chunks among neighbours, shuffled, streamed."""
    asked = [*ASKED, *models.EVERY_KIND]
    llm = start(qwen3, enforce_eager=True, skip_tokenizer_init=False)
    expected = models.alone(llm, asked)
    assert models.differing(asked, models.together(llm, asked), expected) == []
    assert models.differing(asked, models.streamed(llm, asked), expected) == []
    order = random.Random(0).sample(range(len(asked)), len(asked))
    shuffled = models.together(llm, [asked[number] for number in order])
    assert llm.reset_prefix_cache()
    assert models.differing([asked[number] for number in order], shuffled, [expected[number] for number in order]) == []
    assert models.differing(asked, models.together(llm, asked), expected) == []
    one, four = (expected[len(PARAMETERS) + number] for number in range(2))
    assert one[0] == four[0], "the first choice has the seed of the prompt"
    assert len({tokens for tokens, _ in four}) == 4, "choices without a seed differ"
