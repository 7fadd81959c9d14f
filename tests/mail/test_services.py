"""Every port on which somebody is served, in its own protocol, the refusals beside; and a message's whole way."""

import imaplib
import poplib
import smtplib
import socket
import ssl
import statistics
import time
from pathlib import Path

import pytest

from tests.stack.accounts import OTHER, PASSWORD, STRANGER, Account
from tests.stack.mail import PRIMARY_DOMAIN, MailStack

ALICE, CAROL = f"alice@{PRIMARY_DOMAIN}", f"carol@{OTHER}"


@pytest.fixture
def homes(account: Account) -> list[Path]:
    return [account(ALICE), account(CAROL)]


@pytest.mark.parametrize("name", ["submissions_port", "imaps_port", "pop3s_port"])
def test_tls_from_the_first_octet(stack: MailStack, name: str) -> None:
    greetings = {"submissions_port": b"220 ", "imaps_port": b"* OK ", "pop3s_port": b"+OK "}
    with (
        socket.create_connection(("127.0.0.1", getattr(stack.settings, name)), 10, (STRANGER, 0)) as plain,
        stack.tls.wrap_socket(plain, server_hostname=stack.file.hostname) as client,
    ):
        assert client.recv(100).startswith(greetings[name])
        assert client.version() == "TLSv1.3"


@pytest.mark.parametrize("name", ["submissions_port", "imaps_port", "pop3s_port"])
def test_no_old_tls(stack: MailStack, name: str) -> None:
    old = ssl.create_default_context(cafile=str(stack.ca_file))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with (
        socket.create_connection(("127.0.0.1", getattr(stack.settings, name)), 10, (STRANGER, 0)) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version|unexpected.eof"),
    ):
        old.wrap_socket(plain, server_hostname=stack.file.hostname).recv(1)


@pytest.mark.parametrize("name", ["smtp_port", "submission_port"])
def test_starttls_of_smtp_shows_the_certificate(stack: MailStack, name: str) -> None:
    port = getattr(stack.settings, name)
    with smtplib.SMTP("127.0.0.1", port, source_address=(STRANGER, 0), timeout=10) as client:
        assert client.starttls(context=stack.tls)[0] == 220
        assert client.ehlo()[0] == 250
    strange = ssl.create_default_context()  # knows other authorities
    with smtplib.SMTP("127.0.0.1", port, source_address=(STRANGER, 0), timeout=10) as client:
        with pytest.raises(ssl.SSLCertVerificationError):
            client.starttls(context=strange)
        client.close()


@pytest.mark.parametrize(("login", "box"), [("alice", 0), (ALICE, 0), (CAROL, 1)])
def test_imap_after_starttls(stack: MailStack, homes: list[Path], login: str, box: int) -> None:
    assert stack.send((ALICE, CAROL)[box]) == 250
    stack.wait_for_mail(homes[box])
    with imaplib.IMAP4("127.0.0.1", stack.settings.imap_port, timeout=10) as imap:
        imap.starttls(stack.tls)
        imap.login(login, PASSWORD)
        assert imap.select("INBOX")[1] == [b"1"]


@pytest.mark.parametrize(
    "login", ["carol", f"alice@{OTHER}", "alice@localhost", "nobody", "", "*", "alice*carol", f"carol@{PRIMARY_DOMAIN}"]
)
def test_imap_knows_nobody_else(stack: MailStack, homes: list[Path], login: str) -> None:
    with pytest.raises(imaplib.IMAP4.error):
        stack.imap(login, PASSWORD)


@pytest.mark.parametrize("login", ["alice", ALICE, CAROL])
def test_pop3(stack: MailStack, homes: list[Path], login: str) -> None:
    pop3 = stack.pop3(login, PASSWORD)
    assert pop3.stat()[0] == 0
    pop3.quit()
    with pytest.raises(poplib.error_proto, match="AUTH"):
        stack.pop3(login, "wrong")


def test_pop3_is_not_there_in_the_clear(stack: MailStack) -> None:
    with socket.create_connection(("127.0.0.1", stack.settings.pop3s_port), 10, (STRANGER, 0)) as client:
        client.sendall(b"USER alice\r\nPASS x\r\n")
        assert b"+OK" not in client.recv(100)


@pytest.mark.parametrize("name", ["lmtp_port", "quota_port", "policy_port", "from_port"])
def test_inner_ports_are_for_this_host(stack: MailStack, name: str) -> None:
    """They listen on 127.0.0.1, and on no other address, not even of loopback."""
    port = getattr(stack.settings, name)
    socket.create_connection(("127.0.0.1", port), 10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 10)


def test_rspamd_listens_on_no_port(stack: MailStack) -> None:
    for path in Path(f"/proc/{stack.rspamd.pid}/fd").iterdir():
        link = str(path.readlink())
        assert not link.startswith("socket:") or link not in tcp_sockets()


def tcp_sockets() -> set[str]:
    lines = [*Path("/proc/net/tcp").read_text().splitlines()[1:], *Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return {f"socket:[{line.split()[9]}]" for line in lines if line.split()[3] == "0A"}


def test_quota_from_the_row(stack: MailStack, account: Account) -> None:
    account(ALICE)
    home = account(f"small@{PRIMARY_DOMAIN}", quota=20_000)
    assert stack.send(f"small@{PRIMARY_DOMAIN}", body="x" * 70 + "\n") == 250
    stack.wait_for_mail(home)
    for client, sender in ((stack.smtp(), "s@example.net"), (stack.submission(ALICE, PASSWORD), ALICE)):
        with client:
            client.mail(sender, ["size=30000"])
            code, text = client.rcpt(f"small@{PRIMARY_DOMAIN}")
            assert (code, text[:5]) == (552, b"5.2.2")


def test_from_smtp_to_imap(stack: MailStack, homes: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Each message on the same two connections, rspamd and the From question in between."""
    times = []
    with stack.submission(ALICE, PASSWORD) as smtp, stack.imap(CAROL, PASSWORD) as imap:
        imap.select("INBOX")
        for number in range(1, 31):
            began = time.perf_counter()
            smtp.sendmail(ALICE, [CAROL], f"From: {ALICE}\r\nSubject: {number}\r\n\r\nx\r\n")
            while imap.select("INBOX")[1] != [str(number).encode()]:
                pass
            times.append((time.perf_counter() - began) * 1000)
    with capsys.disabled():
        print(f" [SMTP to IMAP: p50 {statistics.median(times):.1f} ms, worst {max(times):.1f} ms]", end="")
