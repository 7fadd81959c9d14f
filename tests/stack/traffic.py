"""Mail that goes out all the time, and is judged as it arrives elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import dkim
import dns.exception

from tests.stack.mail import MailStack
from tests.stack.name_servers import NameServers, PowerDnsServer, texts_at
from tests.stack.sink import Sink

_END = b"the last line\n"


class Traffic:
    """Each message by its number: `judged` says of each of its signatures whether it verified with what the name server had
    when the message arrived."""

    def __init__(
        self, mail: MailStack, sink: Sink, names: NameServers | PowerDnsServer, login: tuple[str, str]
    ) -> None:
        self.mail, self.sink, self.names, self.login = mail, sink, names, login
        self.sent: set[int] = set()
        self.judged: dict[int, list[bool]] = {}
        self.selectors: set[bytes] = set()
        self._numbers = count()
        self._over, self._last = threading.Event(), threading.Event()
        self._errors: list[Exception] = []

    @property
    def wrong(self) -> dict[int, list[bool]]:
        """Those that are unsigned, or that have a signature that does not verify."""
        return {number: judged for number, judged in self.judged.items() if not judged or not all(judged)}

    def send(self, messages: int) -> None:
        """On one connection."""
        address, password = self.login
        with self.mail.submission(address, password) as client:
            for _ in range(messages):
                if self._over.is_set():
                    return
                number = next(self._numbers)
                head = f"From: {address}\r\nTo: x@example.org\r\nSubject: {number}\r\n\r\n"
                client.sendmail(address, ["x@example.org"], head + _END.decode().replace("\n", "\r\n"))
                self.sent.add(number)

    def judge(self) -> None:
        """All that have arrived; each is read once, and taken away."""
        for path in self.sink.directory.iterdir():
            text = path.read_bytes().replace(b"\r\n", b"\n")
            if not text.endswith(_END + b"\n"):  # which smtp-sink adds, when it has all
                continue
            lines = text.split(b"\n")
            while lines[0].startswith((b"X-Client-", b"X-Helo-", b"X-Mail-", b"X-Rcpt-")):
                lines.pop(0)
            raw = b"\r\n".join(lines)
            message = dkim.DKIM(raw)
            [number] = [int(value) for name, value in message.headers if name.lower() == b"subject"]
            signatures = sum(name.lower() == b"dkim-signature" for name, _ in message.headers)
            self.judged[number] = [self._verifies(raw, place) for place in range(signatures)]
            path.unlink()

    def _verifies(self, raw: bytes, place: int) -> bool:
        signature = dkim.DKIM(raw)
        good = bool(signature.verify(place, dnsfunc=self._look_up))
        self.selectors.add(signature.selector)
        return good

    def _look_up(self, name: bytes, timeout: float = 5) -> bytes:
        end = time.monotonic() + timeout
        while True:
            try:
                return "".join(texts_at(self.names.address, self.names.port, name.decode())).encode()
            except (OSError, EOFError, dns.exception.DNSException):  # it is being started again
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _until(self, over: threading.Event, work: Callable[[], None]) -> None:
        try:
            while not over.wait(0.005):
                work()
        except Exception as error:  # told by whoever waits for the end
            self._errors.append(error)


@contextmanager
def traffic(
    mail: MailStack, sink: Sink, names: NameServers | PowerDnsServer, login: tuple[str, str], *, senders: int = 1
) -> Iterator[Traffic]:
    """Goes on inside; at the end each message has arrived and is judged. Raises what a sender was told, and
    `RuntimeError` when a message does not arrive."""
    made = Traffic(mail, sink, names, login)
    sending = [threading.Thread(target=made._until, args=(made._over, lambda: made.send(50))) for _ in range(senders)]
    judging = threading.Thread(target=made._until, args=(made._last, made.judge))
    for thread in (*sending, judging):
        thread.start()
    try:
        yield made
        made._over.set()
        for thread in sending:
            thread.join()
        end = time.monotonic() + 60
        while not made._errors and len(made.judged) < len(made.sent):
            if time.monotonic() > end:
                raise RuntimeError(f"{len(made.sent) - len(made.judged)} messages do not arrive")
            time.sleep(0.05)
    finally:
        made._over.set()
        made._last.set()
        judging.join()
    if made._errors:
        raise made._errors[0]
