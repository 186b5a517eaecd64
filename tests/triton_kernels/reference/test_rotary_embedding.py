# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.reference import rotary_embedding

from .. import oracles
from ..invariance import assert_batch_invariant, assert_same_bytes
from ..oracles import DTYPES, assert_close

MAX_POSITION = 4096
# Head size, the part of it that is rotated, heads.
SHAPES = [(64, 64, 4), (80, 80, 1), (128, 128, 5), (80, 32, 3), (6, 2, 7)]


def _angles(rotary_dim: int) -> torch.Tensor:
    inverse_frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return torch.arange(MAX_POSITION, dtype=torch.float64).unsqueeze(1) * inverse_frequency


def _inputs(head_size: int, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 1, 17, 256, 4095, 17])
    return positions, torch.randn(6, heads * head_size, generator=generator).to(dtype)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "rotary_dim", "heads"), SHAPES)
def test_close_to_the_oracle(
    head_size: int, rotary_dim: int, heads: int, dtype: torch.dtype, is_neox_style: bool
) -> None:
    angles = _angles(rotary_dim)
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    positions, x = _inputs(head_size, heads, dtype)
    kept = x.clone()
    out = rotary_embedding(positions, x, cache, head_size, is_neox_style)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert_close(out, oracles.rotary_embedding(positions, x, angles, head_size, is_neox_style))
    assert_same_bytes(x, kept, "x is left as it was")
    assert_same_bytes(out[0], x[0], "position 0 turns by no angle")
    beyond = slice(rotary_dim, None)
    assert_same_bytes(
        out.view(6, heads, head_size)[..., beyond], x.view(6, heads, head_size)[..., beyond], "what is not rotated"
    )


def test_reads_a_part_of_wider_rows() -> None:
    cache = torch.cat([_angles(64).cos(), _angles(64).sin()], dim=-1).bfloat16()
    positions, x = _inputs(64, 6, torch.bfloat16)
    part = x[:, 64:192]
    out = rotary_embedding(positions, part, cache, 64, True)
    assert_same_bytes(out, rotary_embedding(positions, part.contiguous(), cache, 64, True), "two of six heads")


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "rotary_dim", "heads"), SHAPES)
def test_rows_keep_their_bytes(
    head_size: int, rotary_dim: int, heads: int, dtype: torch.dtype, is_neox_style: bool, threads: int
) -> None:
    angles = _angles(rotary_dim)
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    positions, x = _inputs(head_size, heads, dtype)
    assert_batch_invariant(lambda p, x: rotary_embedding(p, x, cache, head_size, is_neox_style), positions, x)


def test_fault_position_follows_the_place_in_the_batch() -> None:
    cache = torch.cat([_angles(64).cos(), _angles(64).sin()], dim=-1)
    positions, x = _inputs(64, 2, torch.float32)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(
            lambda p, x: rotary_embedding(p[0] + torch.arange(len(x)), x, cache, 64, True), positions * 0, x
        )
