"""Settings, one class per process, read from the environment when the process starts; nothing is read at import.

SECURITY: loaded by the worker (root). Reads the environment only: no `.env` file of the current directory.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or not str(path).isprintable():
        raise ValueError("must be an absolute path")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Settings(BaseSettings):
    """What every process needs."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    database_url: SecretStr = SecretStr("sqlite+aiosqlite:///var/cacert-mail.db")
    """`sqlite+aiosqlite:///FILE` or `mysql+asyncmy://user:password@host/cacertusers`. Each process has a user of its own."""

    @field_validator("database_url")
    @classmethod
    def has_a_driver_of_ours(cls, url: SecretStr) -> SecretStr:
        text = url.get_secret_value()
        if not text.startswith(("sqlite+aiosqlite:///", "mysql+asyncmy://", "mariadb+asyncmy://")):
            raise ValueError("starts with sqlite+aiosqlite:/// or mysql+asyncmy://")
        if not text.isascii():
            raise ValueError("has a character outside ASCII: write it as %XX")
        return url

    database_ca_file: Path | None = None
    """CA certificate that the database server must show. Without it a connection over TCP is not verified."""

    @field_validator("database_ca_file")
    @classmethod
    def can_be_read(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError("is no file")
        return path

    log_format: Annotated[str, Field(pattern="^(console|json)$")] = "console"
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    wake_directory: Path = Path("var/run")
    """Where the wake-up sockets lie. The poll behind them makes up for a missing one."""


class ApiSettings(Settings):
    listen_address: str = "127.0.0.1"
    port: int = 8825
    key_directory: Path = Path("var/keys")
    """Signing keys and the request key, made by `cacert-mail keys create`."""
    issuer: str = "http://127.0.0.1:8825"
    """`iss` and `aud` of our tokens: the address under which clients know this service."""
    password_min_length: Annotated[int, Field(ge=12, le=64)] = 15
    retention_days: Annotated[int, Field(ge=0, le=3650)] = 30
    """How long a deleted account can be restored."""
    trusted_proxies: str = ""
    """Addresses, comma-separated, of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto count."""
    database_pool: Annotated[int, Field(ge=1, le=500)] = 20


class WorkerSettings(Settings):
    mail_host: str = "local"
    """The row of `hosts` that this machine is."""
    host_root: Path = Path("/")
    """Below it lies `home/`. Another directory than `/` is for trying things out without root."""
    uid_first: Annotated[int, Field(ge=1000)] = 200_000
    """A mailbox has the uid and gid `UID_FIRST + id`."""
    uid_last: Annotated[int, Field(le=2**31 - 1)] = 499_999
    lock_file: Path = Path("/run/cacert-mail/worker.lock")
    postfix_config: Path | None = None
    """Postfix's configuration directory. Unset: this host has no Postfix, and its proof reads `not configured`."""
    postfix_recipients: str = "proxy:mysql:/etc/postfix/recipients.cf"
    """The very map that Postfix asks."""
    postfix_local_aliases: str = "proxy:mysql:/etc/postfix/local-aliases.cf"
    postfix_virtual_aliases: str = "proxy:mysql:/etc/postfix/virtual-aliases.cf"
    """The very maps that Postfix asks for aliases that are not in the alias file."""
    aliases_directory: AbsolutePath = Path("/etc/cacert-mail/aliases")
    """Where the worker keeps `aliases` and `aliases.lmdb`. It makes the last part; nobody but root may write there."""
    hand_made_aliases: AbsolutePath | None = None
    """An alias file that people write and Postfix reads after ours; the worker only reads it. None: there is none."""
    dovecot_config: Path | None = None
    """Dovecot's configuration file. Unset: this host has no Dovecot, and its proof reads `not configured`."""
    adopted_homes: AbsolutePath = Path("/etc/cacert-mail/adopted-homes")
    """Old homes that keep their uid and gid: written by `cacert-mail import users`, by root."""
    host_file: AbsolutePath | None = None
    """This host's own file, TOML, root's alone: secrets, paths, trusted networks. Unset: the worker configures no program."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 1
    sweep_minutes: Annotated[float, Field(gt=0)] = 10
    concurrency: Annotated[int, Field(ge=1, le=64)] = 8
    """Lanes that run side by side."""
    durable: bool = True
    """Whether homes are synced to disk. Off only for tests."""


class PolicySettings(Settings):
    policy_port: Annotated[int, Field(ge=1, le=65535)] = 10031
    """On 127.0.0.1: Postfix asks there about each recipient."""
    from_port: Annotated[int, Field(ge=1, le=65535)] = 10032
    """On 127.0.0.1: rspamd asks there who may write which From."""
    recipients_per_hour: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """For each login whose account says nothing else (`send_limit`). 0: nobody else may send."""


class ServiceSettings(Settings):
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 1
    keep_jobs_days: Annotated[int, Field(ge=1)] = 30


class ImportSettings(BaseSettings):
    """Of `cacert-mail import`, which is a client of the API."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    api_url: str = "http://127.0.0.1:8825"
    """Where the API is."""
    api_ca_file: Path | None = None
    """CA certificate that the API must show, if it is none that this machine trusts anyway."""
    client_id: str
    client_secret: SecretStr
    """Of a client that may read and write users and aliases, and read addresses, domains and jobs."""


def explain(error: ValidationError) -> str:
    """One line for each setting that is wrong, without its value, which may be a secret."""
    return "\n".join(f"{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors(include_input=False))
