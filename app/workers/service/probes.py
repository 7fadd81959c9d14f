"""Probes: mail of ours that its host signs, and that comes back to `returns@`, to see that a new DKIM key verifies.

SECURITY: anybody may send anything to that address. Only mail to an address that we made is looked at; of it only whether the
signature of that very selector verifies against the record that the name servers have.
"""

import hmac
import re
from base64 import b32encode
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, make_msgid
from pathlib import Path

import aiosmtplib
import dkim
from dkim.util import parse_tag_value

from app.config import ServiceSettings
from app.db import Clock
from app.log import log

_TAG = re.compile(r"\+dkim-([1-9][0-9]{0,18})\.([a-z2-7]{16})@")
_ENVELOPE = 4 * 1024
"""Octets in which Postfix writes at delivery whom it is for."""
_MOST = 256 * 1024
SECONDS = 20


def probe_address(mailbox: str, key: bytes, key_id: int) -> str:
    """`returns@` with an extension that says which key it is about, and that it was us who sent it."""
    local, _, domain = mailbox.rpartition("@")
    return f"{local}+dkim-{key_id}.{_mac(key, key_id)}@{domain}"


def probed(recipient: str, key: bytes) -> int | None:
    """Which DKIM key a probe is about; None for an address that we did not make."""
    found = _TAG.search(recipient.lower())
    if found is None or not hmac.compare_digest(found[2], _mac(key, int(found[1]))):
        return None
    return int(found[1])


def _mac(key: bytes, key_id: int) -> str:
    return b32encode(hmac.digest(key, b"dkim-probe:%d" % key_id, "sha256")[:10]).decode().lower()


async def send_probe(settings: ServiceSettings, host: str, domain: str, returns: str, clock: Clock) -> None:
    """From `accounts@` of the domain. Raises OSError and aiosmtplib.SMTPException."""
    message = EmailMessage(policy=SMTP)
    message["From"] = f"accounts@{domain}"
    message["To"] = returns
    message["Subject"] = "DKIM probe"
    message["Date"] = format_datetime(clock())
    message["Message-ID"] = make_msgid(domain=domain)
    message["Auto-Submitted"] = "auto-generated"
    message.set_content("This is sent to see whether a new DKIM key verifies. Nobody needs to read it.\n")
    server, port = settings.smtp_host, settings.smtp_port
    for each in filter(None, map(str.strip, settings.probe_servers.split(","))):
        name, _, place = each.partition("=")
        if name == host:
            server, _, text = place.rpartition(":")
            port = int(text)
    smtp = aiosmtplib.SMTP(
        hostname=server,
        port=port,
        start_tls=settings.smtp_starttls,
        cert_bundle=None if settings.smtp_ca_file is None else str(settings.smtp_ca_file),
        local_hostname=domain,
        timeout=SECONDS,
    )
    async with smtp:
        sender = f"{returns.partition('+')[0]}@{returns.rpartition('@')[2]}"
        await smtp.sendmail(sender, [returns], message.as_bytes())


class Probes:
    """Those that came back, in the Maildir that bounces come to as well."""

    def __init__(self, maildir: Path, key: bytes) -> None:
        self._new = maildir / "new"
        self._cur = maildir / "cur"
        self._key = key
        self._others: set[str] = set()

    def arrived(self) -> dict[int, list[Path]]:
        """By the key that they are about. Raises OSError."""
        if not self._new.is_dir():
            return {}
        found: dict[int, list[Path]] = {}
        names = {path.name for path in self._new.iterdir()}
        self._others &= names
        for name in sorted(names - self._others):
            key_id = self._meant_for(self._new / name)
            if key_id is None:
                self._others.add(name)
            else:
                found.setdefault(key_id, []).append(self._new / name)
        return found

    def take_away(self, path: Path) -> None:
        path.rename(self._cur / f"{path.name}:2,S")

    def _meant_for(self, path: Path) -> int | None:
        with path.open("rb") as file:
            envelope = message_from_bytes(file.read(_ENVELOPE))
        recipients = (str(envelope.get(name, "")) for name in ("X-Original-To", "Delivered-To"))
        return next((known for each in recipients if (known := probed(each, self._key)) is not None), None)


def read_probe(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST)


def is_signed(message: bytes, domain: str, selector: str, record: str) -> bool:
    """Whether the signature of this selector verifies, if the name servers say `record`. Others do not matter."""
    name = f"{selector}._domainkey.{domain}."

    def look_up(asked: bytes, timeout: float = 5) -> bytes:
        return record.encode("ascii") if asked.decode("ascii", "replace").lower() == name else b""

    try:
        signed = dkim.DKIM(message)
        headers = [value for header, value in signed.headers if header.lower() == b"dkim-signature"]
        for place, value in enumerate(headers):
            tags = parse_tag_value(value)
            if tags.get(b"d", b"").lower() == domain.encode() and tags.get(b"s", b"").lower() == selector.encode():
                return bool(signed.verify(place, dnsfunc=look_up))
    except Exception as error:  # whatever a stranger wrote that the library did not expect
        log.warning("probe_unreadable", kind=type(error).__name__)
    return False
