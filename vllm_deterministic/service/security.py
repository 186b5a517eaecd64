"""What stands before every route: the token, the host name, and the size of the body."""

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_deterministic.service.problems import problem
from vllm_deterministic.service.settings import ServiceSettings, is_loopback

# The page at / holds no data: it asks for the token, then for the data.
PUBLIC = frozenset({"/", "/favicon.ico", "/health", "/ready", "/metrics"})
_BODY_TIMEOUT_S = 10.0


class Guard:
    """ASGI middleware that lets through what may pass."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self._app = app
        self._token = settings.token.get_secret_value().encode() if settings.token else None
        self._local = self._token is None and is_loopback(settings.host)
        self._max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a problem, or hand the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._local and not is_loopback(_host(headers.get("host", ""))):
            # A page of some site, its name turned to 127.0.0.1, would otherwise reach a service without a token.
            refusal = problem(400, "Without a --token this service answers under a loopback name alone.")
        elif scope["path"] not in PUBLIC and not self._knows_token(headers.get("authorization", "")):
            refusal = problem(401, "The bearer token is missing or wrong.", headers={"WWW-Authenticate": "Bearer"})
        else:
            try:
                async with asyncio.timeout(_BODY_TIMEOUT_S):
                    body = await self._body(headers, receive)
            except ClientDisconnect:
                return
            except TimeoutError:
                refusal = problem(408, f"The body did not arrive within {_BODY_TIMEOUT_S:g} s.")
            else:
                if body is not None:
                    await self._app(scope, _replay(body, receive), send)
                    return
                refusal = problem(413, f"The body is larger than {self._max_body_bytes} bytes (--max-body-bytes).")
        await refusal(scope, receive, send)

    def _knows_token(self, authorization: str) -> bool:
        if self._token is None:
            return True
        scheme, _, given = authorization.partition(" ")
        return hmac.compare_digest(given.strip().encode(), self._token) and scheme.lower() == "bearer"

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, None where it is too large."""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return None
        body = bytearray()
        while len(body) <= self._max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return bytes(body)
        return None


def _host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
