"""The policy process: how many of Postfix's questions a core answers, and how long rspamd's takes.

    python -m bench.policy [accounts]

The database user, the views and the process are those of production; the load is another process, on another core.
"""

import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Thread

from bench.load import Load, cpu_seconds
from bench.system import System, running
from tests.stack.processes import Processes, free_ports
from tests.workers.policy.questions import CONNECT, question

CONNECTIONS = 100
"""As many as Postfix has smtpd processes by default."""
THREADS = 4
BUSY = 100
"""Logins that send at the same time."""
HEADER = (
    "Received: from [192.168.1.17] (unknown [203.0.113.9])\r\n\tby mail.cacert.test (Postfix) with ESMTPSA id 4Tabc\r\n"
    "Message-ID: <3f2a@cacert.test>\r\nDate: Mon, 23 Nov 2026 12:00:00 +0100\r\nMIME-Version: 1.0\r\n"
    "User-Agent: Mozilla Thunderbird\r\nContent-Language: en-GB\r\nTo: someone@example.org\r\n"
    "From: =?UTF-8?Q?J=C3=BCrgen_M=C3=BCller?= <{login}>\r\nSubject: about tomorrow\r\n"
    "Content-Type: text/plain; charset=UTF-8; format=flowed\r\nContent-Transfer-Encoding: 8bit\r\n"
)


@dataclass(frozen=True)
class Policy:
    rate: float
    """Questions a second, of `BUSY` logins. What is asked at the same time is one query."""
    cpu: float
    """Microseconds of the process's CPU for each of them."""
    cold_rate: float
    """Questions a second when every login is another one."""
    from_p50: float
    """Milliseconds for a From question, one after another on one connection."""


def measure_policy(system: System, seconds: float) -> Policy:
    logins = [system.address(number) for number in range(1, system.accounts + 1)]
    with _process(system) as (pid, policy_port, from_port):
        with socket.create_connection(("127.0.0.1", policy_port), 10) as client:
            client.sendall(CONNECT)
            client.recv(100)
        _ask(policy_port, logins[:BUSY], 0.5)
        before = cpu_seconds(pid)
        rate = _ask(policy_port, logins[:BUSY], seconds)
        cpu = (cpu_seconds(pid) - before) / (rate * seconds) * 1e6
        cold = _ask(policy_port, logins[BUSY:], seconds)
        load = Load(from_port, [_from_question(login) for login in logins[:1000]], seconds, connections=1)
        latencies = load.run().only(200).latencies
    return Policy(rate, cpu, cold, statistics.median(latencies) * 1e3)


@contextmanager
def _process(system: System) -> Iterator[tuple[int, int, int]]:
    """Its pid and two ports. With a limit that nobody reaches: a refusal would be another way through the code."""
    policy_port, from_port = free_ports(2)
    processes = Processes()
    try:
        process = processes.start(
            [sys.executable, "-m", "app.cli.main", "policy"],
            DATABASE_URL=system.mariadb.url("policy"),
            POLICY_PORT=str(policy_port),
            FROM_PORT=str(from_port),
            RECIPIENTS_PER_HOUR="1000000",
            LOG_LEVEL="warning",
        )
        for port in (policy_port, from_port):
            processes.wait_for(process, port, processes.directory / "python.out")
        yield process.pid, policy_port, from_port
    finally:
        processes.close()


def _ask(port: int, logins: list[str], seconds: float) -> float:
    """Questions a second. Each is about another message, and they go through the logins round and round.

    Every connection is an smtpd(8), which asks one question at a time. Each thread goes through its own.
    """
    counted = [0] * THREADS
    end = time.monotonic() + seconds

    def talk(number: int) -> None:
        mine = logins[number::THREADS]
        with ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
                for _ in range(CONNECTIONS // THREADS)
            ]
            while time.monotonic() < end:
                for client in clients:
                    counted[number] += 1
                    login = mine[counted[number] % len(mine)]
                    client.sendall(question(login, instance=f"{number}.{counted[number]}"))
                for client in clients:
                    if (answer := client.recv(65536)) != b"action=DUNNO\n\n":
                        raise RuntimeError(f"another answer: {answer[:200]!r}")

    threads = [Thread(target=talk, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counted) / seconds


def _from_question(login: str) -> bytes:
    body = HEADER.format(login=login)
    lines = ["POST /from HTTP/1.1", f"X-Login: {login}", f"X-Envelope-From: {login}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode("ascii")


def main() -> None:
    with running() as system:
        system.grow(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
        sys.stdout.write(f"{measure_policy(system, 3)}\n")


if __name__ == "__main__":
    main()
