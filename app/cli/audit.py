"""`cacert-mail audit`: whether the audit trail is as it was written. It reads, and writes nothing."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import typer
from sqlalchemy.exc import DBAPIError

from app.config import Settings
from app.db import Database, utc_now
from app.services.audit_chain import FIRST, Head, head_line, parse_head, read_head, verify_chain

R = TypeVar("R")
FOUND, COULD_NOT_LOOK = 1, 2
_SHOWN = 50


def verify(head: str | None) -> None:
    found = 0

    def report(text: str) -> None:
        nonlocal found
        found += 1
        if found <= _SHOWN:
            typer.echo(text)

    async def work(database: Database) -> tuple[Head, int]:
        heads = [] if head is None else read_heads(head)
        async with database.read.connect() as connection:
            return await verify_chain(connection, heads, utc_now(), report)

    present, waiting = _on_the_database(work)
    if found > _SHOWN:
        typer.echo(f"and {found - _SHOWN} more")
    typer.echo(f"{present.sequence} links; {waiting} events wait for theirs. The head is {present}")
    if found:
        typer.echo(f"The audit trail is not as it was written: {found} findings.", err=True)
        raise typer.Exit(FOUND)
    typer.echo("The audit trail is as it was written.")
    if head is None:
        typer.echo("Whether its end was cut off shows only with --head, and a head that was kept elsewhere.")


def print_head() -> None:
    head = _on_the_database(lambda database: database.reading(read_head))
    if head == FIRST:
        typer.echo("There is no link yet: the service process makes them.", err=True)
        raise typer.Exit(FOUND)
    typer.echo(head_line(head, utc_now()))


def read_heads(text: str) -> Iterator[Head]:
    """One, or those of a file, line by line. Ends the command at what is none."""
    number = 0
    try:
        if ":" in text and not Path(text).exists():
            yield parse_head(text)
            return
        with Path(text).open(encoding="ascii") as file:
            for number, line in enumerate(file, 1):  # noqa: B007  the message names it
                yield parse_head(line)
    except (ValueError, OSError) as error:
        typer.echo(f"--head: {text}{f', line {number}' if number else ''}: {error}", err=True)
        raise typer.Exit(COULD_NOT_LOOK) from None


def _on_the_database(function: Callable[[Database], Awaitable[R]]) -> R:
    async def work() -> R:
        settings = Settings()
        database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file)
        try:
            return await function(database)
        finally:
            await asyncio.sleep(0.05)  # a connection that failed has a thread on SQLite, which outlives it by a moment
            await database.close()

    try:
        return asyncio.run(work())
    except (DBAPIError, OSError) as error:
        typer.echo(f"The database cannot be reached or refused: {getattr(error, 'orig', error)}", err=True)
    raise typer.Exit(COULD_NOT_LOOK)
