"""Engines, the clock, and what a database error means.

SECURITY: loaded by the worker (root). Opens connections to the one database named in the settings and to nothing else.

Each process has two engines. The writing one opens real transactions: READ COMMITTED on MariaDB, BEGIN IMMEDIATE on SQLite
(deferred, three processes lost 395 of 900 transactions). The reading one is in autocommit, which saves two round trips.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from asyncmy.errors import Error as DriverError
from pydantic_core import from_json
from sqlalchemy import CursorResult, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

Clock = Callable[[], datetime]
P = ParamSpec("P")
R = TypeVar("R")

LOCK_WAIT_SECONDS = 1
"""How long a statement waits for another's row on MariaDB. Transactions here are short, and retried whole."""

SQLITE_BUSY_SECONDS = 5
"""How long a transaction waits for the one writer that SQLite has."""

_RETRY = {1205, 1213, 1020}
"""MariaDB: lock wait timeout, deadlock (and Galera's certification conflict), record changed."""

_LOST = {
    1040,
    1053,
    1077,
    1079,
    1152,
    1158,
    1159,
    1160,
    1161,
    1184,
    1203,
    1226,
    1927,
    2002,
    2003,
    2006,
    2013,
    2014,
    2055,
}
"""MariaDB: too many connections, shutting down, aborted, killed, refused, gone."""


def utc_now() -> datetime:
    return datetime.now(UTC)


async def end_tasks(*tasks: "asyncio.Task[Any]") -> None:
    """Cancels them until each has ended. What they raised is nobody's concern any more.

    Once is not enough: of a thousand cancellations that meet a statement on its way to MariaDB about six get lost.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        # Seconds: whoever is giving a connection back is not to be cut off in that as well.
        _, left = await asyncio.wait(left, timeout=2)
    await asyncio.gather(*tasks, return_exceptions=True)


class Database:
    """The two engines of one process. Close it, or its threads outlive the loop."""

    def __init__(self, url: str, *, ca_file: Path | None = None, pool_size: int = 20) -> None:
        self.url = make_url(url)
        self.dialect = self.url.get_dialect().name
        if self.dialect == "sqlite":
            self.write = _sqlite(self.url, "BEGIN IMMEDIATE")
            self.read = _sqlite(self.url, None)
        elif self.dialect in ("mysql", "mariadb"):
            self.write = _mariadb(self.url, ca_file, pool_size, isolation_level="READ COMMITTED")
            self.read = _mariadb(
                self.url,
                ca_file,
                pool_size,
                isolation_level="AUTOCOMMIT",
                skip_autocommit_rollback=True,
            )
        else:
            raise ValueError(f"DATABASE_URL: {self.dialect} is not supported; use sqlite+aiosqlite or mysql+asyncmy")

    async def reading(
        self, function: Callable[Concatenate[AsyncConnection, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Calls a reading function, and once more if its connection turns out to be lost.

        After a restart of the server every connection in the pool is; the first to notice empties the pool.
        """
        try:
            async with self.read.connect() as connection:
                return await function(connection, *args, **kwargs)
        except DBAPIError as error:
            if not is_lost(error):
                raise
        async with self.read.connect() as connection:
            return await function(connection, *args, **kwargs)

    async def close(self) -> None:
        await self.read.dispose()
        await self.write.dispose()


def _mariadb(url: URL, ca_file: Path | None, pool_size: int, **options: Any) -> AsyncEngine:
    connect: dict[str, Any] = {
        "charset": "utf8mb4",
        "connect_timeout": 5,
        "init_command": (
            f"SET time_zone = '+00:00', innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS},"
            " sql_mode = 'TRADITIONAL,NO_ENGINE_SUBSTITUTION'"
        ),
    }
    if ca_file is not None:
        # asyncmy verifies the server only when it is given a CA.
        try:
            connect["ssl"] = ssl.create_default_context(cafile=str(ca_file))
        except OSError as error:  # it names no file
            raise OSError(f"DATABASE_CA_FILE: {ca_file}: {error.strerror}") from None
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=10,
        # Every transaction here ends with its own block, also when it is cancelled: no ROLLBACK after each COMMIT.
        pool_reset_on_return=None,
        connect_args=connect,
        hide_parameters=True,
        json_deserializer=from_json,
        **options,
    )


def _sqlite(url: URL, begin: str | None) -> AsyncEngine:
    options: dict[str, Any] = {} if begin else {"skip_autocommit_rollback": True, "isolation_level": "AUTOCOMMIT"}
    engine = create_async_engine(
        url, pool_size=5, max_overflow=5, connect_args={"timeout": SQLITE_BUSY_SECONDS}, hide_parameters=True, **options
    )

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # sqlite3 then begins nothing by itself; the listener below does
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    if begin:

        @event.listens_for(engine.sync_engine, "begin")
        def begin_immediate(connection: Any) -> None:
            connection.exec_driver_sql(begin)

    return engine


async def insert_by_driver(connection: AsyncConnection, statement: str, values: Sequence[Any]) -> None:
    """An INSERT past SQLAlchemy, on MariaDB only, for what each write does: its driver takes a quarter of the time.

    Values are texts, numbers, None and times without a zone; never dicts. Errors are those of SQLAlchemy.
    """
    sync = connection.sync_connection
    driver: Any = sync.connection.driver_connection if sync is not None else None
    try:
        await driver.query(driver.cursor().mogrify(statement, values))
    except Exception as error:
        raise DBAPIError.instance(statement, None, error, DriverError, hide_parameters=True) from error
    except BaseException:  # cancelled: the answer is still to come, and would be taken for that of the next statement
        await connection.invalidate()
        raise


def _mariadb_errno(error: DBAPIError) -> int | None:
    args = getattr(error.orig, "args", ())
    return args[0] if args and isinstance(args[0], int) else None


def _sqlite_name(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlite_errorname", "") or ""


def duplicate_of(error: IntegrityError) -> str | None:
    """The unique column that was hit (`users.external_id`), `primary` for a primary key on MariaDB, else None.

    The two databases name it differently: MariaDB the key (`uq_users_external_id`), SQLite the columns.
    """
    if _mariadb_errno(error) == 1062:
        key = str(error.orig.args[1]).rpartition(" for key ")[2].strip("'") if error.orig else ""
        return "primary" if key == "PRIMARY" else key.removeprefix("uq_")
    if _sqlite_name(error) in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"):
        columns = str(error.orig).rpartition(": ")[2].split(", ")
        return "_".join([columns[0].replace(".", "_"), *(column.partition(".")[2] for column in columns[1:])])
    return None


def inserted_id(result: CursorResult[Any]) -> int:
    """The number that an INSERT of one row gave to it."""
    key = result.inserted_primary_key
    if key is None:
        raise TypeError("not an INSERT of one row")
    return int(key[0])


def is_reference(error: IntegrityError) -> bool:
    """A foreign key was violated: the row points nowhere, or is pointed at."""
    return _mariadb_errno(error) in (1451, 1452) or _sqlite_name(error) == "SQLITE_CONSTRAINT_FOREIGNKEY"


def is_busy(error: DBAPIError) -> bool:
    """Another transaction was in the way; the whole of this one may be tried again."""
    return _mariadb_errno(error) in _RETRY or _sqlite_name(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def is_lock_timeout(error: DBAPIError) -> bool:
    """Somebody holds the row, for longer than we wait (MariaDB only: SQLite has no rows to lock)."""
    return _mariadb_errno(error) == 1205


def is_lost(error: BaseException) -> bool:
    """The database is away, or this connection to it is."""
    if isinstance(error, DBAPIError):
        lost = _mariadb_errno(error) in _LOST or _sqlite_name(error) == "SQLITE_CANTOPEN"
        return lost or error.connection_invalidated
    return isinstance(error, OSError | TimeoutError)


def reason_of(error: BaseException) -> str:
    """What the database or its driver said, for a log: why a connection is refused is worth reading."""
    return str(getattr(error, "orig", None) or error)[:300]
