"""Sends notices: job `mail.send` of host `-`, one after the other.

SECURITY: its input are rows whose texts anybody may have written, and what a mail server answers. A letter holds a link that
opens an account: neither that nor an address goes into a log, a job's error or a column.

One that is sent is written down before the next is begun, so a process that is killed sends at most one a second time, with
the same Message-ID and the same link. None is lost: what was claimed and not ended is taken back.
"""

import asyncio
import os
import random
import re
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import aiosmtplib
import structlog
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError

from app.addresses import DomainName, MailAddress, OutsideAddress
from app.config import ServiceSettings
from app.credentials.links import link_token
from app.db import Clock, Database, is_busy, is_lost
from app.log import log
from app.models.domains import DomainKind, domains
from app.models.hosts import SERVICE_HOST
from app.models.jobs import JobState
from app.models.notices import NoticeKind, notices
from app.models.password_resets import password_resets
from app.queue.claim import Claim, LeaseLost, claim, end_job, retry
from app.queue.contracts import MAIL_SEND
from app.services.users import Rights
from app.workers.service.letters import Facts, make_letter, return_path

R = TypeVar("R")

ATTEMPTS = 600
"""At most five minutes apart, so about a day: a mail server may be away for a night. What a link was for ends before."""
SECONDS = 50
"""For all that the mail server is asked for one letter: less than a lease."""
REPLY_SECONDS = 20
BATCH = 20
"""Sent in one round, between which there is other work."""
BUSY_TRIES = 5

_LINKS = {NoticeKind.INVITATION, NoticeKind.RESET}
"""Only these carry their reset's link."""


class NotSent(Exception):
    """There is nothing to send any more; the text says why."""


class TryAgain(Exception):
    """It may pass."""


class Refused(Exception):
    """The mail server refuses this letter for good; the text is what it said."""


class Letter(NamedTuple):
    sender: str
    """Of the envelope."""
    recipient: str
    message: EmailMessage


class Postman:
    """The one who sends. `key` is that of the links."""

    def __init__(self, database: Database, settings: ServiceSettings, key: bytes, rights: Rights, clock: Clock) -> None:
        self.database = database
        self.settings = settings
        self.key = key
        self.clock = clock
        self._users = rights.users
        self._jitter = random.Random()  # noqa: S311  spreads retries, guards nothing

    async def send_due(self, stopping: asyncio.Event) -> bool:
        """Sends what is due; true when more may wait. Raises what the database raises."""
        for _ in range(BATCH):
            if stopping.is_set():
                return False
            # One at a time: whatever was claimed when we are killed may be sent again.
            claimed = await claim(self.database, SERVICE_HOST, self.clock(), limit=1, kinds=[MAIL_SEND])
            if not claimed:
                return False
            with structlog.contextvars.bound_contextvars(request_id=claimed[0].request_id, job_id=claimed[0].id):
                await self._work(claimed[0], stopping)
        return True

    async def _work(self, taken: Claim, stopping: asyncio.Event) -> None:
        state = JobState.DONE
        error: str | None = None
        refused: dict[str, str | datetime]
        try:
            try:
                letter = await self._letter(taken.subject_id)
                async with asyncio.timeout(SECONDS):
                    await self._hand_over(taken.subject_id, letter)
                await self._written(partial(self._ended, taken, JobState.DONE, None, sent_at=self.clock()), stopping)
            except NotSent as reason:
                error = str(reason)
                await self._written(partial(self._ended, taken, JobState.DONE, error), stopping)
            except Refused as reason:
                state, error = JobState.DEAD, f"refused: {reason}"
                refused = {"bounced_at": self.clock(), "bounce": str(reason)}
                await self._written(partial(self._ended, taken, JobState.DEAD, error, **refused), stopping)
            except (TryAgain, OSError, aiosmtplib.SMTPException) as reason:
                error = str(reason) if isinstance(reason, TryAgain) else said_by(reason)
                state = await self._written(partial(self._again, taken, error), stopping)
            except (LeaseLost, DBAPIError):
                raise
            except Exception as reason:
                # A row that no request makes, or a mistake of ours. Where it was, and not what: that may be an address.
                state, error = JobState.DEAD, f"no letter can be made of it: {type(reason).__name__}"
                log.error("letter_failed", kind=type(reason).__name__, at=_place(reason))
                await self._written(partial(self._ended, taken, JobState.DEAD, error), stopping)
        except LeaseLost:
            log.warning("job_lost", subject_id=taken.subject_id)
            return
        level = log.info if state is JobState.DONE else log.warning
        level(
            "job", kind=taken.kind, subject_id=taken.subject_id, state=state.value, attempts=taken.attempts, error=error
        )

    async def _letter(self, notice_id: int) -> Letter:
        """Raises NotSent, TryAgain."""
        users = self._users
        query = (
            select(
                *notices.c["kind", "recipient", "reset_id", "created_at", "sent_at"],
                *password_resets.c["expires_at", "used_at", "cancelled_at", "principal_id", "reason"],
                *users.c["address", "display_name", "suspended_reason"],
            )
            .select_from(
                notices.outerjoin(password_resets, password_resets.c.id == notices.c.reset_id).outerjoin(
                    users, users.c.id == notices.c.user_id
                )
            )
            .where(notices.c.id == notice_id)
        )
        async with self.database.read.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
            primary = await connection.execute(select(domains.c.name).where(domains.c.kind == DomainKind.PRIMARY))
            domain = primary.scalar()
        if row is None or row.recipient is None or row.address is None:
            raise NotSent("there is nobody to send it to")
        if row.sent_at is not None:
            raise NotSent("it was sent already")
        if domain is None:
            raise TryAgain("there is no primary domain")
        kind = NoticeKind(row.kind)
        link = None
        if kind in _LINKS:
            if row.reset_id is None or row.used_at or row.cancelled_at or row.expires_at <= self.clock():
                raise NotSent("its link is not valid any more")
            link = self.settings.link(link_token(self.key, row.reset_id))
        facts = Facts(
            notice_id=notice_id,
            kind=kind,
            recipient=OutsideAddress(row.recipient),
            created_at=row.created_at,
            # A client's id begins with its role.
            role=(row.principal_id or "").partition("-")[0],
            reason=row.suspended_reason if kind is NoticeKind.LOCKED else row.reason,
            address=MailAddress(row.address),
            display_name=row.display_name,
            link=link,
            expires_at=row.expires_at,
            domain=DomainName(domain),
            sender=self.settings.mail_from or f"accounts@{domain}",
        )
        sender = return_path(self.settings.return_path or f"returns@{domain}", self.key, notice_id)
        return Letter(sender, facts.recipient, make_letter(facts, self.key))

    async def _hand_over(self, notice_id: int, letter: Letter) -> None:
        """To the mail server, or into the outbox. Raises Refused for what it refuses for good, and what else it raises."""
        data = letter.message.as_bytes(policy=SMTP)
        settings = self.settings
        if settings.outbox is not None:
            path = settings.outbox / f"{notice_id}.eml"
            beside = path.with_suffix(".new")
            beside.write_bytes(data)
            beside.replace(path)
            return
        server = aiosmtplib.SMTP(
            hostname=settings.smtp_host,
            port=settings.smtp_port,
            start_tls=settings.smtp_starttls,
            cert_bundle=None if settings.smtp_ca_file is None else str(settings.smtp_ca_file),
            local_hostname=letter.sender.rpartition("@")[2],
            timeout=REPLY_SECONDS,
        )
        try:
            await server.connect()
            await server.sendmail(letter.sender, [letter.recipient], data)
            # It is theirs now. Whatever goes wrong with a good-bye is no reason to send it again.
            with suppress(OSError, aiosmtplib.SMTPException):
                await server.quit(timeout=1)
        except aiosmtplib.SMTPRecipientsRefused as error:
            if error.recipients[0].code >= 500:
                raise Refused(said_by(error.recipients[0])) from None
            raise error.recipients[0] from None
        except aiosmtplib.SMTPDataError as error:
            # Refused before, it is our sender, or that we send at all: a matter of settings, which somebody can mend.
            if error.code >= 500:
                raise Refused(said_by(error)) from None
            raise
        finally:
            server.close()

    async def _ended(self, taken: Claim, state: JobState, error: str | None, **sent: str | datetime) -> None:
        async with self.database.write.begin() as connection:
            await end_job(connection, taken, state, error, self.clock())
            if sent:
                await connection.execute(update(notices).where(notices.c.id == taken.subject_id).values(**sent))

    async def _again(self, taken: Claim, error: str) -> JobState:
        return await retry(self.database, taken, error, self.clock(), jitter=self._jitter, attempts=ATTEMPTS)

    async def _written(self, write: Callable[[], Awaitable[R]], stopping: asyncio.Event) -> R:
        """Again while another transaction is in the way, or until the database is back: else it would be sent again."""
        busy = 0
        while True:
            try:
                return await write()
            except DBAPIError as error:
                if is_busy(error) and busy < BUSY_TRIES:
                    busy += 1
                    await asyncio.sleep(self._jitter.random() * 0.05 * busy)
                elif is_lost(error) and not stopping.is_set():
                    await asyncio.sleep(self.settings.poll_seconds)
                else:
                    raise


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def said_by(error: BaseException) -> str:
    """What a mail server said, or why it said nothing, in one line."""
    code, message = getattr(error, "code", None), getattr(error, "message", "")
    if code is not None:
        return one_line(f"{code} {message}")
    for each in (error, error.__cause__):
        if isinstance(each, OSError) and each.errno:
            return f"the mail server cannot be reached: {os.strerror(each.errno)}"
    return f"the mail server does not answer: {type(error).__name__}"


def one_line(text: str) -> str:
    """At most 200 characters, as the column takes; without addresses, links and tokens, which others may not see."""
    plain = "".join(each if each.isprintable() else " " for each in text[:4000])
    bare = re.sub(r"<?[^\s<>]+@[^\s<>]+>?|\S+://\S+|[\w-]{40,}", "…", plain)
    return " ".join(bare.split())[:200]
