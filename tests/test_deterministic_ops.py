# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.nn import functional as F  # noqa: N812
from vllm_deterministic.triton_kernels.bit_class import same_bytes

import vllm_deterministic
from vllm_deterministic.aten import products, rows

from .triton_kernels.interpreter import interpreting

Op = Callable[..., torch.Tensor]
DTYPES = (torch.float16, torch.float32)
TOLERANCE = {torch.float16: 4e-3, torch.float32: 1e-5}
GENERATOR = torch.Generator()


def deterministic_ops() -> AbstractContextManager[None]:
    """The context for CPU tensors, which Triton's interpreter computes on."""
    return vllm_deterministic.deterministic_ops(_device="CPU")


@pytest.fixture
def interpreted() -> Iterator[None]:
    with interpreting(), torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    GENERATOR.manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


class Called(list[str]):
    """Names of the kernels that ran."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    called = Called()

    def spy(module: object, name: str) -> None:
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **given: called.append(name) or kernel(*args, **given))

    spy(products, "product")
    spy(products, "batched_matmul")
    for module, name in ((rows.mean_kernel, "mean"), (rows.softmax_kernel, "softmax")):
        spy(module, name)
    spy(rows.softmax_kernel, "log_softmax")
    spy(rows.rms_norm_kernel, "rms_norm")
    spy(rows.layer_norm_kernel, "layer_norm")
    return called


OPS: dict[str, tuple[str, Op, tuple[torch.Tensor, ...]]] = {
    "mm": ("product", torch.mm, (randn(3, 20), randn(20, 7))),
    "mm of transposed": ("product", lambda a, b: torch.mm(a.T, b.T), (randn(20, 3), randn(7, 20))),
    "mm, out": ("product", lambda a, b: torch.mm(a, b, out=a.new_empty(0)), (randn(3, 20), randn(20, 7))),
    "addmm": ("product", torch.addmm, (randn(7), randn(3, 20), randn(20, 7))),
    "addmm of one": ("product", torch.addmm, (randn(1), randn(3, 20), randn(20, 7))),
    "addmm of matrix": ("product", torch.addmm, (randn(3, 7), randn(3, 20), randn(20, 7))),
    "addmm, scaled": (
        "product",
        lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2),
        (randn(7), randn(3, 20), randn(20, 7)),
    ),
    "addmm, beta 0": (
        "product",
        lambda c, a, b: torch.addmm(c * float("nan"), a, b, beta=0),
        (randn(7), randn(3, 20), randn(20, 7)),
    ),
    "addmm_": ("product", lambda c, a, b: c.clone().addmm_(a, b), (randn(3, 7), randn(3, 20), randn(20, 7))),
    "bmm": ("batched_matmul", torch.bmm, (randn(2, 3, 20), randn(2, 20, 7))),
    "bmm, out": (
        "batched_matmul",
        lambda a, b: torch.bmm(a, b, out=a.new_empty(2, 3, 7)),
        (randn(2, 3, 20), randn(2, 20, 7)),
    ),
    "baddbmm": ("batched_matmul", torch.baddbmm, (randn(2, 3, 7), randn(2, 3, 20), randn(2, 20, 7))),
    "mv": ("product", torch.mv, (randn(3, 20), randn(20))),
    "addmv": ("product", torch.addmv, (randn(3), randn(3, 20), randn(20))),
    "dot": ("product", torch.dot, (randn(20), randn(20))),
    "matmul 1 1": ("product", torch.matmul, (randn(20), randn(20))),
    "matmul 1 2": ("product", torch.matmul, (randn(20), randn(20, 7))),
    "matmul 2 1": ("product", torch.matmul, (randn(3, 20), randn(20))),
    "matmul 3 1": ("product", torch.matmul, (randn(2, 3, 20), randn(20))),
    "matmul 3 2": ("product", torch.matmul, (randn(2, 3, 20), randn(20, 7))),
    "matmul 1 3": ("batched_matmul", torch.matmul, (randn(20), randn(2, 20, 7))),
    "matmul 2 3": ("batched_matmul", torch.matmul, (randn(3, 20), randn(2, 20, 7))),
    "matmul 4 3": ("batched_matmul", torch.matmul, (randn(2, 1, 3, 20), randn(2, 20, 7))),
    "einsum": ("batched_matmul", lambda a, b: torch.einsum("bij,bkj->bik", a, b), (randn(2, 3, 20), randn(2, 7, 20))),
    "linear": ("product", F.linear, (randn(3, 20), randn(7, 20))),
    "linear, bias": ("product", F.linear, (randn(2, 3, 20), randn(7, 20), randn(7))),
    "linear of strided": ("product", lambda x, *w: F.linear(x[:, ::2], *w), (randn(2, 6, 20), randn(7, 20), randn(7))),
    "linear to one": ("product", F.linear, (randn(3, 20), randn(20))),
    "mean of all": ("mean", torch.mean, (randn(3, 4, 5),)),
    "mean of one": ("mean", lambda x: x.mean(1), (randn(3, 4, 5),)),
    "mean of two": ("mean", lambda x: x.mean((0, -1), keepdim=True), (randn(3, 4, 5),)),
    "mean of no dimension": ("mean", lambda x: x.mean([]), (randn(3, 4, 5),)),
    "mean to fp32": ("mean", lambda x: x.mean(-1, dtype=torch.float32), (randn(3, 4, 5),)),
    "mean, out": ("mean", lambda x: torch.mean(x, -1, out=x.new_empty(3, 4)), (randn(3, 4, 5),)),
    "mean of strided": ("mean", lambda x: x[:, ::2].T.mean(0), (randn(3, 40),)),
    "softmax": ("softmax", lambda x: x.softmax(-1), (randn(3, 40),)),
    "softmax of columns": ("softmax", lambda x: x.softmax(0), (randn(3, 40),)),
    "softmax to fp32": ("softmax", lambda x: F.softmax(x, -1, dtype=torch.float32), (randn(3, 40),)),
    "softmax, out": ("softmax", lambda x: torch.softmax(x, 1, out=x.new_empty(3, 40)), (randn(3, 40),)),
    "softmax of a number": ("softmax", lambda x: x.softmax(0), (randn(),)),
    "log_softmax": ("log_softmax", lambda x: x.log_softmax(1), (randn(3, 40, 2),)),
    "cross entropy": ("log_softmax", lambda x: F.cross_entropy(x, torch.arange(3)), (randn(3, 40),)),
    "rms_norm": ("rms_norm", lambda x, w: F.rms_norm(x, (40,), w, 1e-6), (randn(3, 40), randn(40))),
    "rms_norm, plain": ("rms_norm", lambda x: F.rms_norm(x * 1e-3, (40,)), (randn(3, 40),)),
    "rms_norm of two": ("rms_norm", lambda x, w: F.rms_norm(x, (4, 10), w), (randn(3, 4, 10), randn(4, 10))),
    "layer_norm": ("layer_norm", lambda x, *w: F.layer_norm(x, (40,), *w), (randn(3, 40), randn(40), randn(40))),
    "layer_norm of two": ("layer_norm", lambda x: F.layer_norm(x, (4, 10)), (randn(3, 4, 10),)),
    "attention": (
        "batched_matmul",
        F.scaled_dot_product_attention,
        (randn(2, 2, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)),
    ),
    "attention, causal": (
        "softmax",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        (randn(2, 2, 5, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)),
    ),
    "attention, masked, grouped": (
        "softmax",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (torch.arange(5) < 4).expand(3, 5), enable_gqa=True),
        (randn(2, 4, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_gives_what_torch_gives_by_our_kernels(name: str, dtype: torch.dtype, grad_mode: type, called: Called) -> None:
    kernel, op, inputs = OPS[name]
    inputs = tuple(x.to(dtype) for x in inputs)
    expected = op(*inputs)
    assert called == []
    with interpreting(), grad_mode(), deterministic_ops():
        out = op(*inputs)
    assert kernel in called
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    called.clear()
    assert same_bytes(op(*inputs), expected)
    assert called == []


BATCHED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: F.linear(x, WEIGHT, WEIGHT[:, 0].contiguous()),
    "linear of strided": lambda x: F.linear(x.repeat_interleave(2, 0)[::2], WEIGHT, WEIGHT[:, 0].contiguous()),
    "linear of 3": lambda x: F.linear(x.unsqueeze(1).expand(-1, 2, -1), WEIGHT, WEIGHT[:, 0].contiguous()),
    "matmul": lambda x: x @ WEIGHT.T,
    "addmm": lambda x: torch.addmm(x[:, :1], x, WEIGHT.T),
    "mv": lambda x: x @ WEIGHT[0],
    "bmm": lambda x: x.unsqueeze(1) @ WEIGHT.T.expand(len(x), -1, -1),
    "mean": lambda x: x.mean(-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "rms_norm": lambda x: F.rms_norm(x, (70,)),
    "layer_norm": lambda x: F.layer_norm(x, (70,)),
}
WEIGHT = randn(16, 70)


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.usefixtures("interpreted")
def test_a_row_keeps_its_bytes(name: str) -> None:
    op, x = BATCHED[name], randn(6, 70)
    with deterministic_ops():
        whole = op(x)
        for row in range(len(x)):
            assert same_bytes(op(x[row : row + 1]), whole[row : row + 1])
        assert same_bytes(op(x.flip(0)).flip(0), whole)


def is_open() -> bool:
    # float64 is refused before a kernel runs: Triton's interpreter, which one thread has at a time, is not needed.
    with torch.no_grad():
        try:
            torch.mm(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
        except RuntimeError:
            return True
        return False


def test_nests_and_is_restored_after_an_exception() -> None:
    assert not is_open()
    with deterministic_ops():
        with deterministic_ops():
            assert is_open()
        assert is_open()
        with pytest.raises(KeyError), deterministic_ops():
            raise KeyError
        assert is_open()
    assert not is_open()
    with pytest.raises(KeyError), deterministic_ops():
        raise KeyError
    assert not is_open()


def test_threads_enter_and_leave_in_any_order() -> None:
    both, first_left, checked = threading.Barrier(2), threading.Event(), threading.Event()
    seen = {}

    def first() -> None:
        with deterministic_ops():
            both.wait(10)
        first_left.set()

    def second() -> None:
        with deterministic_ops():
            both.wait(10)
            first_left.wait(10)
            seen["second, after the first left"] = is_open()
            checked.wait(10)

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    assert first_left.wait(10)
    seen["outside, while the second is in"] = is_open()
    checked.set()
    for thread in threads:
        thread.join(10)
    assert seen == {"second, after the first left": True, "outside, while the second is in": True}
    assert not is_open()


def test_threads_that_come_and_go_leave_nothing_behind() -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    def enter() -> None:
        with deterministic_ops():
            torch.mm(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))

    ints = torch.arange(4).view(2, 2)
    workers = [threading.Thread(target=run, args=[enter]) for _ in range(4)]
    workers += [threading.Thread(target=run, args=[lambda: torch.mm(ints, ints)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    stop.wait(1)
    stop.set()
    for worker in workers:
        worker.join(10)
    assert errors == []
    assert not is_open()


def test_gradients_are_refused_inside_and_flow_outside() -> None:
    x, w = randn(3, 4).requires_grad_(), randn(5, 4)
    ops: list[Callable[[], torch.Tensor]] = [
        lambda: x @ w.T,
        lambda: F.linear(x, w),
        lambda: x.mean(),
        lambda: x.softmax(-1),
        lambda: x.log_softmax(-1),
        lambda: F.rms_norm(x, (4,)),
        lambda: F.layer_norm(x, (4,)),
        lambda: F.scaled_dot_product_attention(x, x, x),
    ]
    for op in ops:
        with deterministic_ops(), pytest.raises(RuntimeError, match="no backward"):
            op()
        x.grad = None
        op().sum().backward()
        assert x.grad is not None


def test_other_dtypes_are_refused_or_left_to_torch() -> None:
    with deterministic_ops():
        for dtype in (torch.float64, torch.complex64):
            x = torch.ones(2, 2, dtype=dtype)
            for op in (torch.mm, F.linear, torch.matmul):
                with pytest.raises(RuntimeError, match=str(dtype)):
                    op(x, x)
        with pytest.raises(RuntimeError, match=r"aten::_softmax .*float64"):
            torch.softmax(torch.zeros(2), 0, dtype=torch.float64)
        ints = torch.arange(4).view(2, 2)
        assert torch.mm(ints, ints).tolist() == [[2, 3], [6, 11]]
        with pytest.raises(RuntimeError, match="mean"):
            ints.mean()


@pytest.mark.usefixtures("interpreted")
def test_integers_may_be_averaged_in_fp32(called: Called) -> None:
    with deterministic_ops():
        assert torch.arange(5).mean(dtype=torch.float32) == 2
    assert called == ["mean"]


@pytest.mark.usefixtures("interpreted")
def test_nothing_to_add_up_is_left_to_torch(called: Called) -> None:
    with deterministic_ops():
        assert torch.mm(torch.ones(0, 4), torch.ones(4, 2)).shape == (0, 2)
        assert torch.equal(torch.mm(torch.ones(2, 0), torch.ones(0, 3)), torch.zeros(2, 3))
        assert torch.equal(F.linear(torch.ones(2, 0), torch.ones(3, 0), torch.ones(3)), torch.ones(2, 3))
        assert torch.ones(0).mean().isnan()
        assert torch.softmax(torch.ones(2, 0), -1).shape == (2, 0)
        assert F.layer_norm(torch.ones(0, 4), (4,)).shape == (0, 4)
    assert called == []


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.mm(torch.ones(2, 3), torch.ones(4, 2)),
        lambda: F.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(5)),
        lambda: torch.addmm(torch.ones(5, 4), torch.ones(1, 3), torch.ones(3, 4)),
        lambda: torch.addmm(torch.ones(2, 4).half(), torch.ones(2, 3), torch.ones(3, 4)),
        lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 4).half()),
        lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 4), out=torch.ones(2, 4).half()),
        lambda: torch.matmul(torch.ones(2, 3, 4), torch.ones(3, 4, 5)),
        lambda: torch.matmul(torch.ones(()), torch.ones(3)),
        lambda: F.layer_norm(torch.ones(2, 3), (4,)),
        lambda: F.rms_norm(torch.ones(2, 3), ()),
        lambda: torch.ones(2, 3).mean((0, 0)),
        lambda: torch.ones(2, 3).mean(2),
        lambda: torch.ones(2, 3).softmax(2),
    ],
)
def test_bad_input_raises_as_it_does_outside(wrong: Callable[[], torch.Tensor]) -> None:
    errors = (RuntimeError, ValueError, IndexError)
    with pytest.raises(errors):
        wrong()
    with deterministic_ops(), pytest.raises(errors):
        wrong()


def test_the_fast_path_of_attention_modules_is_refused() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.inference_mode(), deterministic_ops(), pytest.raises(RuntimeError, match="set_fastpath_enabled"):
        layer(torch.ones(1, 2, 8))


def test_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="CUDA"), vllm_deterministic.deterministic_ops():
        pass


def test_the_package_imports_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import vllm_deterministic; print(vllm_deterministic.__version__)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
