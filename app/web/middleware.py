"""Around every request: an id, a log line, headers that are always right, an answer whatever happens; HEAD for GET."""

import re
import time
from secrets import token_hex
from typing import Any

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.log import log
from app.web.audit import client_address
from app.web.dependencies import MAX_BODY
from app.web.problems import internal_error, too_large

_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}\Z")

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_DEFAULT_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_NO_STORE = (b"cache-control", b"no-store")


class RequestEnvelope:
    """Plain ASGI: Starlette's BaseHTTPMiddleware costs more than a query."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        status = 0
        head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if head else scope

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                names = {name for name, _ in headers}
                headers.append((b"x-request-id", request_id.encode()))
                headers.extend(_HEADERS)
                if b"content-security-policy" not in names:
                    headers.append(_DEFAULT_POLICY)
                if b"cache-control" not in names:
                    headers.append(_NO_STORE)
            elif head:
                message = {**message, "body": b""}
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            # The routes stop reading at MAX_BODY; the framework would answer a length that is announced in plain text.
            answer = too_large(Request(inner)) if _length(scope) > MAX_BODY else self.app
            await answer(inner, receive, send_with_headers)
        except Exception as error:
            if status:
                raise
            await internal_error(Request(scope), error)(scope, receive, send_with_headers)
        finally:
            took = round((time.perf_counter() - started) * 1000, 1)
            log.info("request", **_described(scope, inner), status=status, ms=took)
        # The caller has its answer: what was refused is recorded at nobody's expense.
        if 400 <= status < 500 and (refusals := getattr(scope["app"].state, "refusals", None)) is not None:
            await refusals.record(inner, status)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GIVEN_ID.match(value):
            return str(value.decode())
    return token_hex(8)


def _length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


def _described(scope: Scope, inner: Scope) -> dict[str, Any]:
    """What the routes have found out is in `inner`."""
    # The path alone: a query string may hold what a caller did not mean to be logged.
    described = {"method": scope["method"], "path": scope["path"], "client": client_address(inner)}
    if (principal := inner.get("principal")) is not None:
        described["principal"] = principal.id
    if (problem := inner.get("problem")) is not None:
        described["problem"] = problem
    return described
