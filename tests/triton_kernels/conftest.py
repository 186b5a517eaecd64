import contextlib
from collections.abc import Iterator

import pytest

# A thread that waits by spinning takes a core from the one it waits for where other processes compute too, and these
# operations are small: it is most of their time. OpenMP reads its settings once, when torch loads it.
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("OMP_WAIT_POLICY", "passive")
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401


@pytest.fixture(params=["one thread", "all threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads that torch computes with in this test: one, or all and at least two."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else max(2, before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[int]:
    """One thread in this test, for what does not follow their number."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield 1
    torch.set_num_threads(before)


@pytest.fixture
def interpreter() -> Iterator[None]:
    """The kernels run by Triton's interpreter in this test: `pytestmark = pytest.mark.usefixtures("interpreter")`."""
    pytest.importorskip("triton")
    from .interpreter import interpreting

    with interpreting():
        yield
