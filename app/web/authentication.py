"""Who is calling: HTTP Basic with client id and secret (RFC 7617), or a Bearer token (RFC 6750) of ours."""

import base64
from collections import OrderedDict
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any

from sqlalchemy import Row
from starlette.requests import Request

from app.credentials.tokens import TokenKeys, secret_matches
from app.db import Clock, Database
from app.errors import Unauthenticated
from app.models.principals import PrincipalState
from app.permissions import Principal
from app.services.principals import as_principal, read_principal

ROW_LIFETIME = timedelta(seconds=2)
"""How long a principal's row is believed: so long a disabled one may go on."""

_REMEMBERED_ROWS = 1000


class Authenticator:
    """Holds the rows of recent callers. One for each process."""

    def __init__(self, database: Database, keys: TokenKeys, *, issuer: str, clock: Clock) -> None:
        self._database = database
        self._keys = keys
        self._issuer = issuer
        self._clock = clock
        self._rows: OrderedDict[str, tuple[datetime, Row[Any] | None]] = OrderedDict()

    async def authenticate(self, request: Request) -> Principal:
        """The caller, or Unauthenticated. The reason never tells whether the client id exists."""
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        match scheme.lower():
            case "basic":
                client_id, secret = parse_basic(value)
                return await self.by_secret(request, client_id, secret)
            case "bearer":
                return await self._by_token(value.strip())
            case "":
                raise Unauthenticated("This needs credentials.")
        raise Unauthenticated("Only Basic and Bearer credentials are understood.")

    async def by_secret(self, request: Request, client_id: str, secret: str) -> Principal:
        if request.scope["scheme"] != "https" and not _from_loopback(request):
            raise Unauthenticated(
                "A secret is taken over TLS or from this machine only. Consider this one as read by others."
            )
        row = await self._row(client_id)
        if not secret_matches(secret, row.secret_hash if row else None) or row is None:
            raise Unauthenticated("Client id or secret is wrong, or the client is disabled.")
        return as_principal(row)

    async def _by_token(self, token: str) -> Principal:
        claims = self._keys.verify(token, issuer=self._issuer, audience=self._issuer, now=self._clock())
        row = await self._row(claims.subject)
        if row is None or row.version != claims.generation:
            raise Unauthenticated("The client of this token is disabled, or its secret was changed since.")
        principal = as_principal(row)
        if claims.scope is None:
            return principal
        narrowed = frozenset(permission for permission in principal.permissions if permission.value in claims.scope)
        return Principal(principal.id, principal.name, principal.role, narrowed)

    async def issue(self, principal: Principal, scope: frozenset[str] | None) -> tuple[str, int]:
        """A token for this caller and its lifetime in seconds. It carries the row's version, and so ends with the secret."""
        row = await self._row(principal.id)
        if row is None:
            raise Unauthenticated("The client is disabled.")
        return self._keys.issue(
            principal.id,
            generation=row.version,
            scope=scope,
            issuer=self._issuer,
            audience=self._issuer,
            now=self._clock(),
        )

    def jwks(self) -> dict[str, Any]:
        return self._keys.jwks()

    async def _row(self, client_id: str) -> Row[Any] | None:
        now = self._clock()
        if (known := self._rows.get(client_id)) is not None and now - known[0] < ROW_LIFETIME:
            return known[1]
        if not client_id.isascii() or len(client_id) > 40:
            return None
        row = await self._database.reading(read_principal, client_id)
        if row is not None and row.state != PrincipalState.ACTIVE:
            row = None
        self._rows[client_id] = (now, row)
        self._rows.move_to_end(client_id)
        if len(self._rows) > _REMEMBERED_ROWS:
            self._rows.popitem(last=False)
        return row


def parse_basic(value: str) -> tuple[str, str]:
    try:
        client_id, colon, secret = base64.b64decode(value.strip(), validate=True).decode("ascii").partition(":")
    except ValueError:  # not base64, or not ASCII on either side of it
        raise Unauthenticated("The Basic credentials cannot be read.") from None
    if not colon:
        raise Unauthenticated("The Basic credentials cannot be read.")
    return client_id, secret


def _from_loopback(request: Request) -> bool:
    if request.client is None:
        return True  # a local socket
    try:
        return ip_address(request.client.host).is_loopback
    except ValueError:
        return False
