"""What needs a CUDA device; on a machine without one everything here is skipped."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def device() -> object:
    """The device that tests compute on."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
