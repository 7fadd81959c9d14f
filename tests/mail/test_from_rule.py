"""rspamd between Postfix and the policy process: whatever goes wrong there, no message passes without a clear word."""

import smtplib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.accounts import PASSWORD, Account
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.processes import free_ports, run

ALICE = f"alice@{PRIMARY_DOMAIN}"
FORGED = f"From: bob@{PRIMARY_DOMAIN}\r\n\r\nx\r\n"

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def answer(body: bytes, head: bytes = OK) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextmanager
def instead_of_policy(stack: MailStack, reply: bytes | None) -> Iterator[list[bytes]]:
    """Something else listens where rspamd asks, takes each request and replies so; None: it never does."""
    stack.stop(stack.policy)
    (from_port,) = free_ports(1)
    stack.start_policy(from_port)
    stack.wait_for_policy(from_port)
    asked: list[bytes] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", stack.settings.from_port)) as server:

        def serve() -> None:
            while not over.is_set():
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(10)
                    asked.append(client.recv(65536))
                    if reply is None:
                        over.wait(20)
                    else:
                        client.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            server.close()
            stack.stop(stack.policy)
            stack.start_policy()
            stack.wait_for_policy()


@pytest.fixture
def home(account: Account) -> Path:
    return account(ALICE)


@contextmanager
def before_data(stack: MailStack) -> Iterator[smtplib.SMTP]:
    """Alice has said to whom; the message comes next."""
    with stack.submission(ALICE, PASSWORD) as client:
        assert client.mail(ALICE)[0] == 250
        assert client.rcpt(ALICE)[0] == 250
        yield client


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        answer(b""),
        answer(b"{}"),
        answer(b'"accept"'),
        answer(b"accept"),
        answer(b"[]"),
        answer(b"null"),
        answer(b'{"action": "ACCEPT"}'),
        answer(b'{"action": ["accept"]}'),
        answer(b'{"action": true}'),
        answer(b'{"action": "reject"}'),
        answer(b'{"action": "reject", "reason": 5}'),
        answer(b'{"action": "reject", "reason": {}}'),
        answer(b"\x00\xff" * 1000),
        answer(b"[" * 10000),
        answer(b'{"action": "accept"}', b"HTTP/1.1 500 x\r\n"),
        answer(b'{"action": "accept"}', b"HTTP/1.1 204 x\r\n"),
        answer(b'{"action": "accept"}', b"HTTP/1.1 302 x\r\nLocation: /\r\n"),
        OK + b'Content-Length: 100\r\n\r\n{"action": "accept"}',
        None,
    ],
)
def test_no_clear_answer(stack: MailStack, home: Path, reply: bytes | None) -> None:
    with instead_of_policy(stack, reply) as asked, before_data(stack) as client:
        code, text = client.data(f"From: {ALICE}\r\n\r\nx\r\n")
        assert (code, text[:5]) == (451, b"4.7.1"), text
        assert asked


def test_clear_answers(stack: MailStack, home: Path) -> None:
    with instead_of_policy(stack, answer(b'{"action": "accept"}')) as asked, before_data(stack) as client:
        assert client.data(FORGED)[0] == 250
    head, _, body = asked[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /from HTTP/1.1"
    assert {f"X-Login: {ALICE}".encode(), f"X-Envelope-From: {ALICE}".encode()} <= set(lines)
    assert body.rstrip() == f"From: bob@{PRIMARY_DOMAIN}".encode()


def test_refusal_in_the_words_of_the_answer(stack: MailStack, home: Path) -> None:
    with (
        instead_of_policy(stack, answer(b'{"action": "reject", "reason": "No. See 100%"}')),
        before_data(stack) as client,
    ):
        assert client.data(f"From: {ALICE}\r\n\r\nx\r\n") == (554, b"5.7.1 No. See 100%")


def test_header_arrives_as_it_was_sent(stack: MailStack, home: Path) -> None:
    lines = [
        "Subject: a\r\n b\r\n\tc",
        "FROM:  x  ",
        "From :y",
        "from:z",
        "X-Empty:",
        f"X-Long: {'x' * 900}",
        "X-8bit: \xfc",
        "To: =?utf-8?Q?=C3=BC?= <a@example.net>",
    ]
    with instead_of_policy(stack, answer(b'{"action": "accept"}')) as asked, before_data(stack) as client:
        assert client.data("\r\n".join([*lines, "", "From: body\r\n"]).encode("latin-1"))[0] == 250
    got = asked[0].partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n").decode("latin-1")
    folded = got.replace("\n ", "\0 ").replace("\n\t", "\0\t").strip("\n").split("\n")
    assert [line.replace(" ", "") for line in folded] == [line.replace("\r\n", "\0").replace(" ", "") for line in lines]


@contextmanager
def other_rule(stack: MailStack, text: str) -> Iterator[None]:
    """rspamd is stopped meanwhile; start it."""
    path = stack.file.rspamd_config_dir / "from.lua"
    before = path.read_text()
    stack.stop(stack.rspamd)
    path.write_text(text)
    try:
        yield
    finally:
        stack.stop(stack.rspamd)
        path.write_text(before)
        stack.start_rspamd()
        stack.wait_for_rspamd()


@pytest.mark.parametrize("text", ["this is no Lua", "error('at load')", "no_such.thing()"])
def test_rule_that_cannot_be_loaded(stack: MailStack, account: Account, text: str) -> None:
    """rspamd does not start, and mail has to wait. Its own checker, which an installation asks first, says so too."""
    main = stack.file.rspamd_config_dir / "rspamd.conf"
    assert "syntax OK" in run(["rspamadm", "configtest", "-c", main])
    with other_rule(stack, text):
        run(["rspamadm", "configtest", "-c", main], expect=1)
        stack.start_rspamd()
        with pytest.raises(RuntimeError, match="ended with"):
            stack.wait_for_rspamd()
        with stack.smtp() as client:
            assert client.mail("s@example.net")[0] == 451


@pytest.mark.parametrize(
    "place", ["task:get_raw_headers()", "parser:get_object()", "ucl.parser()", "rspamd_http.request"]
)
def test_rule_that_fails_while_it_runs(stack: MailStack, account: Account, place: str) -> None:
    account(ALICE)
    text = (stack.file.rspamd_config_dir / "from.lua").read_text()
    assert place in text
    with other_rule(stack, text.replace(place, "error('on purpose')")):
        stack.start_rspamd()
        stack.wait_for_rspamd()
        with stack.submission(ALICE, PASSWORD) as client:
            assert client.mail(ALICE)[0] == 250
            assert client.rcpt(ALICE)[0] == 250
            assert client.data(f"From: {ALICE}\r\n\r\nx\r\n")[0] == 451
