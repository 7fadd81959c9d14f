"""What the policy process reads from the database, as a user that may read two views and nothing else."""

import asyncio
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Row, Select, bindparam, column, select, table
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.db import Database, is_lost
from app.errors import BadAddress, Unavailable
from app.log import log

PATIENCE_SECONDS = 3
"""For the database. rspamd waits five for us."""

_logins: Any = table(
    "policy_logins", *map(column, ("login", "send_limit", "access_ended_at", "ended_at", "flushed_at"))
)
_senders: Any = table("policy_senders", column("login"), column("address"))
_LOGINS = select(_logins).where(_logins.c.login.in_(bindparam("logins", expanding=True)))
_SENDERS = select(_senders.c.address).where(_senders.c.login == bindparam("login"))


class Login(NamedTuple):
    """An account that may sign in and send now."""

    send_limit: int | None
    """Recipients an hour; None: as the setting says."""
    access_ended_at: datetime | None = None
    """What signed in earlier must be gone; None: nobody ever asked for that."""
    ended_at: datetime | None = None
    """The last such moment that this host has carried out."""
    flushed_at: datetime | None = None
    """When it had: the clock of this host, after which no old password signs in."""


class Rows:
    """The two lookups. Both raise Unavailable when the database does not answer in time, or wrongly. Neither remembers: an
    account that was suspended, or whose access was ended, sends nothing more from that moment."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[str, asyncio.Future[Login | None]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._away = False

    async def login(self, name: str) -> Login | None:
        """None for whoever may not send, or is nobody. What is asked while one query runs goes into the next."""
        address = account(name)
        if address is None:
            return None
        answer = self._waiting.get(address)
        if answer is None:
            answer = self._waiting[address] = asyncio.get_running_loop().create_future()
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(answer)  # others may wait for the same one

    async def _ask(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, {}
                try:
                    rows = {row.login: row for row in await self._read(_LOGINS, logins=list(asked))}
                except Unavailable as error:
                    for answer in asked.values():
                        _refuse(answer, error)
                    continue
                for login, answer in asked.items():
                    try:
                        answer.set_result(_login(rows[login]) if login in rows else None)
                    except (TypeError, ValueError) as error:
                        log.error("row_refused", login=login, error=str(error))
                        _refuse(answer, Unavailable("The account's row has a time that is none."))
        finally:
            self._asking = None

    async def senders(self, name: str) -> list[str]:
        """The addresses that a login may send as, its own first; none for whoever may not send."""
        address = account(name)
        found = [] if address is None else [row.address for row in await self._read(_SENDERS, login=str(address))]
        return sorted(set(found), key=lambda each: (each != address, each))

    async def close(self) -> None:
        """The database may be closed then."""
        if self._asking is not None:
            await asyncio.wait([self._asking])

    async def _read(self, query: Select[Any], **values: Any) -> list[Row[Any]]:
        async def read(connection: AsyncConnection) -> list[Row[Any]]:
            return list((await connection.execute(query, values)).all())

        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                found = await self._database.reading(read)
        except Exception as error:  # whatever it is, the mail must wait, and the process go on
            if not self._away:
                log.warning("database_away", kind=type(error).__name__)
            if not is_lost(error):
                log.error("database_refused", exc_info=error)
            self._away = True
            raise Unavailable("The database is away or too busy.") from error
        if self._away:
            log.warning("database_back")
            self._away = False
        return found


def _refuse(answer: asyncio.Future[Any], error: Exception) -> None:
    answer.set_exception(error)
    answer.exception()  # Else it is reported when whoever asked has gone.


def _login(row: Row[Any]) -> Login:
    return Login(row.send_limit, _moment(row.access_ended_at), _moment(row.ended_at), _moment(row.flushed_at))


def _moment(value: Any) -> datetime | None:
    """MariaDB's driver gives a naive datetime for a column; what comes out of JSON, and SQLite's, is text."""
    if value is None:
        return None
    found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def account(login: str) -> MailAddress | None:
    """The account that a login is: only such a name is ever asked for. MariaDB refuses others in an ASCII column."""
    try:
        return MailAddress(login)
    except BadAddress:
        return None
