"""Ask the targets, now and then, whether they answer. `GET /ready` tells the last answer and asks nothing itself."""

import asyncio

from vllm_deterministic.service.metrics import Metrics
from vllm_deterministic.service.schema import TargetState
from vllm_deterministic.service.settings import ServiceSettings, Target
from vllm_deterministic.verify.client import CannotRun, Client
from vllm_deterministic.verify.settings import Settings

_INTERVAL_S = 5.0
_TIMEOUT_S = 3.0


class Probe:
    """The last known state of every target."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self.states = [_state(target, "It has not been asked yet.") for target in settings.target]

    @property
    def ready(self) -> bool:
        """Whether all targets answer."""
        return all(state.ready for state in self.states)

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            self.states = list(await asyncio.gather(*(self._ask(target) for target in self._settings.target)))
            for state in self.states:
                self._metrics.ready.labels(state.name).set(state.ready)
            await asyncio.sleep(_INTERVAL_S)

    async def wait_until_ready(self) -> None:
        """Return once all targets answered at the same time."""
        while not self.ready:
            await asyncio.sleep(0.5)

    async def _ask(self, target: Target) -> TargetState:
        key = self._settings.key_of(target)
        try:
            async with Client(Settings(base_url=target.url, api_key=key, timeout=_TIMEOUT_S)) as client:
                payload = await client.get_json("/v1/models")
        except CannotRun as error:
            return _state(target, str(error))
        models = payload.get("data") if isinstance(payload, dict) else None
        entries = models if isinstance(models, list) else []
        names = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]
        if not names or (target.model is not None and target.model not in names):
            return _state(target, f"It serves no model {target.model or ''}".strip() + ".")
        return TargetState(name=target.name, url=target.url, ready=True, model=target.model or names[0], detail="")


def _state(target: Target, detail: str) -> TargetState:
    return TargetState(name=target.name, url=target.url, ready=False, model=target.model, detail=detail)
