"""Choice of the next token: greedy, filtered and seeded, with ties going to the lowest id."""

import torch

from .log_softmax import softmax

_MASK64 = (1 << 64) - 1


def greedy_sample(logits: torch.Tensor) -> torch.Tensor:
    """The id of each row's largest logit, the lowest id among equals.

    Args:
        logits: ``[B, V]``.

    Returns:
        ``[B]`` int64.
    """
    return logits.argmax(dim=-1)


def top_logprobs(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest logprobs of each row in descending order, ties by ascending id.

    ``torch.topk`` orders ties as its algorithm pleases, which changes with ``k``, and ``k`` is the largest that any
    neighbour asks for. Here logprob and id are joined in one integer key, so no two keys are equal.

    Args:
        logprobs: ``[B, V]`` fp32.
        k: how many, at most V.

    Returns:
        logprobs ``[B, k]`` fp32 and ids ``[B, k]`` int64.
    """
    V = logprobs.shape[-1]
    bits = logprobs.contiguous().view(torch.int32).to(torch.int64)
    # Negative floats count down in their bits: flip them so that integer order is float order.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(V, device=logprobs.device)
    keys = (ordered << 32) + (V - 1 - ids)
    top = V - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return logprobs.gather(-1, top), top


def top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Logits outside the top-k and outside the nucleus of mass ``p`` become -inf.

    Candidates stand in descending order, ties by ascending id. The nucleus keeps every candidate before which less than
    ``p`` of the mass of the top-k lies, so always the first.

    Args:
        logits: ``[B, V]`` fp32.
        k: ``[B]`` ints, V for no limit; or None.
        p: ``[B]`` floats, 1 for no limit; or None.

    Returns:
        ``[B, V]`` fp32.
    """
    if k is None and p is None:
        return logits
    V = logits.shape[-1]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if k is not None:
        keep &= torch.arange(V, device=logits.device) < k.unsqueeze(-1)
    if p is not None:
        mass = softmax(ordered.masked_fill(~keep, float("-inf")))
        before = torch.nn.functional.pad(mass.cumsum(-1)[:, :-1], (1, 0))
        # A row without a nucleus keeps even what rounding would push past a mass of one.
        keep &= (before < p.unsqueeze(-1)) | (p >= 1).unsqueeze(-1)
        keep[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, ids, keep), float("-inf"))


def noise_seed(seed: int, position: int) -> int:
    """The 63-bit seed of one request's noise at one output position.

    SplitMix64's finalizer (https://doi.org/10.1145/2714064.2660195) over a sequence that starts at ``seed`` scrambled:
    so neighbouring seeds share no positions, as ``seed + position`` would.

    Args:
        seed: the request's seed, any int.
        position: how many tokens the request has generated, from 0.
    """
    return (_mix64(_mix64(seed & _MASK64) + position * 0x9E3779B97F4A7C15)) >> 1


def _mix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
