"""Reads the bounces that come back to `returns@`, and writes down which notice did not arrive, and why.

SECURITY: anybody may send anything to that address. Only mail to a return path that we made is looked into (see `letters`),
of it only the beginning, and only what RFC 3464 has for programs. Other mail stays as it is, for people.
"""

import email
import time
from collections.abc import Iterator
from datetime import datetime
from email.message import Message
from pathlib import Path

from sqlalchemy import and_, update

from app.db import Database
from app.log import log
from app.models.notices import notices
from app.workers.service.letters import noticed
from app.workers.service.mail import one_line

ENVELOPE = 2 * 1024
"""Octets in which Postfix writes at delivery whom it is for: above whatever the sender wrote."""
MOST = 64 * 1024
"""Octets that are read of a bounce. What we want to know stands before the message that is returned."""
BATCH = 100
"""Messages that are looked at in one round."""
SETTLED = 2
"""Seconds after which no more of a directory's changes has the same time."""


class Returns:
    """The Maildir. Postfix adds to `new`; what is about a notice is moved to `cur` once it is written down."""

    def __init__(self, maildir: Path, key: bytes) -> None:
        self._new = maildir / "new"
        self._cur = maildir / "cur"
        self._key = key
        self._read_at = 0
        """Until `new` is changed after this, all of it is known."""
        self._others: set[str] = set()

    async def read(self, database: Database, now: datetime) -> None:
        """Raises OSError, and what the database raises: the next call goes on."""
        try:
            changed = self._new.stat().st_mtime_ns
        except FileNotFoundError:  # nothing has come yet
            return
        if changed == self._read_at:
            return
        names = {path.name for path in self._new.iterdir()}
        self._others &= names
        unread = sorted(names - self._others)
        for name, notice_id, bounce in list(self._about_notices(unread[:BATCH])):
            if bounce is not None:
                first = and_(notices.c.id == notice_id, notices.c.bounced_at.is_(None))
                async with database.write.begin() as connection:
                    await connection.execute(update(notices).where(first).values(bounced_at=now, bounce=bounce))
                log.warning("notice_bounced", notice_id=notice_id, bounce=bounce)
            (self._new / name).rename(self._cur / f"{name}:2,S")
        if len(unread) <= BATCH and time.time_ns() - changed > SETTLED * 10**9:
            self._read_at = changed

    def _about_notices(self, names: list[str]) -> Iterator[tuple[str, int, str | None]]:
        """Which notice a message is about, and why that did not arrive: None for a message that says no such thing."""
        for name in names:
            with (self._new / name).open("rb") as file:
                beginning = file.read(ENVELOPE)
                notice_id = self._meant_for(beginning)
                if notice_id is None:
                    self._others.add(name)
                    continue
                beginning += file.read(MOST)
            try:
                yield name, notice_id, failure(beginning)
            except Exception as error:  # whatever a stranger wrote that the library did not expect
                log.warning("bounce_unreadable", notice_id=notice_id, kind=type(error).__name__)
                self._others.add(name)

    def _meant_for(self, beginning: bytes) -> int | None:
        envelope = email.message_from_bytes(beginning)
        # The first is what the other server wrote to; an alias may lead here.
        recipients = (str(envelope.get(name, "")) for name in ("X-Original-To", "Delivered-To"))
        return next((known for each in recipients if (known := noticed(each, self._key)) is not None), None)


def failure(bounce: bytes) -> str | None:
    """`5.1.1 550 5.1.1 User unknown`; None for what reports no failure, or not yet (RFC 3464, section 2.3.3)."""
    message = email.message_from_bytes(bounce)
    parts = message.get_payload()
    if message.get_content_type() != "multipart/report" or not isinstance(parts, list):
        return None
    for part in parts:
        if isinstance(part, Message) and part.get_content_type() == "message/delivery-status":
            for about in part.walk():
                if str(about.get("Action", "")).strip().lower() == "failed":
                    diagnostic = str(about.get("Diagnostic-Code", "")).partition(";")[2]
                    return one_line(f"{about.get('Status', '')} {diagnostic}") or "no reason was given"
    return None
