"""Load on one HTTP server from a process of its own: keep-alive connections, each with one request at a time.

Parses as little as it can, so that it is not what is measured: its own share of a core is in the result.
"""

import asyncio
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """With `once` each request is sent once, and the load ends with the last; otherwise they go round and round."""

    port: int
    requests: Sequence[bytes]
    seconds: float
    connections: int = 16
    once: bool = False
    warm_up: float = 0.3
    """Seconds before the measured ones."""
    pids: dict[str, int] = field(default_factory=dict)
    """Processes whose CPU time is measured."""

    def run(self) -> "Measured":
        """In a new process."""
        command = [sys.executable, "-c", "from bench.load import main; main()"]
        done = subprocess.run(command, input=pickle.dumps(self), stdout=subprocess.PIPE, check=True)
        measured: Measured = pickle.loads(done.stdout)  # noqa: S301  from our own child
        return measured


@dataclass(frozen=True)
class Measured:
    statuses: Counter[int]
    seconds: float
    cpu: dict[str, float]
    """Seconds of CPU of each watched process, and of the load itself as `load`."""
    latencies: list[float]

    @property
    def count(self) -> int:
        return sum(self.statuses.values())

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    def cpu_each(self, name: str) -> float:
        """Microseconds of CPU for each request."""
        return self.cpu[name] / self.count * 1e6

    def only(self, status: int) -> "Measured":
        """Raises RuntimeError when anything else was answered: errors are fast."""
        if set(self.statuses) != {status}:
            raise RuntimeError(f"only {status} was expected, but there was {dict(self.statuses)}")
        return self


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads. Source: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Run:
    def __init__(self, load: Load) -> None:
        self.load = load
        self.sent = 0
        self.counting = False
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.open = 0

    def next_request(self) -> bytes | None:
        requests = self.load.requests
        if self.ended.done() or (self.load.once and self.sent == len(requests)):
            return None
        self.sent += 1
        return requests[(self.sent - 1) % len(requests)]

    def cpu(self) -> dict[str, float]:
        return {"load": time.process_time(), **{name: cpu_seconds(pid) for name, pid in self.load.pids.items()}}

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def measure(self) -> Measured:
        loop = asyncio.get_running_loop()
        connections = [
            (await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.load.port))[1]
            for _ in range(self.load.connections)
        ]
        for connection in connections:
            self.open += 1
            connection.send()
        await asyncio.sleep(self.load.warm_up)
        self.counting = True
        started, before = time.perf_counter(), self.cpu()
        loop.call_later(self.load.seconds, self.end)
        await self.ended
        self.counting = False
        seconds, after = time.perf_counter() - started, self.cpu()
        cpu = {name: after[name] - before[name] for name in after}
        return Measured(self.statuses, seconds, cpu, self.latencies)


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self.run = run
        self.received = b""
        self.expected = 0
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP always has both ways
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(f"the server closed the connection: {error}")

    def send(self) -> None:
        request = self.run.next_request()
        if request is None:
            self.run.open -= 1
            if self.run.open == 0:
                self.run.end()
            return
        self.sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.expected:
            head = self.received.find(_HEAD_END)
            if head < 0:
                return
            length = _LENGTH.search(self.received, 0, head + 2)
            if length is None and self.received[9:12] != b"304":
                self.fail(f"an answer without a length: {self.received[:200]!r}")
                return
            self.expected = head + len(_HEAD_END) + (int(length[1]) if length else 0)
        if len(self.received) < self.expected:
            return
        if self.run.counting:
            self.run.statuses[int(self.received[9:12])] += 1
            self.run.latencies.append(time.perf_counter() - self.sent_at)
        self.received, self.expected = b"", 0
        self.send()

    def fail(self, why: str) -> None:
        if not self.run.ended.done():
            self.run.ended.set_exception(RuntimeError(why))


def main() -> None:
    load: Load = pickle.load(sys.stdin.buffer)  # noqa: S301  from our own parent

    async def work() -> Measured:
        return await _Run(load).measure()

    sys.stdout.buffer.write(pickle.dumps(uvloop.run(work())))
