# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.token_logprobs import token_logprobs

from .interpreter import INTERPRETED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import DTYPES, assert_close

pytestmark = INTERPRETED


def _inputs(width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, width, generator=generator).mul(4).to(dtype)
    return x, torch.randint(width, (3, count), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [16, 4096])
def test_close_to_the_oracle(dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[token_logprobs.__module__], "_PART", part)
    for width, count in ((1, 1), (17, 5), (150, 33)):
        x, ids = _inputs(width, count, dtype)
        logprobs = token_logprobs(x, ids)
        assert_close(logprobs, x.double().log_softmax(-1).gather(-1, ids))
        assert_same_bytes(token_logprobs(x.float(), ids), logprobs, "the same values in another dtype")


def test_rows_keep_their_bytes() -> None:
    x, ids = _inputs(5000, 4)
    assert_batch_invariant(token_logprobs, x, ids, sizes=(2, 5))


def test_other_ids_do_not_matter() -> None:
    x, ids = _inputs(300, 40)
    assert_same_bytes(token_logprobs(x, ids[:, :3]), token_logprobs(x, ids)[:, :3].contiguous(), "more ids")
    assert_same_bytes(
        token_logprobs(x[:, ::2], ids[:, :9] // 2), token_logprobs(x[:, ::2].clone(), ids[:, :9] // 2), ""
    )
    assert token_logprobs(x, ids[:, :0]).shape == (3, 0)


def test_far_apart_and_infinite() -> None:
    x = torch.tensor([[0.0, -math.inf, 80.0], [math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3])
    logprobs = token_logprobs(x, torch.arange(3).repeat(4, 1))
    assert logprobs[0].tolist() == [-80.0, -math.inf, 0.0]
    assert logprobs[1:].isnan().all()


def test_refuses_other_ids() -> None:
    x, ids = _inputs(8, 2)
    for wrong in (ids.int(), ids[:2], ids[0]):
        with pytest.raises(ValueError, match=r"\[R, V\] and \[R, N\] in int64"):
            token_logprobs(x, wrong)


def test_fault_sums_of_floats_that_follow_the_batch() -> None:
    def by_batch(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        weights = (x - x.max(-1, keepdim=True).values).exp().half()
        total = sum(part.sum(-1, keepdim=True) for part in weights.split(64 if len(x) < 4 else 7, dim=-1))
        return x.gather(-1, ids) - total.log()

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(by_batch, *_inputs(300, 40), sizes=(2, 5))
