"""The `cacert-mail` command. Each process is imported only when it is asked for, so that root never loads the web side."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

cli = typer.Typer(
    help="Provisions mail accounts on a Postfix and Dovecot host, and proves that each one works. "
    "Settings come from the environment; the README lists them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="The keys that sign access tokens.", no_args_is_help=True)
principal = typer.Typer(help="Who may call the API.", no_args_is_help=True)
db = typer.Typer(help="The database schema.", no_args_is_help=True)
cli.add_typer(db, name="db")
cli.add_typer(keys, name="keys")
cli.add_typer(principal, name="principal")


def main() -> None:
    """The entry point: a setting that is wrong is named in one line, without its value."""
    try:
        cli()
    except ValidationError as error:
        from app.config import explain

        typer.echo(explain(error), err=True)
        sys.exit(2)


def stop(message: str, code: int = 1) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(code)


@cli.command()
def api(
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve TLS with this certificate chain.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
) -> None:
    """Serve the HTTP API. Unprivileged; its database user is `api`."""
    import gc

    import uvicorn

    from app.config import ApiSettings
    from app.credentials.tokens import KeysUnusable
    from app.log import set_up_logging
    from app.main import create_app

    settings = ApiSettings()
    set_up_logging(settings.log_format, settings.log_level)
    try:
        app = create_app(settings)
    except KeysUnusable as error:
        raise stop(str(error)) from None
    # What is loaded by now lives as long as the process: the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    uvicorn.run(
        app,
        host=settings.listen_address,
        port=settings.port,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=5,
    )


@cli.command()
def worker() -> None:
    """Work on this mail host: homes, Postfix, Dovecot. Root; its database user is `worker`."""
    from app.config import WorkerSettings
    from app.log import set_up_logging
    from app.workers.host.loop import run_worker

    settings = WorkerSettings()
    set_up_logging(settings.log_format, settings.log_level)
    _work(run_worker(settings))


@cli.command()
def service() -> None:
    """Retention times and pruning. Unprivileged, one for all hosts; its database user is `service`."""
    from app.config import ServiceSettings
    from app.log import set_up_logging
    from app.workers.service.loop import run_service

    settings = ServiceSettings()
    set_up_logging(settings.log_format, settings.log_level)
    _work(run_service(settings))


@cli.command()
def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what differs.")] = False,
) -> None:
    """Compare all accounts of this host with what is there, and repair. Exits 1 when something differs and stays so."""
    from app.config import WorkerSettings
    from app.log import set_up_logging
    from app.workers.host.loop import sweep_once

    settings = WorkerSettings()
    set_up_logging(settings.log_format, settings.log_level)
    report = _work(sweep_once(settings, dry_run=dry_run))
    for line in report.lines:
        typer.echo(line)
    typer.echo(report.summary)
    raise typer.Exit(1 if report.left else 0)


def _work(work: Any) -> Any:
    from sqlalchemy.exc import DBAPIError

    from app.errors import CacertMailError

    try:
        return asyncio.run(work)
    except CacertMailError as error:
        raise stop(error.detail) from None
    except DBAPIError as error:
        raise stop(f"The database cannot be reached or refused: {error.orig}") from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@cli.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    import json

    from app.main import build_app

    typer.echo(json.dumps(build_app().openapi(), indent=1, ensure_ascii=False))


@cli.command()
def run() -> None:
    """Try it out: API, worker and service on this machine, without root, on SQLite unless DATABASE_URL says otherwise."""
    from app.cli.run import run_all

    raise typer.Exit(run_all())


@db.command()
def upgrade() -> None:
    """Make or update the tables and views in DATABASE_URL. Needs a database user with DDL rights."""
    from app.cli.db import NotOurs, upgrade_database

    try:
        before, after = _connected(upgrade_database)
    except NotOurs as error:
        raise stop(str(error)) from None
    typer.echo(
        f"The schema is at {after}." if before == after else f"The schema went from {before or 'nothing'} to {after}."
    )


@keys.command("create")
def create_keys() -> None:
    """Make a signing key in KEY_DIRECTORY, and the request key if there is none. The newest key signs; all verify."""
    from app.config import ApiSettings
    from app.credentials.tokens import KeysUnusable, create_request_key, create_signing_key

    directory = ApiSettings().key_directory
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kid = create_signing_key(directory)
        create_request_key(directory)
    except (KeysUnusable, OSError) as error:
        raise stop(str(error)) from None
    typer.echo(f"Made {directory}/{kid}.pem. Restart the API processes to sign with it.")


async def _with_database(function: Callable[[Any], Awaitable[Any]]) -> Any:
    from app.config import Settings
    from app.db import Database

    settings = Settings()
    database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file)
    try:
        return await function(database)
    finally:
        await database.close()


def _connected(function: Callable[[Any], Awaitable[Any]]) -> Any:
    """Runs it on the database of the settings. What the database or its driver says ends the command, in one line."""
    from sqlalchemy.exc import DBAPIError

    try:
        return asyncio.run(_with_database(function))
    except (DBAPIError, OSError) as error:
        raise stop(f"The database cannot be reached or refused: {getattr(error, 'orig', error)}") from None


def _change(function: Any, *args: Any) -> Any:
    """Runs a service function in a transaction, in the name of this command."""
    import getpass
    import secrets

    from app.db import Database, utc_now
    from app.errors import CacertMailError
    from app.services.changes import Actor, Change

    async def work(database: Database) -> Any:
        actor = Actor("cacert-mail", "", f"cli-{getpass.getuser()[:40]}-{secrets.token_hex(4)}")
        async with database.write.begin() as connection:
            return await function(Change(connection, actor, utc_now()), *args)

    try:
        return _connected(work)
    except CacertMailError as error:
        raise stop(error.detail) from None


@principal.command("create")
def create_principal(
    role: Annotated[str, typer.Option(help="What it is; `primary` may do everything.")],
    name: Annotated[str, typer.Option(help="For people.")],
    permission: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
) -> None:
    """Make a client. Its id and secret are printed now and never again."""
    from app.permissions import ROLE_PERMISSIONS, Permission, Role
    from app.services.principals import create_principal as create

    try:
        wanted = Role(role)
        only = [Permission(each) for each in permission] if permission else None
    except ValueError as error:
        every = ", ".join(sorted(each.value for each in ROLE_PERMISSIONS[Role.PRIMARY]))
        raise stop(f"{error}. Roles: {', '.join(Role)}. Permissions: {every}.", 2) from None
    client_id, secret = _change(create, name, wanted, only)
    typer.echo(f"CLIENT_ID={client_id}\nCLIENT_SECRET={secret}")


@principal.command("list")
def list_principals() -> None:
    """Show all clients."""
    from app.services.principals import list_principals as read

    async def work(database: Any) -> Any:
        async with database.read.connect() as connection:
            return await read(connection)

    for row in _connected(work):
        only = "all of its role" if row.permissions is None else " ".join(row.permissions)
        typer.echo(f"{row.id}  {row.state}  {row.role}  {row.name}  ({only})")


@principal.command("disable")
def disable_principal(client_id: str) -> None:
    """End a client: its secret and its tokens are refused within two seconds."""
    from app.services.principals import disable_principal as disable

    _change(disable, client_id)
    typer.echo(f"{client_id} is disabled.")


@principal.command("reset-secret")
def reset_secret(client_id: str) -> None:
    """Give a client a new secret. The old one and its tokens are refused within two seconds."""
    from app.services.principals import reset_principal_secret as reset

    typer.echo(f"CLIENT_ID={client_id}\nCLIENT_SECRET={_change(reset, client_id)}")


if __name__ == "__main__":
    main()
