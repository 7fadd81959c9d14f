"""Refused requests in the audit trail: each in a transaction of its own, once its answer is on the way.

Recorded are refused changes (status 4xx, any method but GET) and refused reads (403) of callers whom we know. Neither body,
query nor credentials are. What the trail cannot take, because the database is away or slow, is in the log alone.

So that nobody can fill the table, each process records in a minute at most NETWORK_LIMIT refusals of callers whom it does
not know from one network (IPv4 /32, IPv6 /64), ANONYMOUS_LIMIT of all such callers, and PRINCIPAL_LIMIT of one principal. The
others are counted: one event with the action `requests.refuse` says how many there were.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.types import Scope

from app.db import Clock, Database, end_tasks, is_busy, reason_of
from app.log import log
from app.permissions import Principal
from app.services.audit_events import Refusal, record_refusal
from app.services.login_failures import network_of

WINDOW = timedelta(minutes=1)
NETWORK_LIMIT = 10
ANONYMOUS_LIMIT = 100
PRINCIPAL_LIMIT = 600
_AT_ONCE = 20
"""Refusals that wait for the database; more are counted."""
_SECONDS = 5
"""How long one may take."""
_TRIES = 3
_SLUGS = {401: "unauthenticated", 403: "forbidden", 404: "not-found", 429: "too-many-tries"}
"""Of answers that are no problems of ours: the token endpoint's (RFC 6749)."""
FORGED = "forged-certificate"
_EVERYBODY = ("network", "*")

ACTIONS = {
    "add_certificate": "principals.add-certificate",
    "auth_policy": "logins.check",
    "change_password": "users.set-password",
    "confirm_password_reset": "users.reset-password",
    "create_token": "tokens.create",
    "revoke_key": "principals.end-key",
    "set_password": "users.set-password",
}
"""Of operations whose accepted changes are called otherwise than path and name say."""


def action_of(path: str, name: str) -> str:
    """What the trail calls an operation, accepted or not: `restore_user` at `/v1/users/{user}/restore` is `users.restore`."""
    return ACTIONS.get(name) or f"{_noun(path, name)}.{_verb(name)}"


def _verb(name: str) -> str:
    return name.partition("_")[0]


def _noun(path: str, name: str) -> str:
    """The last part of the path that is neither a parameter nor the verb."""
    parts = [part for part in path.removeprefix("/v1").split("/") if part and not part.startswith("{")]
    return parts[-2] if len(parts) > 1 and parts[-1] == _verb(name) else parts[-1]


def _kind(noun: str) -> str:
    """Of a subject that has no id yet: the noun in the singular."""
    return (noun[:-2] if noun.endswith("ses") else noun.removesuffix("s"))[:16]


@dataclass(slots=True)
class _Window:
    began_at: datetime
    recorded: int = 0
    unrecorded: int = 0


class Refusals:
    """One for each process, in `app.state.refusals`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._windows: dict[tuple[str, str], _Window] = {}
        self._writing = 0
        self._flusher: asyncio.Task[None] | None = None

    async def record(self, scope: Scope, status: int) -> None:
        """Called after the answer. Never raises: the log says what could not be recorded."""
        principal: Principal | None = scope.get("principal")
        if not _is_worth_it(scope, status, principal):
            return
        refusal = _refusal(scope, status, principal, self._clock())
        summaries = self._ended(refusal.at)
        admitted = self._admit(refusal, known=principal is not None)
        await self._write(*summaries, *([refusal] if admitted else []))

    async def flush(self) -> None:
        """Writes how many were not recorded, of the minutes that have ended."""
        await self._write(*self._ended(self._clock()))

    async def close(self) -> None:
        if self._flusher is not None:
            await end_tasks(self._flusher)
        await self._write(*self._ended(datetime.max.replace(tzinfo=UTC)))

    def _admit(self, refusal: Refusal, *, known: bool) -> bool:
        if known:
            limits = {("principal", refusal.principal_id): PRINCIPAL_LIMIT}
        else:
            limits = {_EVERYBODY: ANONYMOUS_LIMIT, ("network", network_of(refusal.client_address)): NETWORK_LIMIT}
        windows = []
        for key, limit in limits.items():
            window = self._windows.setdefault(key, _Window(refusal.at))
            if window.recorded >= limit or self._writing >= _AT_ONCE:
                window.unrecorded += 1
                if self._flusher is None or self._flusher.done():
                    self._flusher = asyncio.create_task(self._flush_later())
                return False
            windows.append(window)
        for window in windows:
            window.recorded += 1
        return True

    def _ended(self, now: datetime) -> list[Refusal]:
        """Takes away the windows that have ended, and says what they did not record."""
        ended = {key: window for key, window in self._windows.items() if now - window.began_at >= WINDOW}
        for key in ended:
            del self._windows[key]
        return [_summary(key, window) for key, window in ended.items() if window.unrecorded]

    async def _flush_later(self) -> None:
        """So that the count of a flood is written although nothing comes after it."""
        while any(window.unrecorded for window in self._windows.values()):
            await asyncio.sleep(WINDOW.total_seconds())
            await self.flush()

    async def _write(self, *refusals: Refusal) -> None:
        if not refusals:
            return
        self._writing += 1
        try:
            async with asyncio.timeout(_SECONDS):
                await self._commit(refusals)
        except (DBAPIError, PoolTimeout, OSError) as error:  # a TimeoutError is an OSError too
            log.warning("refusal_not_recorded", count=len(refusals), kind=type(error).__name__, error=reason_of(error))
        except Exception as error:  # the answer was right, whatever is wrong here
            log.error("refusal_not_recorded", count=len(refusals), exc_info=error)
        finally:
            self._writing -= 1

    async def _commit(self, refusals: Sequence[Refusal]) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                async with self._database.write.begin() as connection:
                    for refusal in refusals:
                        await record_refusal(connection, refusal)
                return
            except DBAPIError as error:
                if attempt == _TRIES or not is_busy(error):
                    raise
                await asyncio.sleep(0.02 * attempt)


def _is_worth_it(scope: Scope, status: int, principal: Principal | None) -> bool:
    if scope.get("problem") == FORGED:
        return True
    if (
        "route" not in scope or status == HTTPStatus.METHOD_NOT_ALLOWED
    ):  # no change of ours: somebody knocks at pages that other software has
        return False
    if scope["method"] in ("GET", "HEAD"):
        return status == HTTPStatus.FORBIDDEN and principal is not None
    return 400 <= status < 500


def _refusal(scope: Scope, status: int, principal: Principal | None, now: datetime) -> Refusal:
    route = scope.get("route")
    claimed = scope.get("claimed") if principal is None else None
    action, kind, subject = "certificates.show", "principal", ""  # a header that is looked at before the path is
    if isinstance(route, APIRoute):
        action = action_of(route.path_format, route.name)
        kind, subject = next(iter(scope["path_params"].items()), (_kind(action.partition(".")[0]), ""))
    if action == "tokens.create":
        kind, subject = "principal", claimed or ""
    return Refusal(
        at=now,
        principal_id=principal.id if principal else "",
        key_id=principal.key_id if principal else None,
        client_address=client_address(scope),
        request_id=scope["request_id"],
        action=action,
        subject_kind=kind,
        subject=str(subject).encode("ascii", "backslashreplace").decode()[:254],
        user_id=principal.user_id if principal else None,
        problem=scope.get("problem") or _SLUGS.get(status, "bad-request"),
        after={"client": claimed} if claimed else None,
    )


def _summary(key: tuple[str, str], window: _Window) -> Refusal:
    kind, name = key
    return Refusal(
        at=window.began_at,
        principal_id=name if kind == "principal" else "",
        key_id=None,
        client_address="",
        request_id="",
        action="requests.refuse",
        subject_kind=kind,
        subject=name,
        user_id=None,
        problem=None,
        after={"unrecorded": window.unrecorded, "seconds": int(WINDOW.total_seconds())},
    )


def client_address(scope: Scope) -> str:
    """Empty for a local socket."""
    return str(scope["client"][0])[:45] if scope.get("client") else ""
