"""What is written to account owners, as text and as HTML from the same words. Pure: rows in, message out.

The name of an account and the reason that somebody gave are whatever somebody wrote. They are one line of plain characters
here, escaped in HTML, and no link: a program that turns `example.org` into one is given nothing to turn.

The same notice always makes the same message, to the byte, so that one that is sent twice is seen to be one (RFC 5322,
section 3.6.4). Bounces come back to a return path that only we can have made: see `return_path`.
"""

import hmac
import re
import textwrap
from base64 import b32encode
from dataclasses import dataclass
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from pathlib import Path
from typing import NamedTuple

import jinja2

from app.addresses import DomainName, OutsideAddress
from app.models.notices import NoticeKind

_HTML = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    autoescape=True,
    trim_blocks=True,
).get_template("letter.html")

_WHO = {
    "website": "The website",
    "webmail": "The webmail",
    "limited": "An administrator",
    "secondary": "An administrator",
    "primary": "An administrator",
}
"""Their role, never their name. Whoever else it was is `Somebody`."""

_TAG = re.compile(r"\+([1-9][0-9]{0,18})\.([a-z2-7]{16})@")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a letter is made from."""

    notice_id: int
    kind: NoticeKind
    recipient: OutsideAddress
    created_at: datetime
    role: str
    """Of whoever asked, for kinds that tell."""
    reason: str | None
    """That they gave."""
    address: str
    display_name: str
    link: str | None
    """For an invitation and a reset."""
    expires_at: datetime | None
    domain: DomainName
    """The primary one: who to ask is `postmaster` there."""
    sender: str


class _Words(NamedTuple):
    subject: str
    text: str
    """Paragraphs. `{link}` and `{reason}` are each one of their own."""
    button: str = ""


_WORDS = {
    NoticeKind.INVITATION: _Words(
        "Your new mailbox {account}",
        """\
The mailbox {account} was made for you. Before you can use it, choose its password here:

{link}

The link works once, until {until}. After that ask whoever invited you for another one.

If you know nothing of this, do nothing: without a password nobody can open the mailbox.""",
        "Choose a password",
    ),
    NoticeKind.RESET: _Words(
        "A new password for {account}",
        """\
{who} asked on {when} for a new password for the mailbox {account}.

{reason}

Choose it here:

{link}

The link works once, until {until}. With the new password the old one ends: whoever is signed in with it is signed out.

If it was not you who wanted this, do nothing: nothing has changed, and without this link nothing will. If it happens again,
{ask}.""",
        "Choose a new password",
    ),
    NoticeKind.RESET_SHOWN: _Words(
        "Somebody was given a link to your mailbox {account}",
        """\
{who} was given a link on {when}, to hand it over to you. It sets a new password for the mailbox {account}, once, until
{until}.

{reason}

If you did not ask for it, {ask}, at once: whoever has the link can open your mailbox.""",
    ),
    NoticeKind.PASSWORD_CHANGED: _Words(
        "The password of {account} was changed",
        """\
The password of the mailbox {account} was changed on {when}. Whatever was signed in with the old one is signed out.

If it was not you, {ask}, at once: somebody else may have opened your mailbox.""",
    ),
    NoticeKind.LOCKED: _Words(
        "Your mailbox {account} is locked",
        """\
The mailbox {account} was locked on {when}, because somebody else may have been using it. Nobody can read or send with it, you
neither, and its app passwords have ended. Mail to it still arrives.

{reason}

To have it back, {ask}.""",
    ),
    NoticeKind.UNLOCKED: _Words(
        "Your mailbox {account} is unlocked",
        """\
The mailbox {account} was unlocked on {when}. You can sign in again. App passwords do not come back: make new ones.

If you do not know why, {ask}.""",
    ),
}


def make_letter(facts: Facts, key: bytes) -> EmailMessage:
    """Raises ValueError for an address that no header can hold."""
    words = _WORDS[facts.kind]
    name = _name(facts.display_name)
    values = {
        "account": facts.address,
        "who": _WHO.get(facts.role, "Somebody"),
        "when": _when(facts.created_at),
        "until": _when(facts.expires_at or facts.created_at),
        "ask": f"write to postmaster@{facts.domain}, from another mailbox if need be",
        "link": facts.link or "",
        "reason": _reason(facts.reason),
    }
    subject = words.subject.format_map(values)
    filled = (part.replace("\n", " ").format_map(values) for part in words.text.split("\n\n"))
    paragraphs = [f"Hello {name}," if name else "Hello,", *filter(None, filled)]
    signature = f"The mail service of {facts.domain}"
    text = "\n\n".join([*map(_wrapped, paragraphs), f"-- \n{signature}"])
    html = _HTML.render(
        subject=subject, paragraphs=paragraphs, link=facts.link, button=words.button, signature=signature
    )
    message = EmailMessage()
    message["From"] = Address(f"{facts.domain} accounts", addr_spec=facts.sender)
    message["To"] = Address(name, addr_spec=facts.recipient)
    message["Subject"] = subject
    message["Date"] = facts.created_at
    tag = _mac(key, facts.notice_id)
    message["Message-ID"] = f"<notice.{facts.notice_id}.{tag}@{facts.domain}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation program answers
    message.set_content(f"{text}\n", cte="quoted-printable")
    message.add_alternative(html, subtype="html", cte="quoted-printable")
    message.set_boundary(f"=_{tag}")
    return message


def return_path(mailbox: str, key: bytes, notice_id: int) -> str:
    """The envelope sender of a notice. `mailbox` gets an extension that says which, and that it was us who sent it."""
    local, _, domain = mailbox.rpartition("@")
    return f"{local}+{notice_id}.{_mac(key, notice_id)}@{domain}"


def noticed(recipient: str, key: bytes) -> int | None:
    """Which notice a bounce to this address is about; None for an address that we did not make."""
    found = _TAG.search(recipient.lower())
    if found is None or not hmac.compare_digest(found[2], _mac(key, int(found[1]))):
        return None
    return int(found[1])


def _mac(key: bytes, notice_id: int) -> str:
    """Of 80 bits, without upper case: mail servers may change that. Whoever would guess one mails us 2^79 bounces."""
    return b32encode(hmac.digest(key, b"notice:%d" % notice_id, "sha256")[:10]).decode().lower()


def _wrapped(block: str) -> str:
    return textwrap.fill(block, 72, break_long_words=False, break_on_hyphens=False)


def _name(text: str) -> str:
    """A display name, if it looks like one: else somebody could have us send their advertisement."""
    line = _line(text, 60)
    return line if re.fullmatch(r"[\w '’.-]{1,60}", line) and not re.search(r"\.\w{2}|\d{5}", line) else ""


def _line(text: str, most: int) -> str:
    """One line without control characters, nor those that turn the direction of writing."""
    plain = "".join(each if each.isprintable() else " " for each in text)
    return textwrap.shorten(plain, most, placeholder=" …")


def _reason(given: str | None) -> str:
    if given is None or not given.strip():
        return ""
    # What makes a link of a word: a mail program looks for it between two characters.
    apart = re.sub(r"(?<=\S)[.:/@](?=\S)", r" \g<0> ", _line(given, 200))
    return f"The reason given: “{apart}”"


def _when(moment: datetime) -> str:
    """RFC 5322's date without the machine's parts: `23 November 2026, 12:30 UTC`."""
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M} UTC"


_MONTHS = "January February March April May June July August September October November December".split()
