"""What the configuration of a mail host is made from.

SECURITY: loaded by the worker (root). `HostSettings` comes from the row `hosts.settings`, which the API wrote: numbers
and switches only, each within a range. `HostFile` comes from a file that root alone writes; its strings are checked all
the same, by what they may contain, because each ends in a configuration file where a newline or a `$` would speak.
"""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from app.addresses import DomainName

DATABASE = "cacertusers"
RECIPIENT_DELIMITER = "+"
"""Fixed: `app.addresses.LocalPart` refuses it, so an address with an extension is never an account of its own."""

_HOST_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?\Z")
_PATH = re.compile(r"(?:/[A-Za-z0-9_@+-][A-Za-z0-9._@+-]*)+\Z")
_SECRET = re.compile(r"[A-Za-z0-9!&()*+,./:;<=>?@\[\]^_{|}~-]{1,128}\Z")


def _host_name(text: str) -> str:
    if not _HOST_NAME.match(text):
        raise ValueError("takes 1 to 64 of a-z, 0-9, inner dots and hyphens")
    return text


def _path(path: Path) -> Path:
    if not _PATH.match(str(path)):
        raise ValueError("must be an absolute path of A-Z, a-z, 0-9 and . _ @ + -, no part of it starting with a dot")
    return path


def _secret(secret: SecretStr) -> SecretStr:
    if not _SECRET.match(secret.get_secret_value()):
        raise ValueError("takes 1 to 128 printable ASCII characters, but no blank and none of \" ' ` \\ $ % #")
    return secret


Port = Annotated[int, Field(ge=1, le=65535)]
HostName = Annotated[str, AfterValidator(_host_name)]
HostPath = Annotated[Path, AfterValidator(_path)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Uid = Annotated[int, Field(ge=1000, lt=2**31)]


class HostSettings(BaseModel):
    """What varies by host, and is no secret, no path and no trusted network. Every field has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    smtp_port: Port = 25
    imap_port: Port = 143
    """With STARTTLS, which a client must use before it signs in."""
    imaps_port: Port = 993
    pop3_enabled: bool = True
    pop3s_port: Port = 995
    lmtp_port: Port = 24
    """On 127.0.0.1 only: Postfix hands mail over to Dovecot there."""
    quota_port: Port = 12340
    """On 127.0.0.1 only: Postfix asks Dovecot there whether a mailbox is full."""
    message_size_limit: Annotated[int, Field(ge=65_536, le=2**30)] = 50 * 2**20
    """Octets in a message as sent. RFC 5321, section 4.5.3.1.7, wants 64 KiB at least."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [value for name, value in self if name.endswith("_port")]
        if len(set(ports)) < len(ports):
            raise ValueError("two of the ports are the same")
        return self


class HostFile(BaseModel):
    """What never leaves the host's own file: secrets, paths, trusted networks. The defaults are Debian's."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    host: HostName
    """The host's name in the database, `hosts.name`."""
    hostname: DomainName
    """How it names itself to other mail servers; its PTR record should say the same."""
    listen: tuple[IPv4Address | IPv6Address, ...] = ()
    """Where Postfix and Dovecot listen; empty for all interfaces."""
    trusted_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Whoever connects from there may send anything anywhere. Empty for nobody, not even this host."""
    relay_host: DomainName | IPv4Address | None = None
    """All outgoing mail goes there; none for each domain's own MX."""
    relay_port: Port = 25
    dns: bool = True
    """False: never ask the DNS; only `/etc/hosts` and literal addresses are known."""

    tls_certificate: HostPath
    """PEM, the chain included."""
    tls_key: HostPath

    database_socket: HostPath = Path("/run/mysqld/mysqld.sock")
    database_host: DomainName | IPv4Address | None = None
    """Set: by TCP instead of by the socket."""
    database_port: Port = 3306
    postfix_password: Secret
    dovecot_password: Secret
    """Of the database users `postfix` and `dovecot`."""

    homes: HostPath = Path("/home")
    uid_first: Uid = 200_000
    uid_last: Uid = 499_999
    """Dovecot serves no mailbox whose uid or gid lies outside. The defaults keep clear of Debian's own ranges."""

    mail_log: HostPath | None = None
    dovecot_log: HostPath | None = None
    """None: syslog."""
    postfix_config_dir: HostPath = Path("/etc/postfix")
    postfix_queue_dir: HostPath = Path("/var/spool/postfix")
    postfix_data_dir: HostPath = Path("/var/lib/postfix")
    dovecot_config_dir: HostPath = Path("/etc/dovecot")
    dovecot_base_dir: HostPath = Path("/run/dovecot")
    dovecot_state_dir: HostPath = Path("/var/lib/dovecot")

    @model_validator(mode="after")
    def _uids_ascend(self) -> Self:
        if self.uid_last < self.uid_first:
            raise ValueError("uid_last is below uid_first")
        return self
