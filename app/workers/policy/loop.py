"""The policy process: answers Postfix on one port, and rspamd on another, both on 127.0.0.1.

SECURITY: unprivileged; its database user may read two views. Whoever has an account on this machine can connect, so every
length, wait and number of connections has a limit, and nothing that comes in is ever part of a log line's text. Such a person
could also say that an SMTP connection began just now; mailbox owners have no account on the machine.
"""

import asyncio
import signal
import socket
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus

from app.config import PolicySettings
from app.db import Database, end_tasks
from app.errors import Unavailable
from app.log import log
from app.workers.policy.connections import Connections
from app.workers.policy.recipients import BadQuestion, Recipients, answer_question, parse_question
from app.workers.policy.rows import Rows
from app.workers.policy.senders import MAX_BLOCK, BadRequest, answer_from, parse_head

MAX_CONNECTIONS = 400
"""On each port. Postfix has as many as it has smtpd processes: 100 by default. Both together stay below the 1024 files that a
process may have open."""
MAX_REQUEST = 16 * 1024
"""Octets in a question of Postfix, or in the head of one of rspamd. Postfix's have about 1,000."""
IDLE_SECONDS = 330
"""For the next question. Postfix gives an idle connection up after 300 (smtpd_policy_service_max_idle)."""
SLOW_SECONDS = 10
"""For the body of a question, and for reading our answer."""

Talk = Callable[[StreamReader, StreamWriter], Awaitable[None]]


async def run_policy(settings: PolicySettings, policy: socket.socket, from_: socket.socket) -> None:
    """Until SIGTERM or SIGINT. The two sockets are listening by now."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file, pool_size=4)
    rows = Rows(database)
    connections = Connections(time.time, time.monotonic)
    recipients = Recipients(time.monotonic)

    async def ask_recipients(reader: StreamReader, writer: StreamWriter) -> None:
        await talk_to_postfix(reader, writer, rows, connections, recipients, settings.recipients_per_hour)

    async def ask_from(reader: StreamReader, writer: StreamWriter) -> None:
        await talk_to_rspamd(reader, writer, rows)

    doors = [Door("policy", ask_recipients), Door("from", ask_from)]
    try:
        for door, listener in zip(doors, (policy, from_), strict=True):
            await door.open(listener)
        log.info("policy_started", policy_port=settings.policy_port, from_port=settings.from_port)
        await stopping.wait()
    finally:
        for door in doors:
            await door.close()
        await rows.close()
        await database.close()
        log.info("policy_stopped")


class Door:
    """A port, and the conversations that came in by it."""

    def __init__(self, name: str, talk: Talk) -> None:
        self._name = name
        self._talk = talk
        self._tasks: set[asyncio.Task[None]] = set()
        self._full = False

    async def open(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._enter, sock=listener, limit=MAX_REQUEST, backlog=2048)

    def _enter(self, reader: StreamReader, writer: StreamWriter) -> None:
        if len(self._tasks) >= MAX_CONNECTIONS:
            if not self._full:
                log.warning("too_many_connections", door=self._name, limit=MAX_CONNECTIONS)
            self._full = True
            writer.transport.abort()
            return
        self._full = self._full and len(self._tasks) > MAX_CONNECTIONS // 2
        task = asyncio.create_task(self._converse(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await self._talk(reader, writer)
            with suppress(TimeoutError):
                async with asyncio.timeout(SLOW_SECONDS):
                    writer.close()
                    await writer.wait_closed()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the other side has gone
        except TimeoutError:
            log.info("connection_ended", door=self._name, why="too slow, or idle")
        except asyncio.LimitOverrunError:
            log.info("connection_ended", door=self._name, why="too long a question")
        except BadQuestion as error:
            log.info("connection_ended", door=self._name, why=str(error))
        except Exception as error:  # one conversation ends, the process goes on
            log.error("conversation_failed", door=self._name, exc_info=error)
        finally:
            writer.transport.abort()

    async def close(self) -> None:
        if hasattr(self, "_server"):
            self._server.close()
        await end_tasks(*self._tasks)


async def talk_to_postfix(
    reader: StreamReader,
    writer: StreamWriter,
    rows: Rows,
    connections: Connections,
    recipients: Recipients,
    recipients_per_hour: int,
) -> None:
    """Question after question, answered in their order, until the other side has no more."""
    while True:
        async with asyncio.timeout(IDLE_SECONDS):
            request = await reader.readuntil(b"\n\n")
        question = parse_question(request[:-2])
        action = await answer_question(question, rows, connections, recipients, recipients_per_hour)
        await _write(writer, f"action={action}\n\n".encode("ascii"))


async def talk_to_rspamd(reader: StreamReader, writer: StreamWriter, rows: Rows) -> None:
    """Request after request, until the other side wants no more or sends what is none."""
    last = False
    while not last:
        async with asyncio.timeout(IDLE_SECONDS):
            request = await reader.readuntil(b"\r\n\r\n")
        try:
            head = parse_head(request[:-4])
            last = head.last
            async with asyncio.timeout(SLOW_SECONDS):
                block = await _read_block(reader, head.length)
            status, body = HTTPStatus.OK, await answer_from(head.login, block, rows)
        except BadRequest as error:
            last, status, body = True, HTTPStatus(error.status), b"{}"
            log.info("connection_ended", door="from", why=str(error))
        except Unavailable:
            status, body = HTTPStatus.SERVICE_UNAVAILABLE, b"{}"
        connection = "close" if last else "keep-alive"
        lines = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: {connection}\r\n\r\n"
        await _write(writer, f"HTTP/1.1 {status} {status.phrase}\r\n{lines}".encode("ascii") + body)


async def _read_block(reader: StreamReader, length: int) -> bytes | None:
    """None for one that is too long. It is read all the same: whoever is sending has no ear for an answer."""
    if length <= MAX_BLOCK:
        return await reader.readexactly(length)
    while length:
        chunk = await reader.read(min(length, 64 * 1024))
        if not chunk:
            raise asyncio.IncompleteReadError(b"", length)
        length -= len(chunk)
    return None


async def _write(writer: StreamWriter, answer: bytes) -> None:
    writer.write(answer)
    async with asyncio.timeout(SLOW_SECONDS):
        await writer.drain()
