"""Daemons as own children in the foreground, in a directory of their own, and nothing left of either."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

# Ends with its standard input, that is with us, however we end; then kills what was running by then.
_GUARD = 'while read -r line; do groups=$line; done; for g in $groups; do kill -s KILL -- "-$g"; done; rm -rf -- "$1"'


class Processes:
    """Some daemons and their directory. `close()` ends both; should we be killed first, a guarding shell does.

    Each daemon leads a process group, so that a Ctrl-C in the terminal reaches us alone, and we stop it in order.
    """

    def __init__(self, *, on_disk: bool = False) -> None:
        # Not pytest's tmp_path: daemons that run as somebody else cannot enter it, and its name is long for a socket.
        self.directory = Path(tempfile.mkdtemp(prefix="cm-", dir="/var/tmp" if on_disk else "/dev/shm"))
        self.directory.chmod(0o755)
        self._running: list[subprocess.Popen[bytes]] = []
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", self.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self, argv: Sequence[str | Path], **environment: str) -> subprocess.Popen[bytes]:
        """Its output goes to `<directory>/<name>.out`, of our own processes to `python.out`: a pipe of ours that a daemon
        holds keeps a reader waiting."""
        name = "python" if argv[0] == sys.executable else Path(argv[0]).name
        with (self.directory / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"} | environment,
                start_new_session=True,
            )
        self._running.append(process)
        self._tell_guard()
        return process

    def stop(self, process: subprocess.Popen[bytes], how: int = signal.SIGTERM, *, seconds: float = 10) -> None:
        """Returns when it has ended; what it has left of its group after that, or after `seconds`, is killed."""
        if process not in self._running:
            return
        process.send_signal(how)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._running.remove(process)
            self._tell_guard()

    def wait_for(self, process: subprocess.Popen[bytes], where: int | Path, log: Path) -> None:
        """Until somebody listens on a port of 127.0.0.1, or on a Unix socket. Raises `RuntimeError` with the end of
        `log` when the process ends, or after ten seconds."""
        family, address = (
            (socket.AF_UNIX, str(where)) if isinstance(where, Path) else (socket.AF_INET, ("127.0.0.1", where))
        )

        def listens() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{self._complaints(log)}")
            with socket.socket(family) as client:
                return client.connect_ex(address) == 0

        if not wait_until(listens):
            raise RuntimeError(f"{process.args!r} does not listen on {where}:\n{self._complaints(log)}")

    def close(self) -> None:
        for process in self._running:  # all at once, then one by one
            process.terminate()
        for process in list(self._running):
            self.stop(process)
        assert self._guard.stdin
        self._guard.stdin.close()
        self._guard.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _complaints(self, log: Path) -> str:
        texts = [path.read_text(errors="replace") for path in (log, *self.directory.glob("*.out")) if path.exists()]
        return "\n".join(text[-4000:] for text in texts)

    def _tell_guard(self) -> None:
        assert self._guard.stdin
        self._guard.stdin.write(b" ".join(b"%d" % process.pid for process in self._running) + b"\n")
        self._guard.stdin.flush()


def run(argv: Sequence[str | Path], *, stdin: str = "", expect: int = 0) -> str:
    """What the command printed. Raises `RuntimeError` with its complaints when it ends otherwise than expected."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != expect:
        raise RuntimeError(f"{argv!r} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def free_ports(count: int) -> list[int]:
    """All of them are held until the last is found. They lie below the range from which the kernel takes ports for
    clients, so that no connection takes one away before the daemon has it, or while it restarts."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = random.randrange(10_000, 32_000)
            try:
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def wait_until(condition: Callable[[], bool], *, seconds: float = 10) -> bool:
    """Whether it came true in time. Asks every few milliseconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.003)
    return True
