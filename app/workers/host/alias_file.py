"""The text of the alias file: written, read again, and compared with a hand-made one. Touches no disk.

SECURITY: runs in the worker (root). A line of this file can make local(8) run a program, append to a file or follow
`:include:`, so nothing gets into it but names and addresses that `parse_name` and `parse_destination` let through. The
hand-made file is root's own; of it nothing but names and line numbers are used. Sources: aliases(5), local(8),
RFC 5322 section 3.2 (quoted strings and comments).
"""

import re
from collections.abc import Mapping, Sequence

from app.addresses import NEVER_ALIASES, LocalPart, MailAddress, OutsideAddress
from app.errors import BadAddress

_VERSION = re.compile(rb"^# version: ([0-9]{1,18})$", re.MULTILINE)
_PART = re.compile(r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<comment>\([^()]*\))|\\(?P<escaped>.)|(?P<plain>[^":])')
_ESCAPED = re.compile(r"\\(.)")
_OWNER = "owner-"

_HEAD = """\
# Made by cacert-mail from its database; a change by hand is lost.
# version: {version}
"""


def parse_name(text: str) -> LocalPart:
    """A name that may stand at the left. Raises BadAddress.

    local(8) takes `owner-NAME` for the sender of all that goes through the alias NAME, so whoever had that alias would
    have its bounces.
    """
    name = LocalPart(text)
    if name != text:
        raise BadAddress(f"The name {name} is not stored in lower case.")
    if name.startswith(_OWNER):
        raise BadAddress(f"{name}: a name that begins with {_OWNER} has a meaning of its own for Postfix.")
    if name in NEVER_ALIASES:
        raise BadAddress(f"{name} can never be an alias.")
    return name


def parse_destination(text: str) -> str:
    """An address that may stand at the right. Raises BadAddress.

    Of what an address elsewhere may contain (RFC 5322, dot-atom) some has another meaning there: at its beginning `|`
    is a program, `/` a file and `-` an option; `!` and `%` are routes.
    """
    try:
        return MailAddress(text)
    except BadAddress:
        address = OutsideAddress(text)
    local_part = address.rpartition("@")[0]
    if local_part[0] in "|/-" or "!" in local_part or "%" in local_part:
        raise BadAddress("This address has a meaning of its own in an alias file.")
    return address


def value_of(destinations: Sequence[str]) -> str:
    """As postalias(1) keeps and prints it."""
    return ", ".join(destinations)


def render(entries: Mapping[str, Sequence[str]], version: int) -> bytes:
    """Sorted, one destination a line."""
    lines = [f"{name}: " + ",\n    ".join(entries[name]) + "\n" for name in sorted(entries)]
    return (_HEAD.format(version=version) + "".join(lines)).encode("ascii")


def version_of(text: bytes) -> int:
    """The version of a file of ours; 0 if it names none, as when somebody has written there by hand."""
    found = _VERSION.search(text[:1000])
    return int(found[1]) if found else 0


def same_lines(text: bytes, other: bytes) -> bool:
    """Whether two files of ours differ in their version at most."""
    return _VERSION.sub(b"", text, 1) == _VERSION.sub(b"", other, 1)


def names_in(text: str) -> dict[str, int]:
    """The names that a hand-made alias file defines, in lower case, with the numbers of their lines.

    aliases(5): a line that begins with a blank goes on with the one before, also across comments and empty lines; a
    comment is a line whose first other character is `#`; a name may be quoted.
    """
    found: dict[str, int] = {}
    logical: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace():
            logical.append((number, line))
        elif logical:
            first, so_far = logical[-1]
            logical[-1] = (first, f"{so_far} {line.strip()}")
    for number, line in logical:
        if name := _name(line):
            found.setdefault(name, number)
    return found


def _name(line: str) -> str:
    """What stands before the first colon that is neither quoted nor in a comment; empty if nothing does."""
    name, at = "", 0
    while (part := _PART.match(line, at)) is not None:
        if part["quoted"] is not None:
            name += " " + _ESCAPED.sub(r"\1", part["quoted"]) + " "
        else:
            name += part["comment"] or part["escaped"] or part["plain"]
        at = part.end()
    return " ".join(name.lower().split()) if line[at : at + 1] == ":" else ""
