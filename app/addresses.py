"""Mail addresses and their parts: parse or refuse.

SECURITY: used on both sides of the border. The worker runs every name that it reads from a row through these classes
before it touches the disk, so nothing here may ever accept a slash, a NUL, a blank, a control character, a leading dot
or anything outside ASCII.

Sources: RFC 5321 section 4.5.3.1 (lengths), RFC 5322 section 3.2.3 (dot-atom), RFC 1035 section 2.3.1 and RFC 5891
(labels), RFC 6376 section 3.1 (selectors), RFC 2142 (reserved names).
"""

import re
from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from app.errors import BadAddress

_LOCAL_PART = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.))*(?<![._-])\Z")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})+\Z")
_SELECTOR = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\Z")
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_DOT_ATOM = re.compile(rf"{_ATOM}(?:\.{_ATOM})*\Z")

MAX_LOCAL_PART = 64
MAX_ADDRESS = 254
"""Octets in a whole address: a path of 256 less its two angle brackets."""


class _Parsed(str):
    """A string that is valid because it exists: the constructor refuses everything else."""

    __slots__ = ()
    max_length: int

    def __new__(cls, text: str) -> Self:
        return super().__new__(cls, cls.parse(text))

    @classmethod
    def parse(cls, text: str) -> str:
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(max_length=cls.max_length)
        return core_schema.no_info_after_validator_function(cls, text, serialization=core_schema.to_string_ser_schema())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": "string", "maxLength": cls.max_length}


class LocalPart(_Parsed):
    """What stands before the `@` of an address of ours; also a directory name below the home of all mailboxes.

    Never `+` (the recipient delimiter), never two dots in a row, letter or digit at both ends.
    """

    max_length = MAX_LOCAL_PART

    @classmethod
    def parse(cls, text: str) -> str:
        lower = text.lower()
        if not text.isascii() or len(text) > MAX_LOCAL_PART or not _LOCAL_PART.match(lower):
            raise BadAddress(
                "The part before the @ takes 1 to 64 of a-z, 0-9, dot, underscore and hyphen; "
                "it starts and ends with a letter or digit and has no two dots in a row."
            )
        return lower


class DomainName(_Parsed):
    """A fully qualified domain name of plain LDH labels, lower case, without the final dot."""

    max_length = 253

    @classmethod
    def parse(cls, text: str) -> str:
        lower = text.lower()
        if not text.isascii() or len(text) > 253 or not _DOMAIN.match(lower) or lower.rpartition(".")[2].isdigit():
            raise BadAddress(
                "A domain is two or more labels of a-z, 0-9 and inner hyphens, joined by dots, at most 253 characters. "
                "Write an internationalised one in its xn-- form."
            )
        return lower


class Selector(_Parsed):
    """A DKIM selector: one or more LDH labels."""

    max_length = 63

    @classmethod
    def parse(cls, text: str) -> str:
        lower = text.lower()
        if not text.isascii() or len(text) > 63 or not _SELECTOR.match(lower):
            raise BadAddress(
                "A selector is labels of a-z, 0-9 and inner hyphens, joined by dots, at most 63 characters."
            )
        return lower


class MailAddress(_Parsed):
    """An address that can be ours: `LocalPart@DomainName`, lower case."""

    __slots__ = ()
    max_length = MAX_ADDRESS

    @classmethod
    def parse(cls, text: str) -> str:
        local, at, domain = text.rpartition("@")
        if not at:
            raise BadAddress("An address has the form name@domain.")
        address = f"{LocalPart.parse(local)}@{DomainName.parse(domain)}"
        if len(address) > MAX_ADDRESS:
            raise BadAddress(f"An address has at most {MAX_ADDRESS} characters.")
        return address

    @property
    def local_part(self) -> LocalPart:
        return LocalPart(self.rpartition("@")[0])

    @property
    def domain(self) -> DomainName:
        return DomainName(self.rpartition("@")[2])


class OutsideAddress(_Parsed):
    """An address somewhere else, to which we only send: any dot-atom before the `@`, its case kept."""

    max_length = MAX_ADDRESS

    @classmethod
    def parse(cls, text: str) -> str:
        local, at, domain = text.rpartition("@")
        if not at or len(text) > MAX_ADDRESS or len(local) > MAX_LOCAL_PART or not _DOT_ATOM.match(local):
            raise BadAddress("An address has the form name@domain, in plain ASCII, at most 254 characters.")
        return f"{local}@{DomainName.parse(domain)}"

    @property
    def domain(self) -> DomainName:
        return DomainName(self.rpartition("@")[2])


RESERVED_LOCAL_PARTS = frozenset(
    # RFC 2142
    "abuse ftp hostmaster info marketing news noc postmaster sales security support trouble usenet uucp webmaster www "
    # what mail software itself sends from or to, and RFC 8058, RFC 7208, RFC 6186 customs
    "autoconfig autodiscover bounce bounces dmarc dmarc-reports mailer-daemon mta-sts no-reply noreply nobody returns "
    "tls-reports tlsrpt "
    # CA/Browser Forum baseline requirements, 3.2.2.4.4: whoever reads one of these can have a certificate issued
    "admin administrator "
    # system users of Debian and of the programs on a mail host
    "root daemon bin sys sync games man lp mail proxy www-data backup list irc gnats systemd-network systemd-resolve "
    "systemd-timesync messagebus sshd postfix postdrop dovecot dovenull mysql vmail rspamd _rspamd opendkim clamav "
    "amavis spamd debian-spamd".split()
)
"""Names that cannot be accounts; an alias may have them."""

NEVER_ALIASES = frozenset({"mailer-daemon", "returns"})
"""Names that cannot be aliases either: bounces to `returns` are for the service to read, and nobody writes to the other."""
