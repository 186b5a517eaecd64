"""The operations in float64 or plain Python, written from their definitions without looking at the code under test."""

import math

import torch

# One unit in the last place of the result's dtype, with room for a second rounding on the way.
RELATIVE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18}
DTYPES = tuple(RELATIVE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the dtype's relative error of ``expected``, or of its largest element where terms cancel."""
    assert expected.dtype == torch.float64
    relative = RELATIVE[actual.dtype]
    largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=relative * largest, equal_nan=True)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.einsum("mk,nk->mn", x.double(), weight.double())
    return out if bias is None else out + bias.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    x = x.double()
    out = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return out if weight is None else out * weight.double()


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    x = x.double()
    out = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + epsilon).sqrt()
    out = out if weight is None else out * weight.double()
    return out if bias is None else out + bias.double()


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    x = x.double()
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    gate, up = x[..., :half].double(), x[..., half:].double()
    return gate * torch.special.expit(gate) * up


def rotary_embedding(
    positions: torch.Tensor, x: torch.Tensor, angles: torch.Tensor, head_size: int, is_neox_style: bool
) -> torch.Tensor:
    """Each pair is a complex number, multiplied by ``exp(i * angles[position, pair])``."""
    heads = x.double().reshape(len(x), -1, head_size).clone()
    pairs = angles.shape[1]
    for pair in range(pairs):
        first, second = (pair, pair + pairs) if is_neox_style else (2 * pair, 2 * pair + 1)
        turned = torch.complex(heads[..., first], heads[..., second]) * torch.polar(
            torch.ones(len(x), 1, dtype=torch.float64), angles[positions, pair, None].double()
        )
        heads[..., first], heads[..., second] = turned.real, turned.imag
    return heads.reshape(x.shape)


def top_k(x: list[float], k: int) -> list[int]:
    """Ids of the ``k`` largest in descending order; NaN is larger than any number, and equals go by ascending id."""
    return sorted(range(len(x)), key=lambda token: (not math.isnan(x[token]), -x[token], token))[:k]


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    return x.double() - torch.logsumexp(x.double(), dim=-1, keepdim=True)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """Causal attention of a whole sequence: ``q`` ``[T, heads, D]``, ``k`` and ``v`` ``[T, KV heads, D]``."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    row, key = torch.arange(len(q)).unsqueeze(1), torch.arange(len(q))
    hidden = key > row
    if window is not None:
        hidden |= row - key >= window
    for head in range(q.shape[1]):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        scores = (q[:, head].double() @ keys.T * scale).masked_fill(hidden, -math.inf)
        out[:, head] = scores.softmax(-1) @ values
    return out


def top_k_top_p(logits: list[float], k: int, p: float) -> set[int]:
    """The ids that are kept: the ``k`` largest, and of those each before which less than ``p`` of their mass lies."""
    candidates = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:k]
    weights = [math.exp(logits[token] - logits[candidates[0]]) for token in candidates]
    kept, before = {candidates[0]}, 0.0
    for token, weight in zip(candidates, weights, strict=True):
        if before / math.fsum(weights) < p or p >= 1:
            kept.add(token)
        before += weight
    return kept
