"""What every request passes before its endpoint: an id, the API key, and a limit of its size."""

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from porter.serve.errors import ApiError, error_response

# Told to anyone: they are asked by load balancers and collectors, which hold no key
OPEN_PATHS = frozenset({"/health", "/metrics", "/version"})
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Answers carry the X-Request-Id of their request, or a new one; endpoints find it in the scope's state."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """401 without one of the keys; each is compared in constant time, by its hash."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        if is_open or self._is_known(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
        else:
            headers = {"WWW-Authenticate": "Bearer"}
            answer = error_response(401, "give a valid API key", code="invalid_api_key", headers=headers)
            await answer(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        equal = [hmac.compare_digest(given, known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(equal)


class BodyLimit:
    """413 for a body of more than `max_bytes`, whatever length it declares."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body is larger than {self._max_bytes} bytes"
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            answer = error_response(413, message, code="body_too_large", headers={"Connection": "close"})
            await answer(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            piece = await receive()
            received += len(piece.get("body", b""))
            if received > self._max_bytes:
                raise ApiError(413, message, code="body_too_large")
            return piece

        await self._app(scope, receive_limited, send)
