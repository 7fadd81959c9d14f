"""Settings, one class per process, read from the environment when the process starts; nothing is read at import.

SECURITY: loaded by the worker (root). Reads the environment only: no `.env` file of the current directory.
"""

import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or not str(path).isprintable():
        raise ValueError("must be an absolute path")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]

_MAILBOX = r"^([a-z0-9._-]{1,20}@[a-z0-9-]+(\.[a-z0-9-]+)+)?$"


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


class DnsSettings(Settings):
    """Of whoever asks the DNS."""

    dns_resolvers: str = ""
    """Addresses, comma-separated, of recursive name servers. Empty: those of /etc/resolv.conf."""
    dns_port: Annotated[int, Field(ge=1, le=65535)] = 53
    """Of those, and of the name servers of each zone."""
    dns_seconds: Annotated[float, Field(gt=0, le=30)] = 3
    """How long one name server may take."""
    dkim_retention_days: Annotated[float, Field(ge=0, le=365)] = 7
    """How long a key that signs no more stays in the DNS, and then once more without its key. Mail is under way for five days
    at most."""

    @field_validator("dns_resolvers")
    @classmethod
    def are_addresses(cls, text: str) -> str:
        try:
            for part in filter(None, map(str.strip, text.split(","))):
                ip_address(part)
        except ValueError:
            raise ValueError("takes addresses such as 192.0.2.53, comma between") from None
        return text

    @property
    def resolvers(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, self.dns_resolvers.split(","))))


class LinkSettings(DnsSettings):
    """Of the links that set a password. API and service process must have the same."""

    link_key_file: Path = Path("var/keys/link.key")
    """The key that they are made with, by `cacert-mail keys create`. Both processes read it, by a group of theirs."""
    public_url: Annotated[str, Field(min_length=1)] = "http://127.0.0.1:8825"
    """Where owners reach the API: the base of each link. Never the `Host` that a request names."""
    reset_page: str = ""
    """Another page for links than `{public_url}/reset`: a website's own, which calls `POST /v1/password-resets/confirm`."""

    @field_validator("public_url", "reset_page")
    @classmethod
    def can_begin_a_link(cls, url: str) -> str:
        if url and not re.fullmatch(r"https?://[!-~]+", url):
            raise ValueError("starts with https:// or http://")
        if re.search('[?#<>"]', url):
            raise ValueError("has a query or a fragment, which is where the token goes")
        return url.rstrip("/")

    def link(self, token: str) -> str:
        """In the fragment: no server and no proxy on the way logs it."""
        return f"{self.reset_page or f'{self.public_url}/reset'}#{token}"


class ApiSettings(LinkSettings):
    listen_address: str = "127.0.0.1"
    port: int = 8825
    key_directory: Path = Path("var/keys")
    """Signing keys and the request key, made by `cacert-mail keys create`."""
    issuer: str = "http://127.0.0.1:8825"
    """`iss` and `aud` of our tokens: the address under which clients know this service."""
    password_min_length: Annotated[int, Field(ge=12, le=64)] = 15
    retention_days: Annotated[int, Field(ge=0, le=3650)] = 30
    """How long a deleted account can be restored."""
    reset_minutes: Annotated[int, Field(ge=5, le=1440)] = 30
    """How long a link that resets a password is good."""
    invitation_days: Annotated[int, Field(ge=1, le=30)] = 7
    """How long the link of an invitation is good."""
    app_passwords_max: Annotated[int, Field(ge=0, le=100)] = 20
    """How many app passwords an account may have at once."""
    trusted_proxies: str = ""
    """Addresses or networks, comma-separated, of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto count."""
    certificate_proxies: str = ""
    """Networks, comma-separated, of proxies that hand on the client certificate of their TLS connection. From anywhere else
    its header is refused."""
    certificate_header: Annotated[str, Field(pattern="^[A-Za-z0-9-]{1,64}$")] = "Client-Cert"
    """Where they put it: as RFC 9440 has it, or in PEM with percent signs, as nginx does. They must overwrite what they got."""
    shared_sources: str = ""
    """Networks, comma-separated, from which many people sign in: webmail, website, gateways. Never refused as a network."""
    failure_window_minutes: Annotated[int, Field(ge=1, le=1440)] = 60
    """How long a wrong password counts."""
    guesses_per_pair: Annotated[int, Field(ge=3, le=1000)] = 10
    """So many different wrong passwords for one login from one network are refused."""
    guesses_per_network: Annotated[int, Field(ge=3, le=100_000)] = 40
    """From one network, for all logins together."""
    guesses_per_login: Annotated[int, Field(ge=3, le=100_000)] = 100
    """For one login, from all networks together from which it did not sign in of late."""
    resets_per_account: Annotated[int, Field(ge=1, le=1000)] = 5
    """Reset requests for one account."""
    tarpit_seconds: Annotated[int, Field(ge=0, le=60)] = 15
    """How long Dovecot is made to wait with a login at most, before it is refused."""
    auth_policy_key_file: Path | None = None
    """What Dovecot shows to ask about logins, `auth_policy_key` of the hosts' files. None: it is not answered."""
    auth_policy_networks: str = "127.0.0.0/8, ::1/128"
    """Networks, comma-separated, of the mail hosts, from which Dovecot may ask."""

    @field_validator("shared_sources", "auth_policy_networks", "certificate_proxies", "trusted_proxies")
    @classmethod
    def are_networks(cls, text: str) -> str:
        networks(text)
        return text

    @property
    def shared_networks(self) -> "Networks":
        return networks(self.shared_sources)

    @property
    def policy_networks(self) -> "Networks":
        return networks(self.auth_policy_networks)

    database_pool: Annotated[int, Field(ge=1, le=500)] = 20


Networks = tuple[IPv4Network | IPv6Network, ...]


def networks(text: str) -> Networks:
    """Comma between. Raises ValueError, without the text."""
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError("takes networks such as 192.0.2.0/24 or 2001:db8::/32, comma between") from None


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


class ServiceSettings(LinkSettings):
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 1
    keep_jobs_days: Annotated[int, Field(ge=1)] = 30
    keep_notices_days: Annotated[int, Field(ge=1)] = 30
    """How long mail to owners, and the links in it, can be looked at."""
    smtp_host: str = "127.0.0.1"
    smtp_port: Annotated[int, Field(ge=1, le=65535)] = 10026
    """Where mail to owners is handed over: `service_port` of a mail host."""
    smtp_starttls: bool = False
    """Whoever reads a link on the way can use it: without TLS only to this machine."""
    smtp_ca_file: Path | None = None
    """CA certificate that the mail server must show, if it is none that this machine trusts anyway."""
    mail_from: Annotated[str, Field(pattern=_MAILBOX)] = ""
    """What owners see as the sender: an address. Empty: `accounts@` of the primary domain."""
    return_path: Annotated[str, Field(pattern=_MAILBOX)] = ""
    """Where bounces go. Empty: `returns@` of the primary domain, which no account can have."""
    returns_maildir: Path | None = None
    """Where those arrive: `returns_maildir` of the mail host. None: nobody reads them."""
    outbox: Path | None = None
    """Mail is written into this directory instead of being sent."""
    dns_file: Path | None = None
    """Publishers of DNS records, with their secrets (TOML). None: records are entered by hand."""
    dns_watch_seconds: Annotated[float, Field(gt=0, le=3600)] = 30
    """How often the name servers are asked whether a record that is awaited is there."""
    probe_servers: str = ""
    """`host=server:port`, comma between: where the service process hands a probe over so that that host signs it. Hosts that
    are not named get theirs at SMTP_HOST."""
    audit_head_file: Path | None = None
    """The head of the audit trail's chain is appended to it, once a minute, when it changed: best on another machine's disk."""
    audit_head_syslog: Annotated[str, Field(pattern=r"^(/.+|.+:[0-9]{1,5})$")] | None = None
    """And sent there: `/dev/log`, or `host:port` by UDP."""

    @field_validator("smtp_ca_file")
    @classmethod
    def ca_can_be_read(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError("is no file")
        return path

    @model_validator(mode="after")
    def tells_links_to_this_machine_alone(self) -> Self:
        if not self.smtp_starttls and self.smtp_host not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError("SMTP_HOST is another machine: that wants SMTP_STARTTLS=true")
        return self


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
