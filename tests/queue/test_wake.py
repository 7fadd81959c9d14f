"""The wake-up: best effort for the sender, and no burden for whoever listens."""

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from app.queue.wake import Listener, wake

pytestmark = pytest.mark.asyncio

HOST = "mail"
AGES = 60.0


@pytest_asyncio.fixture
async def listener(scratch: Path) -> AsyncIterator[Listener]:
    listener = Listener(scratch, HOST)
    yield listener
    listener.close()


async def woken(listener: Listener) -> bool:
    """Whether the event is set once the loop has looked at its sockets."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return listener.event.is_set()


async def test_a_datagram_wakes(scratch: Path, listener: Listener) -> None:
    assert not await woken(listener)
    waiting = asyncio.create_task(listener.wait(AGES))
    await asyncio.sleep(0)
    wake(scratch, HOST)
    async with asyncio.timeout(5):
        await waiting
    assert not await woken(listener)


async def test_a_wake_during_the_work_is_not_forgotten(scratch: Path, listener: Listener) -> None:
    wake(scratch, HOST)
    assert await woken(listener)
    async with asyncio.timeout(5):
        await listener.wait(AGES)


async def test_waiting_ends_by_itself(listener: Listener) -> None:
    async with asyncio.timeout(5):
        await listener.wait(0.001)


async def test_many_wakes_are_one(scratch: Path, listener: Listener) -> None:
    for _ in range(1000):
        wake(scratch, HOST)
    assert await woken(listener)
    await listener.wait(AGES)
    assert not await woken(listener)


async def test_only_the_own_host(scratch: Path, listener: Listener) -> None:
    wake(scratch, "other")
    other = Listener(scratch, "other")
    wake(scratch, "other")
    assert (await woken(other), await woken(listener)) == (True, False)
    other.close()


async def test_nobody_there_costs_nothing(scratch: Path) -> None:
    wake(scratch, HOST)
    wake(scratch / "missing", HOST)
    wake(scratch, "x" * 200)  # longer than the name of a socket may be
    (scratch / f"{HOST}.wake").write_text("a file")
    wake(scratch, HOST)


def fill(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        while True:
            sender.sendto(b"", str(path))


async def test_a_full_socket_costs_nothing(scratch: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        path = scratch / f"{HOST}.wake"
        deaf.bind(str(path))
        with pytest.raises(BlockingIOError):
            fill(path)
        wake(scratch, HOST)


async def test_what_is_sent_is_thrown_away(scratch: Path, listener: Listener) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x" * 10_000, str(scratch / f"{HOST}.wake"))
    assert await woken(listener)
    await listener.wait(AGES)
    assert not await woken(listener)


class Flooded:
    """A socket whose senders are faster than we are."""

    def recv(self, size: int) -> bytes:
        return b""


async def test_a_flood_leaves_time_for_other_work(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone who may enter the directory may send, as fast as they can."""
    with monkeypatch.context() as patch:
        patch.setattr(listener, "_socket", Flooded())
        listener._drain()
    assert listener.event.is_set()


async def test_the_file_comes_and_goes(scratch: Path) -> None:
    path = scratch / f"{HOST}.wake"
    path.write_text("left by a worker that was killed")
    listener = Listener(scratch, HOST)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    listener.close()
    assert not path.exists()
    wake(scratch, HOST)
