"""Postfix's own smtp-sink(1): a mail server elsewhere, which keeps what it gets, or refuses, or takes its time."""

import email
import os
import pwd
import signal
import subprocess
import tempfile
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path

from tests.stack.processes import Processes, free_ports


class Sink:
    """One server on 127.0.0.1, on a port that stays the same. `start` may be called again, with other options."""

    def __init__(self, processes: Processes, port: int | None = None) -> None:
        self._processes = processes
        self.port = port or free_ports(1)[0]
        self.directory = Path(tempfile.mkdtemp(dir=processes.directory))
        nobody = pwd.getpwnam("nobody")
        os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """`options` are those of smtp-sink(1), such as `-f RCPT`."""
        self.stop()
        template = str(self.directory / "%s.")
        self._process = self._processes.start(
            [
                "/usr/sbin/smtp-sink",
                "-u",
                "nobody",
                "-h",
                "sink.test",
                *options,
                "-d",
                template,
                f"127.0.0.1:{self.port}",
                "100",
            ]
        )
        self._processes.wait_for(self._process, self.port, self.directory / "none")

    def stop(self) -> None:
        if self._process is not None:
            self._processes.stop(self._process, signal.SIGKILL)
            self._process = None

    def messages(self) -> list[EmailMessage]:
        """What it has taken, in order. `X-Mail-Args` and `X-Rcpt-Args` are the envelope, above the message."""
        found = []
        for path in sorted(self.directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            message = email.message_from_bytes(path.read_bytes(), _class=EmailMessage, policy=SMTP)
            assert isinstance(message, EmailMessage)
            found.append(message)
        return found
