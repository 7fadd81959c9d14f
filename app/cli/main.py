"""The `cacert-mail` command. Each process is imported only when it is asked for, so that root never loads the web side."""

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from app.permissions import Permission, Role

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
take_over = typer.Typer(help="Take over what an old host has, through the API.", no_args_is_help=True)
cli.add_typer(take_over, name="import")
mail_host = typer.Typer(help="The configuration of Postfix, Dovecot and rspamd on this host.", no_args_is_help=True)
cli.add_typer(mail_host, name="mailhost")
dkim = typer.Typer(help="DKIM keys on this host.", no_args_is_help=True)
cli.add_typer(dkim, name="dkim")
audit = typer.Typer(help="The audit trail, and the chain over it.", no_args_is_help=True)
cli.add_typer(audit, name="audit")


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
    from app.log import log, set_up_logging
    from app.main import create_app

    settings = ApiSettings()
    set_up_logging(settings.log_format, settings.log_level)
    try:
        app = create_app(settings)
    except KeysUnusable as error:
        raise stop(str(error)) from None
    _stop_without_schema()
    config = uvicorn.Config(
        app,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        proxy_headers=False,  # `web/certificates.py` reads them: it has to know first whose connection it is
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    if ssl_keyfile and not ssl_certfile:
        raise stop("--ssl-keyfile goes with --ssl-certfile.", 2)
    try:
        config.load()
    except OSError as error:  # an SSLError is one too
        raise stop(f"The TLS certificate or its key cannot be used: {error}") from None
    listeners = listen(settings.listen_address, settings.port)
    # What is loaded by now lives as long as the process: the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    host = f"[{settings.listen_address}]" if ":" in settings.listen_address else settings.listen_address
    url = f"{'https' if config.is_ssl else 'http'}://{host}:{listeners[0].getsockname()[1]}"
    log.info("api_started", url=url, docs=f"{url}/docs")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(listeners)


def listen(address: str, port: int, setting: str = "PORT") -> list[socket.socket]:
    """A listening socket for each address that a name has; most have one. What is in the way ends the command."""
    made: list[socket.socket] = []
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM):
            listener = socket.socket(family, kind, protocol)
            made.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if (
                family == socket.AF_INET6
            ):  # else an IPv4 client of `::` is called ::ffff:…, which no list of proxies knows
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((where[0], port, *where[2:]))
            listener.listen(2048)
    except (OSError, OverflowError, UnicodeError) as error:
        for listener in made:
            listener.close()
        raise stop(_why_not(address, port, error, setting)) from None
    return made


def _why_not(address: str, port: int, error: Exception, setting: str) -> str:
    reason = getattr(error, "strerror", error)
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return f"Port {port} on {address} is taken: {reason}. {setting}= chooses another one."
        case errno.EACCES:
            return f"Port {port} on {address} is not for this user: {reason}. {setting}= chooses one above 1023."
    return f"This machine cannot listen on {address}, port {port}: {reason}. LISTEN_ADDRESS= and PORT= choose another place."


def _stop_without_schema() -> None:
    """Ends the command when the database answers without our schema. One that is away may come back, and is logged."""
    from sqlalchemy.exc import DBAPIError

    from app.db import Database, is_busy, is_lost, reason_of
    from app.errors import Unavailable
    from app.log import log
    from app.models.schema import check_schema

    async def check(database: Database) -> None:
        async with asyncio.timeout(3):
            await database.reading(check_schema)

    try:
        asyncio.run(_with_database(check))
    except Unavailable as error:
        raise stop(error.detail) from None
    except (DBAPIError, OSError) as error:
        if not (is_lost(error) or (isinstance(error, DBAPIError) and is_busy(error))):
            raise stop(_refused(error)) from None
        log.warning("database_away", kind=type(error).__name__, error=reason_of(error))


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
    """Mail to owners, retention times and pruning. Unprivileged, one for all hosts; its database user is `service`."""
    from app.config import ServiceSettings
    from app.credentials.tokens import KeysUnusable
    from app.log import set_up_logging
    from app.workers.service.loop import run_service

    settings = ServiceSettings()
    set_up_logging(settings.log_format, settings.log_level)
    _stop_without_schema()
    try:
        _work(run_service(settings))
    except KeysUnusable as error:
        raise stop(str(error)) from None


@cli.command()
def policy() -> None:
    """Answer Postfix and rspamd: who may send as whom, and to how many. Unprivileged; its database user is `policy`."""
    from app.config import PolicySettings
    from app.log import set_up_logging
    from app.workers.policy.loop import run_policy

    settings = PolicySettings()
    set_up_logging(settings.log_format, settings.log_level)
    _stop_without_schema()
    (questions,) = listen("127.0.0.1", settings.policy_port, "POLICY_PORT")
    (froms,) = listen("127.0.0.1", settings.from_port, "FROM_PORT")
    _work(run_policy(settings, questions, froms))


@cli.command()
def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what differs.")] = False,
    trust_homes: Annotated[
        bool,
        typer.Option(
            "--trust-homes",
            help="Believe that homes and archives of which the database knows nothing are those of the accounts whose uid "
            "or id they have: after `applied` was lost, never after the database was made anew.",
        ),
    ] = False,
) -> None:
    """Compare all accounts of this host with what is there, and repair. Exits 1 when something differs and stays so."""
    from app.config import WorkerSettings
    from app.log import set_up_logging
    from app.workers.host.loop import sweep_once

    settings = WorkerSettings()
    set_up_logging(settings.log_format, settings.log_level)
    report = _work(sweep_once(settings, dry_run=dry_run, trust_homes=trust_homes))
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
        raise stop(_refused(error)) from None
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
    """Make a signing key in KEY_DIRECTORY, and the request key and LINK_KEY_FILE if there are none. The newest key signs; all
    verify."""
    from app.config import ApiSettings
    from app.credentials.links import create_link_key
    from app.credentials.tokens import KeysUnusable, create_request_key, create_signing_key

    settings = ApiSettings()
    directory = settings.key_directory
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kid = create_signing_key(directory)
        create_request_key(directory)
        create_link_key(settings.link_key_file)
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
    except Exception:
        # A connection that failed has a thread on SQLite, which tells the loop that it ends, and complains if that is gone.
        await asyncio.sleep(0.05)
        raise
    finally:
        await database.close()


def _connected(function: Callable[[Any], Awaitable[Any]]) -> Any:
    """Runs it on the database of the settings. What the database or its driver says ends the command, in one line."""
    from sqlalchemy.exc import DBAPIError

    try:
        return asyncio.run(_with_database(function))
    except (DBAPIError, OSError) as error:
        raise stop(_refused(error)) from None


def _refused(error: Exception) -> str:
    return f"The database cannot be reached or refused: {getattr(error, 'orig', error)}"


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


@audit.command("verify")
def verify_audit(
    head: Annotated[
        str | None,
        typer.Option(help="A head that was kept elsewhere: SEQUENCE:HASH, or a file whose lines end with both."),
    ] = None,
) -> None:
    """Say in words what of the audit trail is not as it was written. Exits 1 when something is, 2 when it could not look."""
    from app.cli.audit import verify

    verify(head)


@audit.command("head")
def print_audit_head() -> None:
    """Print time, sequence and hash of the last link: a line for a file on another machine."""
    from app.cli.audit import print_head

    print_head()


# Texts and not enums: of an enum with many values typer breaks the names anywhere, and draws a box around an error.
_ROLES = ", ".join(role for role in Role if role is not Role.OWNER)
_PERMISSIONS = ", ".join(Permission)


@mail_host.command("render")
def render_mailhost(
    out: Annotated[Path, typer.Option(help="Below it: etc/postfix/main.cf and so on. Passwords are in them.")],
) -> None:
    """Write the whole configuration into a directory, to look at it."""
    from app.cli.mailhost import render

    render(out)


@mail_host.command("check")
def check_mailhost() -> None:
    """Say in words how the installed files differ from what they should be. Exits 1 when they do."""
    from app.cli.mailhost import check

    check()


@mail_host.command("install")
def install_mailhost() -> None:
    """Write what differs, once the programs' own checkers agree, keep what was there, and have the programs read it."""
    from app.cli.mailhost import install

    install()


@dkim.command("adopt")
def adopt_dkim_key(
    domain: Annotated[str, typer.Option(help="The domain that it signs.")],
    selector: Annotated[str, typer.Option(help="The selector under which the DNS has it, such as `mail`.")],
    key: Annotated[Path, typer.Option(help="The private key, in PEM. It is copied, and stays where it is.")],
    apply: Annotated[bool, typer.Option("--apply", help="Do it. Without: only say what would be done.")] = False,
) -> None:
    """Take over a DKIM key that signs already, so that no signature changes. Refused unless the DNS has exactly this key. Run
    it as root on the mail host."""
    import httpx

    from app.addresses import DomainName, Selector
    from app.cli.dkim import adopt
    from app.errors import BadAddress, CacertMailError
    from app.workers.host.fs import HostError

    try:
        where = DomainName(domain), Selector(selector)
    except BadAddress as error:
        raise stop(error.detail, 2) from None
    try:
        typer.echo(adopt(*where, key, apply=apply))
    except CacertMailError as error:
        raise stop(error.detail) from None
    except (HostError, OSError, httpx.HTTPError) as error:
        raise stop(str(error)) from None


@take_over.command("users")
def import_users(
    file: Annotated[
        Path, typer.Argument(help="A table with a line of column names, by tabs (`mariadb --batch`) or commas.")
    ],
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it. Without: only say, line by line, what would be done.")
    ] = False,
) -> None:
    """Make accounts of an old table. Homes that stand keep their place, uid and gid. Run it as root on the mail host."""
    from app.cli.imports import import_users as work

    _report(work, file, apply)


@take_over.command("aliases")
def import_aliases(
    file: Annotated[Path, typer.Argument(help="A hand-made alias file, such as /etc/aliases.")],
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it. Without: only say, line by line, what would be done.")
    ] = False,
) -> None:
    """Make aliases of a hand-made file, and take them out of it. Pipes, files and included lists stay. Run it as root."""
    from app.cli.imports import import_aliases as work

    _report(work, file, apply)


def _report(work: Callable[..., Any], file: Path, apply: bool) -> None:
    import httpx

    from app.errors import CacertMailError
    from app.workers.host.fs import HostError

    try:
        tally = work(file, apply=apply)
    except CacertMailError as error:
        raise stop(error.detail) from None
    except (HostError, OSError, UnicodeError, httpx.HTTPError) as error:
        raise stop(str(error)) from None
    did = "made" if apply else "would be made"
    typer.echo(f"{tally.done} {did}, {tally.there} are there already, {tally.refused} refused.")
    if not apply:
        typer.echo("Nothing was changed: this was a dry run. --apply does it.")
    raise typer.Exit(1 if tally.refused else 0)


@principal.command("create")
def create_principal(
    role: Annotated[str, typer.Option(help=f"One of: {_ROLES}. `primary` may do everything.")],
    name: Annotated[str, typer.Option(help="For people.")],
    permission: Annotated[
        list[str] | None, typer.Option(help=f"Only this one; may be given several times: {_PERMISSIONS}.")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="Only from this one, such as 192.0.2.0/24; may be given several times.")
    ] = None,
) -> None:
    """Make a client. Its id and secret are printed now and never again."""
    from app.config import networks
    from app.services.principals import create_principal as create

    try:
        wanted = Role(role)
        if wanted is Role.OWNER:
            raise ValueError("An owner is no client: POST /v1/users/{user}/owner-tokens makes a token for one")
        only = [Permission(each) for each in permission] if permission else None
    except ValueError as error:
        raise stop(f"{error}. Roles: {_ROLES}. Permissions: {_PERMISSIONS}.", 2) from None
    try:
        where = [str(each) for each in networks(",".join(network))] if network else None
    except ValueError as error:
        raise stop(f"--network {error}.", 2) from None
    client_id, secret = _change(partial(create, networks=where), name, wanted, only)
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
        where = f"  from {' '.join(row.networks)}" if row.networks else ""
        until = f"  until {row.expires_at:%Y-%m-%d %H:%M} UTC" if row.expires_at else ""
        typer.echo(f"{row.id}  {row.state}  {row.role}  {row.name}  ({only}){where}{until}")


@principal.command("disable")
def disable_principal(client_id: str) -> None:
    """End a client: its secret and its tokens are refused within two seconds."""
    from app.services.principals import disable_principal as disable

    _change(disable, client_id)
    typer.echo(f"{client_id} is disabled.")


@principal.command("rotate")
def rotate_secret(
    client_id: str,
    overlap_hours: Annotated[
        float, typer.Option(min=0, max=168, help="How long the present secret lives on; 0: it ends now.")
    ] = 24,
) -> None:
    """Give a client a new secret. The present one, and its tokens, go on while the client is moved."""
    from datetime import timedelta

    from app.services.principals import rotate_secret as rotate

    credentials = _change(partial(rotate, overlap=timedelta(hours=overlap_hours)), client_id)
    typer.echo(f"CLIENT_ID={credentials.id}\nCLIENT_SECRET={credentials.secret}")


@principal.command("reset-secret")
def reset_secret(client_id: str) -> None:
    """Give a client a new secret. All older ones and their tokens are refused within two seconds."""
    rotate_secret(client_id, 0)


if __name__ == "__main__":
    main()
