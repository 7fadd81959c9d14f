"""Asks the rspamd that runs with which keys it signs, as Postfix would: a message through its milter socket.

SECURITY: runs in the worker (root). The message is made here, goes nowhere, and holds nothing but a parsed domain. What rspamd
answers is bounded and only searched. Source of the protocol: Postfix's src/milter/milter8.c, Sendmail's mfdef.h.
"""

import asyncio
import re
import struct
from pathlib import Path

from app.addresses import DomainName, Selector
from app.errors import BadAddress
from app.workers.host.fs import HostError

SECONDS = 10
_LIMIT = 1_000_000
_ACCEPTS, _REFUSES = (b"c", b"a"), (b"r", b"t", b"y", b"d")
"""What ends the message; before it come changes of it, and signs of life (p)."""
_UNANSWERED = {b"C": 0x1000, b"H": 0x2000, b"M": 0x4000, b"R": 0x8000, b"L": 0x80, b"N": 0x40000, b"B": 0x80000}
"""By step, what says that there is no answer to it (SMFIP_NR_*)."""
_TAG = re.compile(rb"(?:^|;)\s*([a-z]+)\s*=\s*([^;]*)")


class RspamdSilent(HostError):
    """It does not run, or does not answer as a milter does."""


async def ask_signers(socket: Path, domain: DomainName) -> set[Selector]:
    """The selectors with which mail of the service in the name of this domain is signed now. Raises RspamdSilent."""
    sender = f"postmaster@{DomainName(domain)}"
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                return await _ask(reader, writer, sender, domain)
            finally:
                writer.close()
    except (OSError, EOFError, ValueError, struct.error) as error:  # TimeoutError is an OSError
        raise RspamdSilent(f"rspamd, {socket}: {str(error) or type(error).__name__}") from None


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sender: str, domain: DomainName
) -> set[Selector]:
    async def say(command: bytes, *fields: str, data: bytes = b"") -> None:
        data += b"".join(field.encode("ascii") + b"\0" for field in fields)
        writer.write(struct.pack("!I", len(data) + 1) + command + data)
        await writer.drain()

    async def hear() -> tuple[bytes, bytes]:
        (length,) = struct.unpack("!I", await reader.readexactly(4))
        if not 0 < length < _LIMIT:
            raise ValueError("it answers nonsense")
        packet = await reader.readexactly(length)
        return packet[:1], packet[1:]

    # Version 6, all changes that a milter may ask for, all steps that it may leave unanswered.
    await say(b"O", data=struct.pack("!III", 6, 0x1FF, sum(_UNANSWERED.values())))
    answer, offered = await hear()
    if answer != b"O":
        raise ValueError("it does not speak as a milter")
    _, _, unanswered = struct.unpack("!III", offered[:12])

    async def step(command: bytes, *fields: str, data: bytes = b"") -> None:
        await say(command, *fields, data=data)
        if not unanswered & _UNANSWERED[command] and (heard := (await hear())[0]) != b"c":
            raise ValueError(f"it answers {heard!r} at step {command!r}")

    await say(b"D", "{daemon_name}", "service", data=b"C")
    await step(b"C", data=b"localhost\0" + b"4" + struct.pack("!H", 25) + b"127.0.0.1\0")
    await step(b"H", "localhost")
    await step(b"M", f"<{sender}>")
    await step(b"R", f"<{sender}>")
    for name, value in (("From", sender), ("To", sender), ("Subject", "Is it signed?")):
        await step(b"L", name, f" {value}")
    await step(b"N")
    await step(b"B", data=b"Who signs?\r\n")
    await say(b"E")
    found: set[Selector] = set()
    while True:
        answer, said = await hear()
        if answer in (b"h", b"i"):
            header, _, field = (said if answer == b"h" else said[4:]).partition(b"\0")
            if header.lower() == b"dkim-signature":
                found |= _selector(field, domain)
        elif answer in _ACCEPTS:
            return found
        elif answer in _REFUSES:
            raise ValueError(f"it lets no mail of {domain} pass: {said[:200].decode('ascii', 'replace')}")


def _selector(signature: bytes, domain: DomainName) -> set[Selector]:
    tags = {name.decode(): value.strip().decode("ascii", "replace") for name, value in _TAG.findall(signature)}
    try:
        return {Selector(tags["s"])} if tags.get("d") == domain else set()
    except (KeyError, BadAddress):
        return set()
