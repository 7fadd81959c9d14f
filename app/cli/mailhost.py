"""`cacert-mail mailhost`: the configuration of this host's programs, by hand. For root: see `app/workers/host/mailhost.py`."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import typer
from sqlalchemy.exc import DBAPIError

from app.config import WorkerSettings
from app.db import Database, utc_now
from app.mailconfig.hosts import HostFileError, load_host_file
from app.workers.host import mailhost
from app.workers.host.fs import HostError
from app.workers.host.mailhost import Wanted
from app.workers.host.rows import BadRow

R = TypeVar("R")


def render(out: Path) -> None:
    below = out.absolute()

    async def work(wanted: Wanted) -> int:
        files = wanted.files
        for path, file in files.items():
            mailhost.write_below(below, path, file)
        return len(files)

    typer.echo(f"{_with_wanted(work)} files are below {out}.")


def check() -> None:

    async def work(wanted: Wanted) -> tuple[list[mailhost.Difference], bool]:
        return mailhost.compare(wanted.files), mailhost.is_due(wanted)

    differences, due = _with_wanted(work)
    for difference in differences:
        typer.echo(f"{difference.path} {difference.words}")
    if due:
        typer.echo("The programs were not told of the last change yet: run `cacert-mail mailhost install`.")
    if differences or due:
        raise typer.Exit(1)
    typer.echo("Every file is as it should be.")


def install() -> None:

    async def work(wanted: Wanted) -> tuple[list[mailhost.Difference], list[str]]:
        changed = await mailhost.install(wanted, utc_now())
        return changed, await mailhost.reload(wanted) if changed or mailhost.is_due(wanted) else []

    changed, said = _with_wanted(work)
    for difference in changed:
        typer.echo(f"{difference.path} was written.")
    if not changed:
        typer.echo("Every file is as it should be.")
    for sentence in said:
        typer.echo(sentence, err=True)
    if said:
        typer.echo("Start what does not run, and run this again.", err=True)
        raise typer.Exit(1)


def _with_wanted(function: Callable[[Wanted], Awaitable[R]]) -> R:
    """Calls it with the configuration of this host. What is in the way ends the command, in one line."""
    settings = WorkerSettings()
    host_file = settings.host_file
    if host_file is None:
        raise _stop("HOST_FILE is not set: it names this host's own file, such as /etc/cacert-mail/host.toml.", 2)

    async def work() -> R:
        database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file, pool_size=2)
        try:
            wanted = await mailhost.read_wanted(database, settings.mail_host, load_host_file(host_file))
            return await function(wanted)
        finally:
            await database.close()

    try:
        return asyncio.run(work())
    except (HostError, HostFileError, BadRow) as error:
        raise _stop(str(error)) from None
    except (DBAPIError, OSError) as error:
        raise _stop(str(getattr(error, "orig", error))) from None


def _stop(message: str, code: int = 1) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(code)
