"""vLLM's GPU sampler with our patches, interpreted: rows alone and among neighbours, and planted faults."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_deterministic.engine.cuda_sampling import WithoutFusion

# In a process of its own: vLLM decides when it is imported whether there is a Triton that it may use.
_INTERPRETED = """
import functools, json, os, sys
from types import SimpleNamespace
sys.path.append(sys.argv[1])
os.environ["TRITON_INTERPRET"] = "1"
from triton.backends import backends
backends["cpu"] = SimpleNamespace(driver=None)  # vLLM's build for CPU asks for it, and for nothing in it
import torch
from vllm.v1.worker.gpu import buffer_utils
buffer_utils.is_uva_available = lambda: False
from vllm.v1.worker.gpu.sample import logprob, sampler as vllm_sampler
from tests.engine.v2_sampler import V2Sampler, alone, differences, rows
from vllm_deterministic.engine import patches

WIDTH, SLOTS, SIZES, CPU = 150, 24, (2, 3, 17), torch.device("cpu")
patches.apply(patches.CUDA_SAMPLING)
asked = rows(WIDTH, CPU, torch.float16)
found = {}
for mode in ("raw_logprobs", "processed_logprobs", "processed_logits"):
    sampler = V2Sampler(WIDTH, CPU, SLOTS, logprobs_mode=mode)
    expected = alone(sampler, asked)
    found[mode] = differences(sampler, asked, expected, SIZES)

sampler = V2Sampler(WIDTH, CPU, SLOTS)
expected = alone(sampler, asked)
answers = {row.name: answer for row, answer in zip(asked, expected)}
found["tokens"] = {name: answer.token for name, answer in answers.items()}
found["kept"] = {name: int((answer.logits > float("-inf")).sum()) for name, answer in answers.items()}
found["logprobs"] = {name: [id for id, _ in answer.logprobs] for name, answer in answers.items()}
logits = {row.name: row.logits.float() for row in asked}
name = "allowed and biased, spread"
found["biased"] = (answers[name].logits - logits[name])[[3, 40, 50, 88]].tolist()

draw = vllm_sampler.gumbel_sample
def by_row(logits, mapping, temperature, seed, pos, **rest):
    return draw(logits, mapping, temperature, seed, pos + torch.arange(len(pos)), **rest)
vllm_sampler.gumbel_sample = by_row
found["noise by row"] = differences(sampler, asked, expected, SIZES)
vllm_sampler.gumbel_sample = draw

ordered = logprob.torch
def last_first(x, k, dim=-1):
    top = ordered.topk(x.flip(-1), k) if k > 5 else ordered.topk(x, k)
    return torch.return_types.topk((top.values, x.shape[-1] - 1 - top.indices if k > 5 else top.indices))
logprob.torch = SimpleNamespace(**{**vars(torch), "topk": last_first})
found["ties by k"] = differences(sampler, asked, expected, SIZES)
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _INTERPRETED, str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return found


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "processed_logits"])
def test_neighbours_do_not_matter(interpreted: dict[str, Any], mode: str) -> None:
    assert interpreted[mode] == []


@pytest.mark.parametrize("fault", ["noise by row", "ties by k"])
def test_planted_fault_is_seen(interpreted: dict[str, Any], fault: str) -> None:
    assert interpreted[fault]


def test_each_parameter_does_what_it_says(interpreted: dict[str, Any]) -> None:
    tokens, kept, logprobs = (interpreted[name] for name in ("tokens", "kept", "logprobs"))
    assert (tokens["greedy, equal"], tokens["top-k of one, ties"]) == (0, tokens["greedy, ties"])
    assert logprobs["top-k, equal"][1:] == list(range(20))
    assert logprobs["logprobs of ids, spread"][1:] == [1, 4, 9]
    assert {kept[f"top-k, {kind}"] for kind in ("spread", "ties", "equal")} == {20}
    assert kept["top-k, masked"] == 4
    # 20 equal masses: before the twentieth lie 0.95 of them, and p in fp32 is a little less.
    assert kept["top-k and top-p, equal"] == 19
    assert kept["min-p, equal"] == 150
    assert kept["allowed, spread"] == 5
    assert kept["allowed, masked"] == 1
    assert (kept["no stop yet, spread"], kept["bad words, equal"]) == (148, 147)
    assert interpreted["biased"] == [2.0, -1.0, 0.0, 3.0]


def test_operations_of_a_kernel_round_by_themselves() -> None:
    class Kernel:
        fn = "as before"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **named: (grid, args, named)

    kernel = WithoutFusion(Kernel())
    assert kernel[(2, 3)](torch, BLOCK=4) == ((2, 3), (torch,), {"BLOCK": 4, "enable_fp_fusion": False})
    assert kernel.fn == "as before"
