"""What the policy process reads from the database, as a user that may read two views and nothing else."""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import bindparam, column, select, table
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.db import Database, is_lost
from app.errors import BadAddress, Unavailable
from app.log import log

PATIENCE_SECONDS = 3
"""For the database. rspamd waits five for us."""
REMEMBER_SECONDS = 2
"""How long an account that has been suspended may go on."""
MAX_REMEMBERED = 10_000

_logins: Any = table("policy_logins", column("login"), column("send_limit"))
_senders: Any = table("policy_senders", column("login"), column("address"))
_LOGIN = select(_logins.c.send_limit).where(_logins.c.login == bindparam("login"))
_SENDERS = select(_senders.c.address).where(_senders.c.login == bindparam("login"))


class Login(NamedTuple):
    """An account that may sign in and send now."""

    send_limit: int | None
    """Recipients an hour; None: as the setting says."""


class Rows:
    """The two lookups. Both raise Unavailable when the database does not answer in time, or wrongly."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._remembered: dict[str, tuple[float, Login]] = {}
        self._away = False

    async def login(self, name: str) -> Login | None:
        """None for whoever may not send, or is nobody. Who may is remembered for `REMEMBER_SECONDS`."""
        address = account(name)
        if address is None:
            return None
        now = self._clock()
        known = self._remembered.get(name)
        if known is not None and now < known[0]:
            return known[1]
        found = await self._read(_LOGIN, address)
        if not found:
            return None
        login = Login(found[0])
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[name] = now + REMEMBER_SECONDS, login
        return login

    async def senders(self, name: str) -> list[str]:
        """The addresses that a login may send as, its own first; none for whoever may not send. Not remembered."""
        address = account(name)
        found = [] if address is None else await self._read(_SENDERS, address)
        return sorted(set(found), key=lambda each: (each != address, each))

    async def _read(self, query: Any, login: MailAddress) -> list[Any]:
        async def read(connection: AsyncConnection) -> list[Any]:
            return list((await connection.execute(query, {"login": str(login)})).scalars())

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


def account(login: str) -> MailAddress | None:
    """The account that a login is: only such a name is ever asked for. MariaDB refuses others in an ASCII column."""
    try:
        return MailAddress(login)
    except BadAddress:
        return None
