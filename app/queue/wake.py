"""The wake-up: an empty datagram to a local socket after a commit. Best effort; whoever listens polls as well.

SECURITY: loaded by the worker (root). What is received is thrown away unread.
"""

import asyncio
import contextlib
import socket
from pathlib import Path


def wake(directory: Path, host: str) -> None:
    """Never waits and never fails: a full or missing socket only costs the time until the next poll."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
    ):
        sender.sendto(b"", str(directory / f"{host}.wake"))


class Listener:
    """An event that a datagram sets."""

    def __init__(self, directory: Path, host: str) -> None:
        self.event = asyncio.Event()
        self._path = directory / f"{host}.wake"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._path.unlink(missing_ok=True)
        self._socket.bind(str(self._path))
        self._path.chmod(0o666)  # whoever may enter the directory may wake us
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(100):  # whoever sends faster than we read must not keep the loop from its other work
                self._socket.recv(1)
        self.event.set()

    async def wait(self, seconds: float) -> None:
        """Until a datagram came, or so many seconds passed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.event.wait(), seconds)
        self.event.clear()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._path.unlink(missing_ok=True)
