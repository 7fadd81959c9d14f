"""Who is calling: HTTP Basic with client id and secret (RFC 7617), a client certificate in their place (RFC 8705, section
2), or a Bearer token (RFC 6750) of ours, which is bound to the certificate that it was obtained with (section 3)."""

import base64
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, TypeVar

from sqlalchemy import Row
from starlette.requests import Request

from app.credentials.tokens import Claims, TokenKeys, secret_matches
from app.db import Clock, Database
from app.errors import NotFound, Unauthenticated
from app.models.login_failures import FailureKind
from app.models.principals import KeyKind, PrincipalState
from app.permissions import Principal
from app.services.principals import Client, as_principal, find_client_by_certificate, read_client, read_owner
from app.web.certificates import Certificate, within
from app.web.throttle import Throttle

ROW_LIFETIME = timedelta(seconds=2)
"""How long a principal's row is believed: so long a disabled one may go on."""

_REMEMBERED_ROWS = 1000
T = TypeVar("T")


class Authenticator:
    """Holds the rows of recent callers. One for each process."""

    def __init__(self, database: Database, keys: TokenKeys, *, issuer: str, clock: Clock, throttle: Throttle) -> None:
        self._throttle = throttle
        self._database = database
        self._keys = keys
        self._issuer = issuer
        self._clock = clock
        self._clients: OrderedDict[str, tuple[datetime, Client]] = OrderedDict()
        self._holders: OrderedDict[str, tuple[datetime, str]] = OrderedDict()

    async def authenticate(self, request: Request) -> Principal:
        """The caller, or Unauthenticated. The reason never tells whether the client id exists."""
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        match scheme.lower():
            case "basic":
                client_id, secret = parse_basic(value)
                return await self.by_secret(request, client_id, secret)
            case "bearer":
                return await self._by_token(request, value.strip())
            case "":
                if request.scope.get("client_certificate") is not None:
                    return await self.by_certificate(request)
                raise Unauthenticated("This needs credentials.")
        raise Unauthenticated("Only Basic and Bearer credentials are understood.")

    async def by_secret(self, request: Request, client_id: str, secret: str) -> Principal:
        if request.scope["scheme"] != "https" and not _from_loopback(request):
            raise Unauthenticated(
                "A secret is taken over TLS or from this machine only. Consider this one as read by others."
            )
        # An unknown client costs a comparison too: the time tells nothing.
        secret_matches(secret, None)
        found = await self._find(
            request, client_id, lambda key: key.kind == KeyKind.SECRET and secret_matches(secret, key.hash)
        )
        if found is None:
            # Only now, and not before: a right secret is not guessed, so to count others' guesses costs it nothing.
            address = request.client.host if request.client else ""
            async with self._throttle.guessing(FailureKind.API, client_id, address, secret):
                raise Unauthenticated(
                    "Client id or secret is wrong, or the client is disabled or may not call from here."
                )
        client, key_id = found
        return as_principal(client.row, key_id)

    async def by_certificate(self, request: Request, client_id: str | None = None) -> Principal:
        """By the certificate that the client showed to our proxy. With `client_id` it must be that client's."""
        certificate: Certificate | None = request.scope.get("client_certificate")
        if certificate is not None and certificate.not_before <= self._clock() <= certificate.not_after:
            holder = await self._holder(certificate.fingerprint)
            if holder is not None and client_id in (None, holder):
                found = await self._find(request, holder, lambda key: key.hash == certificate.fingerprint)
                if found is not None:
                    client, key_id = found
                    return as_principal(client.row, key_id, certificate.fingerprint)
        raise Unauthenticated(
            "No client has this certificate, or it is not valid today, or the client is disabled or may not call from here."
        )

    async def _by_token(self, request: Request, token: str) -> Principal:
        claims = self._keys.verify(token, issuer=self._issuer, audience=self._issuer, now=self._clock())
        found = await self._find(request, claims.client_id, lambda key: key.id == claims.key_id)
        if found is None:
            raise Unauthenticated(
                "The client of this token is disabled, or may not call from here, or its secret was changed since."
            )
        if claims.certificate is not None:
            shown: Certificate | None = request.scope.get("client_certificate")
            if shown is None or shown.fingerprint != claims.certificate or self._clock() > shown.not_after:
                raise Unauthenticated(
                    "This token comes with the client certificate that it was obtained with, or not at all."
                )
        if claims.subject != claims.client_id:
            return await self._owner(claims)
        client, key_id = found
        principal = as_principal(client.row, key_id, claims.certificate)
        if claims.scope is None:
            return principal
        narrowed = frozenset(permission for permission in principal.permissions if permission.value in claims.scope)
        return replace(principal, permissions=narrowed)

    async def _owner(self, claims: Claims) -> Principal:
        found = await self._database.reading(read_owner, int(claims.subject.removeprefix("owner-")))
        if found is None or found[1] != claims.generation:
            raise Unauthenticated("The access of this account was ended since, or the account is gone. Sign in again.")
        return replace(found[0], key_id=claims.key_id, certificate=claims.certificate)

    async def issue_for_owner(self, client: Principal, user_id: int) -> tuple[str, int]:
        """A token for the owner of an account, asked for by a client that knows that the owner has signed in.

        It ends with the client's key, and with the owner's access. Raises NotFound for an account that is not active.
        """
        found = await self._database.reading(read_owner, user_id)
        if found is None or client.key_id is None:
            raise NotFound(f"There is no active account {user_id}.")
        owner, generation = found
        return self._keys.issue(
            owner.id,
            client_id=client.id,
            key_id=client.key_id,
            generation=generation,
            certificate=client.certificate,
            scope=None,
            issuer=self._issuer,
            audience=self._issuer,
            now=self._clock(),
        )

    def _may_call(self, client: Client, key: Row[Any], request: Request) -> bool:
        """What has ended since the rows were read counts as ended."""
        now = self._clock()
        ends = [at for at in (client.row.expires_at, key.ends_at) if at is not None]
        if client.row.state != PrincipalState.ACTIVE or any(at <= now for at in ends):
            return False
        return client.networks is None or (request.client is not None and within(request.client.host, client.networks))

    async def issue(self, principal: Principal, scope: frozenset[str] | None) -> tuple[str, int]:
        """A token for this caller and its lifetime in seconds. It ends with the key by which the caller was known."""
        if principal.key_id is None:
            raise Unauthenticated("The client is disabled.")
        return self._keys.issue(
            principal.id,
            key_id=principal.key_id,
            certificate=principal.certificate,
            scope=scope,
            issuer=self._issuer,
            audience=self._issuer,
            now=self._clock(),
        )

    def jwks(self) -> dict[str, Any]:
        return self._keys.jwks()

    async def _holder(self, fingerprint: str) -> str | None:
        """Whose certificate it is, believed as long as a row."""
        now = self._clock()
        if (known := self._holders.get(fingerprint)) is not None and now - known[0] < ROW_LIFETIME:
            return known[1]
        holder = await self._database.reading(find_client_by_certificate, fingerprint, now)
        if holder is not None:
            _remember(self._holders, fingerprint, (now, holder))
        return holder

    async def _find(
        self, request: Request, client_id: str, matches: Callable[[Row[Any]], bool]
    ) -> tuple[Client, int] | None:
        """The client that may call, and which of its keys was shown. Rows are believed for a while, but not when they say
        no: a key that was made at this moment works at once."""
        if not client_id.isascii() or len(client_id) > 40:
            return None
        now = self._clock()
        known = self._clients.get(client_id)
        if known is not None and now - known[0] < ROW_LIFETIME:
            request.scope["claimed"] = client_id
            if (key_id := self._key(known[1], request, matches)) is not None:
                return known[1], key_id
        client = await self._database.reading(read_client, client_id, now)
        if client is None:
            return None
        request.scope["claimed"] = client_id
        _remember(self._clients, client_id, (now, client))
        key_id = self._key(client, request, matches)
        return None if key_id is None else (client, key_id)

    def _key(self, client: Client, request: Request, matches: Callable[[Row[Any]], bool]) -> int | None:
        shown = [key for key in client.keys if matches(key)]  # all of them are compared: the time tells nothing
        return next((key.id for key in shown if self._may_call(client, key, request)), None)


def _remember(rows: OrderedDict[str, T], name: str, row: T) -> None:
    rows[name] = row
    rows.move_to_end(name)
    if len(rows) > _REMEMBERED_ROWS:
        rows.popitem(last=False)


def parse_basic(value: str) -> tuple[str, str]:
    try:
        client_id, colon, secret = base64.b64decode(value.strip(), validate=True).decode("ascii").partition(":")
    except ValueError:  # not base64, or not ASCII on either side of it
        raise Unauthenticated("The Basic credentials cannot be read.") from None
    if not colon:
        raise Unauthenticated("The Basic credentials cannot be read.")
    return client_id, secret


def _from_loopback(request: Request) -> bool:
    return request.client is None or _is_loopback(request.client.host)  # None: a local socket


@lru_cache(maxsize=1000)
def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
