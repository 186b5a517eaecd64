"""Run the application under uvicorn until a signal."""

import asyncio
import contextlib
import logging
import signal
import socket
from types import FrameType

import uvicorn

from vllm_deterministic.service.app import make_app
from vllm_deterministic.service.settings import ServiceSettings
from vllm_deterministic.service.state import State


class _Server(uvicorn.Server):
    """A server whose event streams end when it is asked to stop, so that nothing has to be cut off."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.runs.closing = True
        super().handle_exit(sig, frame)


def serve(settings: ServiceSettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises ValueError, in one line, where the port or the database cannot be had."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # uvicorn raises the signal again after its shutdown, which would end this process by it rather than with 0.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with _listen(settings.host, settings.port) as listener, contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(settings, listener))


async def _serve(settings: ServiceSettings, listener: socket.socket) -> None:
    state = await State.open(settings)
    config = uvicorn.Config(
        make_app(state), log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    host, port = listener.getsockname()[:2]
    logging.getLogger(__name__).info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    await _Server(config, state).serve(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from None
    return listener
