# ruff: noqa: E402 (torch comes with the extras alone)
import threading
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.nn import functional as F  # noqa: N812
from vllm_deterministic.triton_kernels.bit_class import first_difference, same_bytes

from vllm_deterministic import deterministic_ops

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the result's largest element: the rounding of two results, and of sums in fp32.
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-4}
ROWS, HIDDEN, WIDTH = 1000, 2048, 3000


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


# Rows x [..., HIDDEN], a weight [WIDTH, HIDDEN] and a bias [WIDTH].
OPS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mm": lambda x, w, bias: torch.mm(x, w.t()),
    "addmm": lambda x, w, bias: torch.addmm(bias, x, w.t()),
    "addmm of matrix": lambda x, w, bias: torch.addmm(x[:, :1], x, w.t(), beta=0.5, alpha=2),
    "linear": lambda x, w, bias: F.linear(x, w, bias),
    "linear of 3": lambda x, w, bias: F.linear(x.unsqueeze(1), w, bias),
    "matmul": lambda x, w, bias: x @ w.t(),
    "mv": lambda x, w, bias: x @ w[0],
    "bmm": lambda x, w, bias: torch.bmm(x.unsqueeze(1), w[:96].t().expand(len(x), -1, -1)),
    "mean": lambda x, w, bias: x.mean(-1),
    "mean of two": lambda x, w, bias: x.view(-1, 32, 64).mean((1, 2)),
    "softmax": lambda x, w, bias: x.softmax(-1),
    "log_softmax": lambda x, w, bias: F.log_softmax(x, -1, dtype=torch.float32),
    "rms_norm": lambda x, w, bias: F.rms_norm(x, (HIDDEN,), w[0], 1e-6),
    "rms_norm, default epsilon": lambda x, w, bias: F.rms_norm(x * 1e-3, (HIDDEN,)),
    "layer_norm": lambda x, w, bias: F.layer_norm(x, (HIDDEN,), w[0], w[1]),
}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, bias = (torch.randn(*shape, device="cuda") for shape in ((ROWS, HIDDEN), (WIDTH, HIDDEN), (WIDTH,)))
    return x.to(dtype), (w / HIDDEN**0.5).to(dtype), bias.to(dtype)


def varying(name: str, dtype: torch.dtype) -> list[str]:
    """Where one of the first rows gets other bytes in a batch than alone."""
    op, (x, *weights) = OPS[name], inputs(dtype)
    alone = [op(x[row : row + 1], *weights)[0] for row in range(4)]
    found = []
    for size in (2, 5, 16, 33, 128, 300, ROWS):
        for shift in (0, 7):
            out = op(x.roll(shift, 0)[:size], *weights)
            for row in range(4):
                if shift + row < size and (place := first_difference(out[shift + row], alone[row])) is not None:
                    found.append(f"row {row} at {shift + row} of {size}: element {place}")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_an_operation_keeps_each_rows_bytes(name: str, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    expected = OPS[name](*given)
    with deterministic_ops():
        assert varying(name, dtype) == []
        out = OPS[name](*given)
    assert out.dtype == expected.dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * float(expected.float().abs().max()))
    assert same_bytes(OPS[name](*given), expected)


def test_fault_without_the_context_rows_vary() -> None:
    found = {f"{name}, {dtype}": len(varying(name, dtype)) for name in OPS for dtype in DTYPES}
    print({what: count for what, count in found.items() if count})
    assert any(found.values())


class Block(torch.nn.Module):
    """One layer of a transformer, and a head."""

    def __init__(self, hidden: int = 1024, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.RMSNorm(hidden), torch.nn.LayerNorm(hidden)
        self.qkv, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = torch.nn.Linear(hidden, 4 * hidden), torch.nn.Linear(4 * hidden, hidden)
        self.head = torch.nn.Linear(hidden, 5003, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x).log_softmax(-1, dtype=torch.float32)


@pytest.fixture
def block() -> Block:
    return Block().to("cuda", torch.bfloat16).eval()


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randn(40, 24, 1024, device="cuda", dtype=torch.bfloat16)


def varying_prompts(block: Block, prompts: torch.Tensor) -> list[str]:
    alone = [block(prompts[i : i + 1])[0] for i in range(8)]
    found = []
    for size in (2, 3, 8, 17, 40):
        out = block(prompts[:size].flip(0)).flip(0)
        found += [f"prompt {i} of {size}" for i in range(min(size, 8)) if not same_bytes(out[i], alone[i])]
    return found


def test_a_transformer_block_keeps_each_prompts_bytes(block: Block, prompts: torch.Tensor) -> None:
    expected = block(prompts)
    with deterministic_ops():
        assert varying_prompts(block, prompts) == []
        torch.testing.assert_close(block(prompts), expected, rtol=0.05, atol=0.2)


def test_a_cuda_graph_keeps_the_kernels_it_was_captured_with(block: Block, prompts: torch.Tensor) -> None:
    x = prompts[:8].clone()
    with deterministic_ops():
        expected = block(x)
        alone = block(x[3:4])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(x)
    x.copy_(prompts[8:16])
    graph.replay()
    x.copy_(prompts[:8])
    graph.replay()
    assert same_bytes(out, expected)
    assert same_bytes(out[3:4], alone)


def test_threads_share_it(block: Block, prompts: torch.Tensor) -> None:
    with deterministic_ops():
        expected = block(prompts[:1])
    entered, done = threading.Barrier(3), threading.Barrier(3)
    outs: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        with torch.inference_mode(), deterministic_ops():
            entered.wait(60)
            outs[number] = [block(prompts[: 1 + (number + i) % 5])[:1] for i in range(10)]
        done.wait(60)

    workers = [threading.Thread(target=work, args=[number]) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert len(outs) == 3
    for results in outs.values():
        assert all(same_bytes(out, expected) for out in results)


def test_it_ends_with_an_exception(block: Block, prompts: torch.Tensor) -> None:
    before = block(prompts)
    with deterministic_ops():
        inside = block(prompts)
    with pytest.raises(KeyError), deterministic_ops():
        raise KeyError
    assert same_bytes(block(prompts), before)
    assert not same_bytes(before, inside)


def test_what_it_refuses_and_what_it_leaves_to_torch() -> None:
    x = torch.ones(2, 2, device="cuda")
    with deterministic_ops():
        with pytest.raises(RuntimeError, match="float64"):
            x.double() @ x.double()
        with pytest.raises(RuntimeError, match="out_dtype"):
            torch.mm(x.half(), x.half(), out_dtype=torch.float32)
        with torch.inference_mode(False), pytest.raises(RuntimeError, match="no backward"):
            F.linear(torch.ones(2, 2, device="cuda", requires_grad=True), torch.ones(2, 2, device="cuda"))
        cpu = torch.ones(2, 2, dtype=torch.float64)
        assert torch.equal(cpu @ cpu, 2 * cpu)
    with torch.inference_mode(False):
        w = torch.ones(2, 2, device="cuda", requires_grad=True)
        F.layer_norm(F.linear(torch.ones(2, 2, device="cuda"), w), (2,)).sum().backward()
        assert w.grad is not None
