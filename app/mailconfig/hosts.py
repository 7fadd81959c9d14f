"""What the configuration of a mail host is made from.

SECURITY: loaded by the worker (root). `HostSettings` comes from the row `hosts.settings`, which the API wrote: numbers
and switches only, each within a range. `HostFile` comes from a file that root alone writes; its strings are checked all
the same, by what they may contain, because each ends in a configuration file where a newline or a `$` would speak.
"""

import os
import re
import stat
import tomllib
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from app.addresses import DomainName

DATABASE = "cacertusers"
RECIPIENT_DELIMITER = "+"
"""Fixed: `app.addresses.LocalPart` refuses it, so an address with an extension is never an account of its own."""

_HOST_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?\Z")
_PATH = re.compile(r"(?:/[A-Za-z0-9_@+-][A-Za-z0-9._@+-]*)+\Z")
_HTTP_URL = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::\d{1,5})?(?:/[A-Za-z0-9._-]+)*/?\Z")
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


def _http_url(text: str) -> str:
    if not _HTTP_URL.match(text):
        raise ValueError("takes http:// or https://, a name or address, a port if need be, and a plain path")
    return text


Port = Annotated[int, Field(ge=1, le=65535)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
HostName = Annotated[str, AfterValidator(_host_name)]
HostPath = Annotated[Path, AfterValidator(_path)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Uid = Annotated[int, Field(ge=1000, lt=2**31)]
SystemUid = Annotated[int, Field(ge=100, lt=2**31)]
"""At least what virtual(8) takes at least (virtual_minimum_uid)."""


class HostSettings(BaseModel):
    """What varies by host, and is no secret, no path and no trusted network. Every field has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    smtp_port: Port = 25
    submission_port: Port = 587
    """Where users send, with STARTTLS, which a client must use before it signs in."""
    submissions_port: Port = 465
    """The same with TLS from the first octet on (RFC 8314)."""
    imap_port: Port = 143
    """With STARTTLS, which a client must use before it signs in."""
    imaps_port: Port = 993
    pop3_enabled: bool = True
    pop3s_port: Port = 995
    lmtp_port: Port = 24
    """On 127.0.0.1 only: Postfix hands mail over to Dovecot there."""
    quota_port: Port = 12340
    """On 127.0.0.1 only: Postfix asks Dovecot there whether a mailbox is full."""
    policy_port: Port = 10031
    """On 127.0.0.1 only: Postfix asks the policy process there about each recipient of a user's message."""
    from_port: Port = 10032
    """On 127.0.0.1 only: rspamd asks the policy process there who may write which From."""
    service_port: Port = 10026
    """On 127.0.0.1 only, and where the file of this host has `returns_uid`: the service process sends mail to owners there."""
    srs: bool = False
    """Whether mail that comes in and may go on to another server gets an envelope sender of ours (SRS), with postsrsd. Else
    it keeps its own, for which the other server may refuse it (SPF, RFC 7208)."""
    srs_forward_port: Port = 10001
    srs_reverse_port: Port = 10002
    """On 127.0.0.1 only: Postfix asks postsrsd there."""
    auth_policy_reject_on_fail: bool = False
    """Whether Dovecot refuses all logins while the API that counts wrong passwords, or its database, is away."""
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
    """False: Postfix never asks the DNS; only `/etc/hosts` and literal addresses are known. Nor does rspamd, which then
    verifies nothing that comes in, unless `resolver` is set."""
    resolver: IPv4Address | None = None
    """The DNS server that rspamd asks; a caching one near by is best. None: those of /etc/resolv.conf."""
    resolver_port: Port = 53

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
    srs_secret: Secret | None = None
    """With which postsrsd signs; needed when `srs` is on. Who knows it can send anything anywhere through this host."""

    auth_policy_url: HttpUrl | None = None
    """Where Dovecot asks about each login: `…/dovecot/auth-policy` of the API. None: wrong passwords are not counted."""
    auth_policy_key: Secret | None = None
    """What it shows there: the line of the API's AUTH_POLICY_KEY_FILE."""

    homes: HostPath = Path("/home")
    uid_first: Uid = 200_000
    uid_last: Uid = 499_999
    """Dovecot serves no mailbox whose uid or gid lies outside. The defaults keep clear of Debian's own ranges."""

    aliases_dir: HostPath = Path("/etc/cacert-mail/aliases")
    """The worker's: `aliases` and `aliases.lmdb`."""
    hand_made_aliases: HostPath | None = None
    """An alias file that people write, such as /etc/aliases, read after ours; `newaliases` builds it. None: there is none."""
    returns_maildir: HostPath = Path("/var/lib/cacert-mail/returns")
    returns_uid: SystemUid | None = None
    """Bounces to `returns@` of the primary domain end in this Maildir, which belongs to this uid, and nobody else can read
    them. None: there is no such address."""

    adopted_homes: bool = False
    """Some mailboxes keep a uid from before, of 1000 or more: Dovecot serves those too."""

    mail_log: HostPath | None = None
    dovecot_log: HostPath | None = None
    """None: syslog."""
    rspamd_log: HostPath = Path("/var/log/rspamd/rspamd.log")
    state_dir: HostPath = Path("/var/lib/cacert-mail/mailhost")
    """Ours: what a change of the configuration keeps and checks."""
    postfix_config_dir: HostPath = Path("/etc/postfix")
    postfix_queue_dir: HostPath = Path("/var/spool/postfix")
    postfix_data_dir: HostPath = Path("/var/lib/postfix")
    dovecot_config_dir: HostPath = Path("/etc/dovecot")
    dovecot_base_dir: HostPath = Path("/run/dovecot")
    dovecot_state_dir: HostPath = Path("/var/lib/dovecot")
    rspamd_config_dir: HostPath = Path("/etc/rspamd")
    rspamd_run_dir: HostPath = Path("/run/rspamd")
    """rspamd's own; Postfix must be able to pass through it."""
    rspamd_state_dir: HostPath = Path("/var/lib/rspamd")
    dkim_dir: HostPath = Path("/var/lib/cacert-mail/dkim")
    """The worker's: private DKIM keys, and which of them sign. Root's, and rspamd's group may read; it must be able to pass
    through what is above, which it may not do in /etc/cacert-mail."""
    public_suffixes: HostPath = Path("/usr/share/rspamd/effective_tld_names.dat")
    """Under which names people register domains (publicsuffix.org), for DMARC. Debian's costs rspamd seconds at each start, and
    some 200 MB; a shorter one is wrong about the domains that it does not name."""
    postsrsd_defaults: HostPath = Path("/etc/cacert-mail/postsrsd/defaults")
    """/etc/default/postsrsd is a link to it, since the worker may not write there."""
    postsrsd_secret_file: HostPath = Path("/etc/cacert-mail/postsrsd/secret")

    @model_validator(mode="after")
    def _policy_is_whole(self) -> Self:
        if (self.auth_policy_url is None) != (self.auth_policy_key is None):
            raise ValueError("auth_policy_url and auth_policy_key go together")
        return self

    @property
    def verifies(self) -> bool:
        """Whether what comes in is looked at: without the DNS there is nothing to look at."""
        return self.dns or self.resolver is not None

    @model_validator(mode="after")
    def _uids_ascend(self) -> Self:
        if self.uid_last < self.uid_first:
            raise ValueError("uid_last is below uid_first")
        return self


class HostFileError(Exception):
    """One line for administrators: which file, which key, what is wrong with it. Never a value, which may be a secret."""


def load_host_file(path: Path) -> HostFile:
    """Reads the host's own file, in TOML. Raises HostFileError, also for a file that somebody but root may read or write."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o077:
                raise HostFileError(
                    f"{path} holds secrets: it must be a file of root that nobody else may read: mode 0600."
                )
            values = tomllib.load(file)
    except OSError as error:
        raise HostFileError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at (line \d+, column \d+|end of document)\)\Z", str(error))
        raise HostFileError(f"{path} is no TOML{f': see {where[1]}' if where else ''}.") from None
    except UnicodeDecodeError:
        raise HostFileError(f"{path} is no TOML: it is not UTF-8.") from None
    try:
        return HostFile.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        complaints = dict.fromkeys(": ".join(filter(None, (_place(each["loc"]), each["msg"]))) for each in found)
        raise HostFileError(f"{path}: {'; '.join(complaints)}") from None


def _place(location: tuple[int | str, ...]) -> str:
    """The key, which may be misspelt, or a secret that somebody wrote into the wrong place; then where in a list."""
    if not location:
        return ""
    key = str(location[0])
    numbers = [str(part) for part in location[1:] if isinstance(part, int)]
    return ".".join([key if re.fullmatch("[a-z_]{1,40}", key) else "a key that is none", *numbers])
