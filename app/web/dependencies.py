"""What every handler gets: the caller, checked for a permission, and with it the way to read and write.

A route declares its permission in its signature (`call: CanReadUsers`), or `dependencies=[PUBLIC]`, or it does not import.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastapi import Depends, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from app.config import ApiSettings, Networks
from app.db import Clock, Database, is_busy, is_lost
from app.errors import AddressRetired, AliasExists, Forbidden, UserExists
from app.permissions import Permission, Principal, Role
from app.queue.wake import wake
from app.services.changes import Actor, Change
from app.web.authentication import Authenticator
from app.web.idempotency import idempotency_key, once, request_hash
from app.web.problems import WrongMediaType
from app.web.recent import Recent
from app.web.throttle import Throttle
from app.web.waiting import JobWaiter

P = ParamSpec("P")
R = TypeVar("R")

MAX_BODY = 64 * 1024
TRIES = 3
"""How often a transaction that ran into another is run, the first time included."""


@dataclass(frozen=True, slots=True)
class Service:
    """What one API process has one of. Made in `main.create_app`, found in `app.state.service`."""

    settings: ApiSettings
    database: Database
    authenticator: Authenticator
    waiter: JobWaiter
    request_key: bytes
    throttle: Throttle
    policy_key: bytes | None
    """What Dovecot shows; None: it is not answered."""
    policy_networks: Networks
    link_key: bytes
    clock: Clock
    recent_identities: Recent = field(default_factory=Recent)

    @property
    def retention(self) -> timedelta:
        return timedelta(days=self.settings.retention_days)


class Call:
    """One authenticated request."""

    __slots__ = ("principal", "replayed", "request", "service")

    def __init__(self, request: Request, principal: Principal, service: Service) -> None:
        self.request = request
        self.principal = principal
        self.service = service
        self.replayed = False
        """An earlier request with the same Idempotency-Key had done it already."""

    def may(self, permission: Permission) -> bool:
        return permission in self.principal.permissions

    async def read(
        self, function: Callable[Concatenate[AsyncConnection, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Calls a reading service function on a connection that is given back before the answer is made."""
        return await self.service.database.reading(function, *args, **kwargs)

    async def write(
        self, function: Callable[Concatenate[Change, P], Awaitable[Any]], *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        """Begin, call, commit; the whole again when another transaction was in the way. Then wake the workers.

        The connection is given back before this returns, so that whoever waits for the host holds none.
        """
        key = idempotency_key(self.request)
        said = "" if key is None else await request_hash(self.request, self.service.request_key)
        host = self.request.client.host if self.request.client else ""
        principal = self.principal
        actor = Actor(principal.id, host, self.request.scope["request_id"], principal.key_id, principal.rank)
        for attempt in range(1, TRIES + 1):
            committing = False
            try:
                async with self.service.database.write.connect() as connection, connection.begin():
                    change = Change(connection, actor, self.service.clock())
                    if key is None:
                        made = await function(change, *args, **kwargs)
                    else:
                        made, first = await once(change, key, said, partial(function, change, *args, **kwargs))
                        self.replayed = not first
                    committing = True
                break
            except (UserExists, AddressRetired, AliasExists) as error:
                needed = Permission.ALIASES_READ if isinstance(error, AliasExists) else Permission.USERS_READ
                if not self.may(needed):
                    error.members = {name: value for name, value in error.members.items() if name == "field"}
                raise
            except DBAPIError as error:
                # A connection that is lost while it commits may have committed; before that it cannot have.
                passing = is_busy(error) or (is_lost(error) and not committing)
                if not passing or attempt == TRIES:
                    raise
                await asyncio.sleep(random.random() * 0.02 * attempt)  # noqa: S311  spreads retries, guards nothing
        wake_workers(self.service.settings.wake_directory)
        return made


def wake_workers(directory: Path) -> None:
    """All of this machine: the workers of others see the job when they poll."""
    try:
        names = os.listdir(directory)  # noqa: PTH208  five times as fast as Path.glob, at every write
    except OSError:
        return
    for name in names:
        if name.endswith(".wake"):
            wake(directory, name.removesuffix(".wake"))


def _is_json(request: Request) -> bool:
    """Also when there is no body and so no type: what is missing is named then."""
    given = request.headers.get("content-type")
    if given is None:
        return request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
    kind = given.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


class Needs:
    """A dependency: the caller must have this permission. None: any caller whom we know.

    `owners`: also the owner of the account that `{user}` in the path names. Without a `{user}` the handler itself keeps an
    owner to what is theirs.
    """

    def __init__(self, permission: Permission | None, *, owners: bool = False) -> None:
        self.permission = permission
        self.owners = owners

    async def __call__(self, request: Request) -> Call:
        service: Service = request.app.state.service
        principal = request.scope["principal"] = await service.authenticator.authenticate(request)
        if self.permission is not None and self.permission not in principal.permissions:
            raise Forbidden(f"This needs the permission {self.permission}.", missing=self.permission.value)
        if principal.role is Role.OWNER:
            named = request.path_params.get("user")
            if not self.owners or (named is not None and not _is_own(named, principal)):
                raise Forbidden("An owner's token opens what belongs to that one account, and nothing else.")
        return Call(request, principal, service)


def _is_own(named: str, owner: Principal) -> bool:
    return named == str(owner.user_id) or named.lower() == owner.name


async def _public() -> None:
    """Marks a route that needs no credentials."""


PUBLIC = Depends(_public)


class Route(APIRoute):
    """A route that says who may call it, refuses query parameters that it does not know, and limits its body."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["max_body_size"] = MAX_BODY
        super().__init__(path, endpoint, **options)
        needs = [d.call for d in self.dependant.dependencies if isinstance(d.call, Needs)]
        public = any(d.call is _public for d in self.dependant.dependencies)
        if len(needs) != (0 if public else 1):
            raise TypeError(f"{path}: declare exactly one permission, or PUBLIC")
        self.needs = needs[0] if needs else None
        extra: dict[str, Any] = {}
        if needs:
            extra["security"] = [{"basic": []}, {"client_credentials": []}]
            extra["x-permission"] = needs[0].permission.value if needs[0].permission else "any client"
        self.openapi_extra = {**extra, **(self.openapi_extra or {})}
        self._takes_json = self.body_field is not None and not isinstance(self.body_field.field_info, params.Form)
        self._parameters = {field.alias for field in self.dependant.query_params}
        for dependency in self.dependant.dependencies:
            self._parameters |= {field.alias for field in dependency.query_params}

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.scope["query_string"]:
                unknown = [name for name in request.query_params if name not in self._parameters]
                if unknown:
                    takes = ", ".join(sorted(self._parameters)) or "none"
                    message = f"Unknown parameter. This takes: {takes}."
                    raise RequestValidationError(
                        [{"type": "unknown", "loc": ("query", name[:64]), "msg": message} for name in unknown[:5]]
                    )
            if self._takes_json and not _is_json(request):
                raise WrongMediaType
            return await handle(request)

        return strict
