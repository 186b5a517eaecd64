"""What sleeps and wakes: the weights that come back are those of the fingerprint, and the cache is clean."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.v1.worker.gpu_worker import Worker

from vllm_deterministic.engine.config import RefusalError
from vllm_deterministic.engine.cuda import DeterministicCUDAWorker


@pytest.mark.parametrize("method", ["reload_weights", "reset_weights"])
def test_refused_on_cpu(method: str, engine: LLM, answers: Any) -> None:
    expected = answers.alone(engine, [5])
    with pytest.raises(RefusalError, match="weights is not covered on CPU"):
        engine.collective_rpc(method)
    assert engine.reset_prefix_cache()
    assert answers.alone(engine, [5]) == expected


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU's worker around two parameters; vLLM's own methods do to them what they do to a model's."""
    model = torch.nn.Linear(4, 3)

    def spoil(self: Any, *_: Any) -> None:
        with torch.no_grad():
            model.weight.fill_(float("nan"))

    def reload(self: Any, weights: dict[str, torch.Tensor]) -> None:
        model.load_state_dict(weights)

    for name, method in {
        "sleep": spoil,
        "reset_weights": spoil,
        "reload_weights": reload,
        "wake_up": lambda self, tags: None,
        "execute_model": lambda self, step: step,
    }.items():
        monkeypatch.setattr(Worker, name, method)
    found = DeterministicCUDAWorker.__new__(DeterministicCUDAWorker)
    caches = [torch.full((3, 2), float("nan")) for _ in range(2)]
    found.model_runner = SimpleNamespace(get_model=lambda: model, kv_caches=caches)
    found._coverage = SimpleNamespace(uncovered=())  # type: ignore[assignment]
    return found


def weights_of(worker: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.model_runner.get_model().state_dict().items()}


@pytest.mark.parametrize("gone", [lambda worker: worker.sleep(2), lambda worker: worker.reset_weights()])
def test_nothing_is_computed_before_the_weights_are_back(gone: Any, worker: Any) -> None:
    kept = weights_of(worker)
    assert worker.execute_model("step") == "step"
    gone(worker)
    with pytest.raises(RefusalError, match=r"1 of 2 weights are not those .* \(weight is the first\)"):
        worker.execute_model("step")
    worker.reload_weights(kept)
    assert worker.execute_model("step") == "step"


def test_other_weights_are_refused_until_the_first_are_back(worker: Any) -> None:
    kept = weights_of(worker)
    other = {**kept, "bias": kept["bias"] + 1}
    with pytest.raises(RefusalError, match=r"\(bias is the first\)"):
        worker.reload_weights(other)
    with pytest.raises(RefusalError, match=r"\(bias is the first\)"):
        worker.reload_weights(other)
    with pytest.raises(RefusalError):
        worker.execute_model("step")
    worker.reload_weights(kept)
    assert worker.execute_model("step") == "step"


def test_without_the_promise_weights_are_the_users(worker: Any) -> None:
    worker._coverage = SimpleNamespace(uncovered=("a gap",))
    worker.reload_weights({name: tensor + 1 for name, tensor in weights_of(worker).items()})
    assert worker.execute_model("step") == "step"


@pytest.mark.parametrize(("tags", "clean"), [(None, True), (["kv_cache"], True), (["weights"], False)])
def test_the_cache_wakes_up_clean(tags: list[str] | None, clean: bool, worker: Any) -> None:
    worker.wake_up(tags)
    assert all(bool((cache == 0).all()) == clean for cache in worker.model_runner.kv_caches)
