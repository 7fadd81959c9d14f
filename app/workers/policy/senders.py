"""rspamd's question: may this login send a message with this header?

    POST /from HTTP/1.1
    X-Login: alice@example.org
    X-Envelope-From: alice@example.org
    Content-Length: 123

    From: Alice <alice@example.org>
    …

is answered by 200 and `{"action": "accept"}` or `{"action": "reject", "reason": "…"}`, the reason one line of printable ASCII.
Everything else is an answer with another status, and the connection ends: the mail has to wait then.
"""

import json
import re
from typing import NamedTuple

from app.log import log
from app.workers.policy.headers import BadHeader, read_senders
from app.workers.policy.rows import Rows

MAX_BLOCK = 256 * 1024
"""Octets in a header block that is looked at. Postfix keeps at most 100 KiB of one field (header_size_limit)."""
MAX_REASON = 400
"""Characters: a reply line has 512 octets (RFC 5321, section 4.5.3.1.5)."""
SHOWN = 5

_REQUEST_LINE = re.compile(rb"([A-Z]{1,10}) (/[!-~]*) HTTP/1\.1\Z")
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([ -~\t]*?)[ \t]*\Z")
_PLAIN = re.compile(r"[a-z0-9.@_+-]{1,254}\Z")
"""What may be shown again. A milter's reply takes `%` for something else."""


class BadRequest(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Head(NamedTuple):
    login: str
    length: int
    """Octets of the body."""
    last: bool
    """The peer wants no other question on this connection."""


def parse_head(head: bytes) -> Head:
    """All before the body, without the last empty line. Raises BadRequest.

    A small part of RFC 9112, so that nobody can take a request's border for elsewhere: CRLF line ends, no folding, no chunks.
    """
    request, *lines = head.split(b"\r\n")
    line = _REQUEST_LINE.match(request)
    if line is None:
        raise BadRequest(400, "no request line of HTTP/1.1")
    fields: dict[bytes, bytes] = {}
    for each in lines:
        field = _LINE.match(each)
        if field is None:
            raise BadRequest(400, "a line that is no header field")
        name = field[1].lower()
        if name in fields:
            raise BadRequest(400, "a header field twice")
        fields[name] = field[2]
    if line[2] != b"/from":
        raise BadRequest(404, "another path than /from")
    if line[1] != b"POST":
        raise BadRequest(405, "another method than POST")
    length = fields.get(b"content-length", b"")
    if b"transfer-encoding" in fields or not re.fullmatch(rb"[0-9]{1,10}", length):
        raise BadRequest(411, "no Content-Length")
    login = fields.get(b"x-login", b"").decode("ascii").lower()
    if not login:
        raise BadRequest(400, "no X-Login")
    return Head(login, int(length), fields.get(b"connection", b"").lower() == b"close")


async def answer_from(login: str, block: bytes | None, rows: Rows) -> bytes:
    """The answer's body. `block` is None when there was more of it than `MAX_BLOCK`. Raises Unavailable."""
    reason = await why_not(login, block, rows)
    if reason is None:
        return b'{"action": "accept"}'
    log.info("from_refused", login=login, reason=reason)
    return json.dumps({"action": "reject", "reason": reason}).encode("ascii")


async def why_not(login: str, block: bytes | None, rows: Rows) -> str | None:
    """None when each address in From, Sender, Resent-From and Resent-Sender is one that the login may send as."""
    if block is None:
        return f"The header of the message has more than {MAX_BLOCK // 1024} KiB. Write to fewer people at once."
    try:
        mailboxes = read_senders(block)
    except BadHeader as error:
        return str(error)
    own = await rows.senders(login)
    if not own:
        return "This account may not send mail. Ask the administrators of your mail server."
    for field, address in mailboxes:
        if address not in own and _without_extension(address) not in own:
            return _not_yours(field, address, own)
    return None


def _without_extension(address: str) -> str:
    """`alice+list@` is alice's, as it is to Postfix's smtpd_sender_login_maps, with `recipient_delimiter = +`."""
    local, _, domain = address.partition("@")
    return f"{local.partition('+')[0]}@{domain}"


def _not_yours(field: str, address: str, own: list[str]) -> str:
    shown = address if _PLAIN.match(address) and len(address) <= 100 else "in it"
    text = f"The {field} address {shown} is not yours. You may send as: {own[0]}"
    for number, each in enumerate(own[1:], 1):
        if number == SHOWN or len(text) + len(each) + len(", and others") > MAX_REASON:
            return f"{text}, and others"
        text += f", {each}"
    return text
