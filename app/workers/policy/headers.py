"""Who a message says that it is from: a strict reader of its header block.

Mail programs disagree about what a broken or clever header means. So this accepts only what they all read alike, and refuses
the rest, with a sentence for whoever pressed "Send".

Whatever it is given comes from an attacker: it takes linear time, and raises nothing but BadHeader.
"""

import binascii
import re
from typing import NamedTuple

from app.addresses import OutsideAddress
from app.errors import BadAddress

MAX_FIELD = 4096
"""Octets in a From or Sender field, with its folds."""
MAX_LINE = 998
"""RFC 5322, section 2.1.1. Postfix breaks longer lines on their way out, anywhere."""

SENDER_FIELDS = ("from", "sender", "resent-from", "resent-sender")
"""What a recipient may be shown as the writer. Those that begin with `resent-` say who put the message into the mail again
(RFC 5322, section 3.6.6). From must be one's own anyway, so nobody loses anything when these must be too."""

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:(.*)\Z", re.DOTALL)

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_ADDRESS = rf"{_ATOM}+(?:\.{_ATOM}+)*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
_COMMENT = rf"\((?:{_ATOM}|[. \t])*+\)"
_QUOTED = rf'"(?:[ \t!#-;=?-\[\]-~]*+|(?:{_ATOM}|[. \t]|\\["\\])*+)"'
_NAME = rf"(?:{_ATOM}|{_QUOTED})(?:[ \t]++|{_ATOM}++|\.|{_QUOTED}|{_COMMENT})*+"
_MAILBOX = re.compile(
    rf"[ \t]*+(?:(?P<bare>{_ADDRESS})|(?:{_NAME})?(?<!\.)<(?P<angle>{_ADDRESS})>)"
    rf"[ \t]*+(?:{_COMMENT}[ \t]*+)?\Z"
)
_PLAIN = r"[A-Za-z0-9!#$%&'*+,./:;^_`{|}~-]"
_ENCODED = re.compile(
    rf"=\?([A-Za-z0-9_-]{{1,40}})\?(?:[Qq]\?({_PLAIN}*(?:=[0-9A-Fa-f]{{2}}{_PLAIN}*)*)|[Bb]\?([A-Za-z0-9+/=]*))\?="
)

_CHARSETS = frozenset(
    "us-ascii utf-8 koi8-r koi8-u iso-2022-jp shift_jis euc-jp euc-kr gb2312 gbk gb18030 big5".split()
    + [f"iso-8859-{part}" for part in range(1, 17) if part != 12]
    + [f"windows-125{part}" for part in range(9)]
)
"""Not utf-7 and its like, in which plain text hides an `@`."""
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f<>@]")


class BadHeader(Exception):
    """The text says what is wrong and what to do, in one line of printable ASCII."""


class Mailbox(NamedTuple):
    field: str
    """As people write it: `From`, `Resent-Sender`."""
    address: str
    """In lower case."""


def read_senders(block: bytes) -> list[Mailbox]:
    """The mailbox of From, and those of Sender, Resent-From and Resent-Sender where there are any. Raises BadHeader.

    The block is all lines before the empty one, which may end it. A line ends with CRLF or LF: Postfix takes both, and gives a
    milter its folded lines with LF. Every line is a field or goes on with the one before:

        block     = 1*(field *WSP ":" text *(eol 1*WSP text) eol) [eol]
        field     = 1*(%d33-57 / %d59-126)              ; RFC 5322, 3.6.8; in any case; blanks before the colon: 4.5
        text      = anything but CR, LF and NUL

    There is exactly one From and at most one Sender (RFC 5322, 3.6). Each of the four, unfolded (2.2.3), is one mailbox:

        mailbox   = *WSP (address / [name] "<" address ">") *WSP [comment *WSP]
        name      = (atext / quoted) *(WSP / atext / "." / quoted / comment)   ; and its last character is no "."
        address   = dot-atom "@" host name              ; RFC 5322, 3.4.1, of which only this: no quoted or encoded local part,
                                                        ; no blank or comment inside, no route, no literal
        quoted    = DQUOTE text without `\\`, `<`, `>` DQUOTE  /  DQUOTE *(WSP / atext / "." / `\\"` / `\\\\`) DQUOTE
        comment   = "(" *(WSP / atext / ".") ")"        ; nothing in it that an address could be taken from

    So it is no list and no group, which other grammars of From allow (RFC 5322, 3.6.2; RFC 6854). A `.` in a name is obsolete
    (4.1) and common. Wherever `=?` stands it begins an encoded word (RFC 2047, 5) of a charset that is known here, which
    decodes to something without `<`, `>`, `@` and control characters: some programs decode before they look for the address.
    Characters outside ASCII (RFC 6532) are refused in these fields; elsewhere they are not looked at.
    """
    fields = _sender_fields(block)
    if not fields["from"]:
        raise BadHeader("The message has no From header field. Set your address as the sender and send it again.")
    for name in ("from", "sender"):
        if len(fields[name]) > 1:
            raise BadHeader(f"The message has more than one {name.title()} header field. Send it with one.")
    return [Mailbox(name.title(), _address(name.title(), text)) for name in SENDER_FIELDS for text in fields[name]]


def _sender_fields(block: bytes) -> dict[str, list[bytes]]:
    """The unfolded texts of the fields that matter, by name."""
    if b"\0" in block or b"\r" in block.replace(b"\r\n", b"\n"):
        raise BadHeader("The header of the message has a NUL or a bare CR in it, which no mail program should write.")
    text = block.replace(b"\r\n", b"\n").removesuffix(b"\n").removesuffix(b"\n")
    lines = text.split(b"\n") if text else []
    found: dict[str, list[bytes]] = {name: [] for name in SENDER_FIELDS}
    current: list[bytes] | None = None
    for number, line in enumerate(lines):
        if line[:1] in (b" ", b"\t") and number:
            if current is not None:
                current[-1] += _checked(line, current[-1])
            continue
        field = _FIELD.match(line)
        if field is None:
            raise BadHeader(f"Line {number + 1} of the message's header is no header field.")
        current = found.get(field[1].decode("ascii").lower())
        if current is not None:
            _checked(line, b"")
            current.append(field[2])
    return found


def _checked(line: bytes, before: bytes) -> bytes:
    """A line of a field that matters. One of blanks only (obsolete folding) is the end of the header to some programs."""
    if not line.strip(b" \t"):
        raise BadHeader("The From or Sender header field has an empty line in it.")
    if len(line) > MAX_LINE or len(before) + len(line) > MAX_FIELD:
        raise BadHeader("The From or Sender header field is too long. Shorten the name beside the address.")
    return line


def _address(field: str, raw: bytes) -> str:
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        raise BadHeader(f"The {field} header field has characters outside ASCII that are not encoded.") from None
    mailbox = _MAILBOX.match(text)
    if mailbox is None:
        raise BadHeader(
            f"The {field} header field is not one plain address. Write it as: Your Name <name@example.org>, and put a name"
            " with special characters in quotes."
        )
    address = mailbox["bare"] or mailbox["angle"]
    if "=?" in address:
        raise BadHeader(f"The address in the {field} header field is encoded. Write it plainly.")
    _check_encoded_words(field, text)
    try:
        return OutsideAddress(address).lower()
    except BadAddress:
        raise BadHeader(f"The address in the {field} header field is none. Write it as name@example.org.") from None


def _check_encoded_words(field: str, text: str) -> None:
    if "=?" in _ENCODED.sub("", text):
        raise BadHeader(f"The name in the {field} header field is encoded in a wrong way.")
    for charset, quoted, base64 in _ENCODED.findall(text):
        if charset.lower() not in _CHARSETS:
            raise BadHeader(f"The name in the {field} header field is in an unknown charset. Use UTF-8.")
        try:
            octets = binascii.a2b_base64(base64, strict_mode=True) if base64 else binascii.a2b_qp(quoted, header=True)
            name = octets.decode(charset)
        except ValueError:
            raise BadHeader(f"The name in the {field} header field is encoded in a wrong way.") from None
        if _NOT_IN_A_NAME.search(name):
            raise BadHeader(f"The name in the {field} header field has <, > or @ in it, encoded. Leave them out.")
