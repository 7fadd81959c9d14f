"""The programs that the host's worker runs: postmap, postalias, postfix, postqueue, postcat, postsuper and doveadm.

SECURITY: runs as root. Takes addresses from rows that an attacker may have written, and parses what programs print,
some of which repeats such rows, or what a sender said. It writes nothing itself; through the programs it builds the map of
the alias file, empties Dovecot's authentication cache, ends sessions, holds and releases queued mail, and makes Postfix
read its configuration again. Each program is called by its absolute path, without a shell, in a clean environment and a
session of its own, and is killed with its process group at the time limit. An address is parsed again before it becomes
an operand, so that none begins with `-` (operands follow `--` as well), none has a line break (postmap reads lines) and
none is a mask (`doveadm kick '*'` ends every session). No secret is in any argv.

What the programs print was found by experiment with Postfix 3.7.11 and Dovecot 2.3.19; the tests hold it.
"""

import asyncio
import os
import re
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

from app.addresses import LocalPart, MailAddress
from app.workers.host.fs import HostError

_V = TypeVar("_V")
_NOBODY_THERE = 68  # EX_NOHOST, which `doveadm kick` takes for "no users kicked".
_USERS_A_CALL = 1000
_USER_FORMAT = "%u\t%{uid}\t%{gid}\t%{home}"
_MESSAGES_A_CALL = 100
_CALLS_AT_ONCE = 4
_QUEUED = re.compile(r'^\{"queue_name": "(\w+)", "queue_id": "(\w+)"', re.MULTILINE)
_ENVELOPE = re.compile(r"^\*\*\* ENVELOPE RECORDS [a-z]+/(?:[0-9A-Za-z]/)*([0-9A-Za-z]+) \*\*\*$", re.MULTILINE)
_GONE = re.compile(r"open queue file (\w+): No such file")
_SENT_BY = "named_attribute: sasl_username="
_NO_SUCH_USER = re.compile(r"^userdb lookup: user (\S+) doesn't exist$", re.MULTILINE)


class CommandFailed(HostError):
    """A program could not answer: try again."""

    def __init__(self, argv: Sequence[str], says: str) -> None:
        super().__init__(f"{' '.join(argv)[:200]}: {says.strip()[-500:] or 'failed without a word'}")


class NotConfigured(HostError):
    """This host has no such program, so there is nothing that it could prove."""


@dataclass(frozen=True, slots=True)
class Output:
    """`returncode` is negative for the signal that ended the program."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    seconds: float = 30,
    mail_config: Path | None = None,
    limit: int = 64 * 2**20,
) -> Output:
    """Run a program to its end. `limit` bounds each of its two outputs, in bytes.

    Raises CommandFailed at the time limit or the output limit; any exit status is the caller's to judge. On these, and
    when the caller is cancelled, the whole process group is killed and the program reaped.
    """
    if not Path(argv[0]).is_absolute():
        raise ValueError(f"{argv[0]} is not an absolute path.")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    if mail_config is not None:
        environment["MAIL_CONFIG"] = str(mail_config)
    loop = asyncio.get_running_loop()
    starting = loop.create_task(
        loop.subprocess_exec(lambda: _Listener(argv, limit), *argv, cwd="/", env=environment, start_new_session=True)
    )
    try:
        async with asyncio.timeout(seconds):
            # Shielded, since asyncio kills the program alone, and not its group, if it is cancelled while it starts it.
            program, listener = await asyncio.shield(starting)
            feed = cast(asyncio.WriteTransport, program.get_pipe_transport(0))
            feed.write(stdin)
            feed.close()  # once all is written; a program need not read it
            await listener.done
            program.close()  # Else it warns (ResourceWarning) when it is collected.
            return Output(cast(int, program.get_returncode()), bytes(listener.heard[1]), bytes(listener.heard[2]))
    except BaseException as error:
        program, listener = await starting
        with suppress(ProcessLookupError):
            os.killpg(program.get_pid(), signal.SIGKILL)
        program.close()  # Not left to the end of file, which a process that left the group could withhold for ever.
        await listener.exited.wait()
        if isinstance(error, TimeoutError):
            raise CommandFailed(argv, f"was killed after {seconds:g} seconds") from error
        raise


class _Listener(asyncio.SubprocessProtocol):
    """Keeps what a program prints. `done` when it has ended and all is read, or as soon as it is too much."""

    def __init__(self, argv: Sequence[str], limit: int) -> None:
        self._argv, self._limit = argv, limit
        self.heard = {1: bytearray(), 2: bytearray()}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if not self.done.done():
            self.heard[fd] += data
            if len(self.heard[fd]) > self._limit:
                said = f"was killed because it printed more than {self._limit} bytes"
                self.done.set_exception(CommandFailed(self._argv, said))

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, slots=True)
class DovecotUser:
    """Dovecot's answer after its own checks, such as `first_valid_uid`. `uid` is 0 if the userdb gave none."""

    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs of this host. A configuration of None means that the host has no such program."""

    postfix_config: Path | None = None
    """The directory of main.cf."""
    recipient_map: str = ""
    """The very map that Postfix asks, such as `proxy:mysql:/etc/postfix/recipients.cf`."""
    dovecot_config: Path | None = None
    """The file dovecot.conf."""
    local_alias_map: str = ""
    virtual_alias_map: str = ""
    """The very maps that Postfix asks for aliases, but for the alias file."""

    async def lookup_recipients(self, addresses: Iterable[MailAddress]) -> dict[str, str]:
        """Which of the addresses Postfix's map has, and its values. One call of `postmap -q -` for all of them.

        postmap(1) exits 1 both if it found nothing and if the map failed, but only then does it say something. (A
        warning beside an empty answer counts as a failure too.) `proxy:` maps are tried until the time limit while
        Postfix is down.
        """
        return await self._query("postmap", self.recipient_map, [MailAddress(address) for address in addresses])

    async def lookup_local_aliases(self, names: Iterable[LocalPart]) -> dict[str, str]:
        """The same for the map that local(8) asks after the alias files."""
        return await self._query("postmap", self.local_alias_map, [LocalPart(name) for name in names])

    async def lookup_virtual_aliases(self, addresses: Iterable[MailAddress]) -> dict[str, str]:
        """The same for the map that cleanup(8) asks."""
        return await self._query("postmap", self.virtual_alias_map, [MailAddress(address) for address in addresses])

    async def lookup_file_aliases(self, file: Path, names: Iterable[LocalPart]) -> dict[str, str]:
        """The same for the map of an alias file. A missing map is CommandFailed."""
        return await self._query("postalias", f"lmdb:{file}", [LocalPart(name) for name in names])

    async def list_file_aliases(self, file: Path) -> dict[str, str]:
        """All that the map of an alias file answers, by name."""
        argv = self._postfix("postalias", "-s", "--", f"lmdb:{file}")
        output = await run(argv)
        if output.returncode != 0 or output.stderr:
            raise CommandFailed(argv, _text(output.stderr))
        answers = _answers(output.stdout, ":\t")
        return {name: value for name, value in answers.items() if name != "@" and not name.startswith("YP_")}

    async def build_aliases(self, file: Path) -> None:
        """Make `<file>.lmdb` from an alias file. For a malformed line postalias(1) exits 0 and only complains."""
        argv = self._postfix("postalias", "--", f"lmdb:{file}")
        output = await run(argv)
        if output.returncode != 0 or output.stderr:
            raise CommandFailed(argv, _text(output.stderr))

    async def _query(self, program: str, table: str, keys: Sequence[str]) -> dict[str, str]:
        """Keys are parsed by the caller: one a line."""
        argv = self._postfix(program, "-q", "-", "--", table)
        if not keys:
            return {}
        output = await run(argv, stdin="".join(f"{key}\n" for key in keys).encode())
        if output.returncode not in (0, 1) or (output.returncode == 1 and output.stderr):
            raise CommandFailed(argv, _text(output.stderr))
        answers = _answers(output.stdout, ":\t" if program == "postalias" else "\t")
        return {key: answers[key] for key in keys if key in answers}

    def _postfix(self, program: str, *arguments: str) -> list[str]:
        if self.postfix_config is None:
            raise NotConfigured("This host has no Postfix.")
        return [f"/usr/sbin/{program}", "-c", str(self.postfix_config), *arguments]

    async def lookup_users(self, addresses: Iterable[MailAddress]) -> dict[str, DovecotUser | CommandFailed]:
        """What Dovecot answers for each address: no entry if it knows none, CommandFailed if it could not say.

        The exit status of `doveadm user` is that of the last failure alone, so each address is judged by what is
        printed for it. While Dovecot's database is away every lookup takes a minute, and the time limit ends the call.
        """
        asked = list(dict.fromkeys(MailAddress(address) for address in addresses))
        found: dict[str, DovecotUser | CommandFailed] = {}
        for start in range(0, len(asked), _USERS_A_CALL):
            chunk = asked[start : start + _USERS_A_CALL]
            argv = self._doveadm("user", "-e", _USER_FORMAT)
            output = await run([*argv, "--", *chunk])
            said = _text(output.stderr)
            answers = defaultdict[str, list[list[str]]](list)
            for line in _text(output.stdout).split("\n"):
                name, *fields = line.split("\t")
                answers[name].append(fields)
            for name in _NO_SUCH_USER.findall(said):
                answers[name].append([])
            for address in chunk:
                match answers[address]:
                    case [[uid, gid, home]] if uid.isdecimal() and gid.isdecimal():
                        found[address] = DovecotUser(int(uid), int(gid), home)
                    case [[]]:
                        pass
                    case _:  # No answer, or two: a field with a line break could speak for another user.
                        about = [line for line in said.split("\n") if address in line]
                        found[address] = CommandFailed([*argv, address], "\n".join(about))
        return found

    async def flush_auth_cache(self, address: str) -> None:
        """Make Dovecot forget what it remembers of a login. doveadm exits 0 even if it reached no one to flush."""
        if self.dovecot_config is not None:
            argv = self._doveadm("auth", "cache", "flush", "--", MailAddress(address))
            output = await run(argv)
            if output.returncode != 0 or b"Error: " in output.stderr:
                raise CommandFailed(argv, _text(output.stderr))

    async def kick_sessions(self, address: str) -> None:
        """End the sessions of a login. That none is left is for `list_sessions` to say: see `_NOBODY_THERE`."""
        if self.dovecot_config is not None:
            argv = self._doveadm("kick", "--", MailAddress(address))
            output = await run(argv)
            # The same status tells of sessions that may not be kicked.
            if output.returncode not in (0, _NOBODY_THERE):
                raise CommandFailed(argv, _text(output.stderr))

    async def list_sessions(self, address: str) -> int:
        """How many IMAP, POP3 and ManageSieve sessions of a login are open; 0 on a host without Dovecot."""
        if self.dovecot_config is None:
            return 0
        argv = self._doveadm("-f", "tab", "who", "-1", "--", MailAddress(address))
        output = await run(argv)
        if output.returncode != 0:
            raise CommandFailed(argv, _text(output.stderr))
        return sum(line.startswith(f"{MailAddress(address)}\t") for line in _text(output.stdout).split("\n"))

    async def list_mail_of(self, address: str) -> list[str]:
        """The ids of all messages in Postfix's queue, but for those on hold, that this login has sent.

        Only the queue file says who had signed in, so all are read: 100 in 30 ms. What moves fast is read first, since a
        message that has gone meanwhile costs the second that postcat(1) waits before it gives up.
        """
        argv = self._postfix("postqueue", "-j")
        output = await run(argv, limit=2**28)
        if output.returncode != 0:
            raise CommandFailed(argv, _text(output.stderr))
        queued = sorted(_QUEUED.findall(_text(output.stdout)), key=lambda message: message[0] == "deferred")
        ids = [queue_id for name, queue_id in queued if name != "hold"]
        turn = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def read(chunk: list[str]) -> list[str]:
            async with turn:
                return await self._sent_by(MailAddress(address), chunk)

        chunks = [ids[start : start + _MESSAGES_A_CALL] for start in range(0, len(ids), _MESSAGES_A_CALL)]
        return [queue_id for found in await asyncio.gather(*map(read, chunks)) for queue_id in found]

    async def _sent_by(self, login: MailAddress, ids: list[str]) -> list[str]:
        """postcat(1) prints them in order, and stops at one that is gone.

        Postfix puts the login before the sender, and all that a client may have said, which can have line breaks (ORCPT),
        comes after that. Whoever makes up the beginning of another message there is read alone.
        """
        found: list[str] = []
        while ids:
            argv = self._postfix("postcat", "-e", "-q")
            output = await run([*argv, *ids])
            text = _text(output.stdout)
            begun = _ENVELOPE.findall(text)
            if len(ids) > 1 and len(begun) != len(set(begun)):
                alone = [await self._sent_by(login, [queue_id]) for queue_id in ids]
                return found + [queue_id for each in alone for queue_id in each]
            current = ""
            unread = list(reversed(ids))
            for line in text.split("\n"):
                if unread and (begins := _ENVELOPE.match(line)) and begins[1] == unread[-1]:
                    current = unread.pop()
                elif line.startswith("sender: "):
                    current = ""
                elif current and line.lower() == f"{_SENT_BY}{login}":
                    found.append(current)
            if output.returncode == 0:
                return found
            gone = _GONE.search(_text(output.stderr))
            if gone is None or gone[1] not in ids:
                raise CommandFailed(argv, _text(output.stderr))
            ids = ids[ids.index(gone[1]) + 1 :]
        return found

    async def hold_mail(self, ids: Iterable[str]) -> None:
        """Keep these messages from being delivered. One that is gone, or on hold, is no error."""
        await self._postsuper("-h", ids)

    async def release_mail(self, ids: Iterable[str]) -> None:
        """Deliver these messages of those on hold."""
        await self._postsuper("-H", ids)

    async def _postsuper(self, action: str, ids: Iterable[str]) -> None:
        asked = list(ids)
        if bad := [
            queue_id for queue_id in asked if not (queue_id.isascii() and queue_id.isalnum()) or queue_id == "ALL"
        ]:
            raise ValueError(f"{bad[0][:100]!r} is no queue id.")
        argv = self._postfix("postsuper", action, "-")
        if asked:
            output = await run(argv, stdin="".join(f"{queue_id}\n" for queue_id in asked).encode())
            if output.returncode != 0:
                raise CommandFailed(argv, _text(output.stderr))

    async def reload_postfix(self) -> None:
        """Make Postfix read its configuration again and try again the maps that it holds for down."""
        if self.postfix_config is not None:
            argv = ["/usr/sbin/postfix", "-c", str(self.postfix_config), "reload"]
            output = await run(argv)
            if output.returncode != 0:
                raise CommandFailed(argv, _text(output.stderr))

    def _doveadm(self, *arguments: str) -> list[str]:
        if self.dovecot_config is None:
            raise NotConfigured("This host has no Dovecot.")
        return ["/usr/bin/doveadm", "-c", str(self.dovecot_config), *arguments]


class Batched(Generic[_V]):
    """Gather single questions into calls of `lookup`: what is asked while one call runs goes into the next.

    `await batched(address)` gives the address's value, or None if the lookup has none for it. A question is never
    answered by a call that began before it was asked. An exception of the call reaches all who wait for it, one that
    is an address's value those who asked for that address; BadAddress is raised before anybody is asked.
    """

    def __init__(self, lookup: Callable[[Iterable[MailAddress]], Awaitable[Mapping[str, _V | CommandFailed]]]) -> None:
        self._lookup = lookup
        self._waiting: dict[MailAddress, asyncio.Future[_V | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, address: str) -> _V | None:
        parsed = MailAddress(address)
        if parsed not in self._waiting:
            self._waiting[parsed] = asyncio.get_running_loop().create_future()
        answer = self._waiting[parsed]
        if self._task is None:
            self._task = asyncio.create_task(self._ask())
        return await asyncio.shield(answer)  # Others may wait for the same answer.

    async def _ask(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, {}
                try:
                    found = await self._lookup(list(batch))
                except Exception as error:
                    for answer in batch.values():
                        answer.set_exception(error)
                except BaseException:
                    for answer in (*batch.values(), *self._waiting.values()):
                        answer.cancel()
                    raise
                else:
                    for address, answer in batch.items():
                        value = found.get(address)
                        if isinstance(value, CommandFailed):
                            answer.set_exception(value)
                        else:
                            answer.set_result(value)
        finally:
            self._task = None


def _text(printed: bytes) -> str:
    return printed.decode("ascii", "backslashreplace")


def _answers(printed: bytes, separator: str) -> dict[str, str]:
    """`key<separator>value` on each line: postmap puts a tab between, postalias a colon and a tab."""
    return dict(line.split(separator, 1) for line in _text(printed).split("\n") if separator in line)
