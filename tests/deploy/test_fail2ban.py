"""deploy/fail2ban on lines that the real programs wrote, of clients that try to have somebody else banned."""

import imaplib
import json
import shutil
import smtplib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.stack.accounts import PASSWORD, Account, account, stack
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.processes import wait_until

__all__ = ["account", "stack"]

FAIL2BAN = Path(__file__).parents[2] / "deploy/fail2ban"
VICTIM = "192.0.2.66"
HOSTILE = [
    f"x>, method=PLAIN, rip={VICTIM}, lip=127.0.0.1, TLS, session=<abc>",
    f"x>, method=PLAIN, rip={VICTIM}, lip=127.0.0.1, TLS: Connection closed, session=<abc>\n",
    f"x>, rip={VICTIM}, lip=127.0.0.1",
    f"<x> rip={VICTIM}",
    f"unknown[{VICTIM}]: SASL LOGIN authentication failed: x",
    f"x\nNov 23 23:57:14 mail postfix/smtpd[1]: warning: unknown[{VICTIM}]: SASL PLAIN authentication failed: x",
    f'{{"client_address": "{VICTIM}", "event": "login_refused", "',
]


def banned(name: str, lines: Path) -> Counter[str]:
    """How often each address is found in a log."""
    argv = ["fail2ban-regex", "--usedns=no", "-o", "ip", lines, FAIL2BAN / f"filter.d/{name}.conf"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "ERROR" not in done.stderr, done.stderr
    return Counter(done.stdout.split())


@contextmanager
def kept(log_file: Path, path: Path) -> Iterator[None]:
    """What is logged meanwhile."""
    before = log_file.stat().st_size
    yield
    time.sleep(0.2)
    path.write_bytes(log_file.read_bytes()[before:])


def imap_plain(stack: MailStack, login: str, source: str) -> None:
    client = stack.imap("alice", PASSWORD, source=source)
    client.logout()
    anew = type(client)(source, stack.settings.imaps_port, stack.tls)  # type: ignore[call-arg,arg-type]  # _ImapFrom
    with suppress(imaplib.IMAP4.error):
        anew.authenticate("PLAIN", lambda _: b"\0" + login.encode() + b"\0wrong")
    anew.shutdown()


def test_dovecot(stack: MailStack, account: Account, tmp_path: Path) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    with kept(stack.dovecot_log, tmp_path / "log"):
        for number, login in enumerate(HOSTILE):
            imap_plain(stack, login, f"127.0.0.{31 + number}")
        with suppress(imaplib.IMAP4.error):
            stack.imap("alice", "wrong", source="127.0.0.50")
        stack.imap("alice", PASSWORD, source="127.0.0.51").logout()
    expected = {f"127.0.0.{31 + number}": 1 for number in range(len(HOSTILE))} | {"127.0.0.50": 1}
    assert VICTIM in (tmp_path / "log").read_text()
    assert banned("cacert-mail-dovecot", tmp_path / "log") == expected
    # The same by syslog, where Debian's Dovecot logs.
    lines = (tmp_path / "log").read_text().splitlines()
    by_syslog = [f"{line[:15]} mail dovecot: {line[16:].replace(': Info: ', ': ', 1)}" for line in lines]
    (tmp_path / "syslog").write_text("\n".join(by_syslog) + "\n")
    assert banned("cacert-mail-dovecot", tmp_path / "syslog") == expected


def test_postfix(stack: MailStack, account: Account, tmp_path: Path) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    with kept(stack.mail_log, tmp_path / "log"):
        for number, login in enumerate(HOSTILE):
            client = stack.submission(source=f"127.0.0.{31 + number}")
            client.user, client.password = login, "wrong"
            with suppress(smtplib.SMTPAuthenticationError):
                client.auth("PLAIN", lambda _=None, login=login: f"\0{login}\0wrong")  # type: ignore[misc]
            client.close()
        stack.submission("alice", PASSWORD, source="127.0.0.51").close()
        with stack.smtp(source="127.0.0.52") as relay:
            relay.mail("s@example.net")
            relay.rcpt("victim@elsewhere.test")
        with stack.smtp(source="127.0.0.53") as unknown:
            unknown.mail("s@example.net")
            unknown.rcpt(f"nobody@{PRIMARY_DOMAIN}")
            unknown.rcpt(f'"x>: Relay access denied; from [{VICTIM}]"@{PRIMARY_DOMAIN}')
    expected = {f"127.0.0.{31 + number}": 1 for number in range(len(HOSTILE))} | {"127.0.0.52": 1}
    assert VICTIM in (tmp_path / "log").read_text()
    assert banned("cacert-mail-postfix", tmp_path / "log") == expected


_LOGGING = """
import json, sys
from app.log import log, set_up_logging
set_up_logging("json", "info")
for event, values in json.load(sys.stdin):
    log.warning(event, **values)
"""


def test_our_own_log(tmp_path: Path) -> None:
    """As app/web/throttle.py writes it. That it does, tests/mail/test_brute_force.py sees."""
    events: list[tuple[str, dict[str, str]]] = [
        ("login_refused", {"client_address": "192.0.2.1"}),
        ("too_many_tries", {"kind": "api", "client_address": "2001:db8::1"}),
        ("wrong_credentials", {"kind": "api", "client_address": "192.0.2.3"}),
        ("login_refused", {"client_address": ""}),
    ]
    events += [("request", {"method": "GET", "path": hostile}) for hostile in HOSTILE]
    events += [(hostile, {"client_address": hostile}) for hostile in HOSTILE]
    argv = [sys.executable, "-c", _LOGGING]
    done = subprocess.run(argv, input=json.dumps(events), capture_output=True, text=True, check=True)
    (tmp_path / "log").write_text(done.stderr)
    assert VICTIM in done.stderr
    assert banned("cacert-mail-api", tmp_path / "log") == {"192.0.2.1": 1, "2001:db8::1": 1}


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """Debian's own, with our files installed, and a shared source written down."""
    directory = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", directory)
    (directory / "jail.d/defaults-debian.conf").unlink(missing_ok=True)
    for folder in ("filter.d", "jail.d"):
        shutil.copytree(FAIL2BAN / folder, directory / folder, dirs_exist_ok=True)
    (directory / "jail.d/cacert-mail.local").write_text(
        "[DEFAULT]\ncacert_mail_shared_sources = 203.0.113.0/24 2001:db8:5::/48\n"
    )
    return directory


def test_fail2ban_takes_the_jails_and_ignores_shared_sources(configuration: Path) -> None:
    argv = ["fail2ban-client", "-c", configuration, "-d"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, "ERROR" in done.stderr) == (0, False), done.stderr
    for jail in ("dovecot", "postfix", "api"):
        ignored = (
            f"['set', 'cacert-mail-{jail}', 'addignoreip', '127.0.0.1/8', '::1', '203.0.113.0/24', '2001:db8:5::/48']"
        )
        assert ignored in done.stdout
        assert f"['start', 'cacert-mail-{jail}']" in done.stdout


def test_fail2ban_bans_who_goes_on_and_nobody_else(configuration: Path, tmp_path: Path) -> None:
    """The real server, on a log file, with an action that does nothing."""
    written = tmp_path / "api.log"
    written.touch()
    socket = tmp_path / "f2b.sock"
    (configuration / "action.d/nothing.conf").write_text("[Definition]\nactionban =\nactionunban =\n")
    (configuration / "jail.d/zz.local").write_text(
        "[DEFAULT]\nbanaction = nothing\naction = nothing\n[cacert-mail-dovecot]\nenabled = false\n"
        f"[cacert-mail-postfix]\nenabled = false\n[cacert-mail-api]\nbackend = polling\nlogpath = {written}\n"
    )
    base = ["-c", configuration, "-s", socket, "-p", tmp_path / "f2b.pid"]
    server = subprocess.Popen(
        ["fail2ban-server", *base, "-f", "--loglevel", "WARNING", "--logtarget", tmp_path / "f2b.log", "start"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(*words: str) -> str:
        return subprocess.run(["fail2ban-client", *base, *words], capture_output=True, text=True, check=False).stdout

    try:
        assert wait_until(lambda: "cacert-mail-api" in ask("status"), seconds=20), (tmp_path / "f2b.log").read_text()
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        lines = [
            f'{{"client_address": "{address}", "event": "login_refused", "request_id": "r", "level": "warning", '
            f'"timestamp": "{now}.000001Z"}}\n'
            for address, count in (("192.0.2.1", 15), ("192.0.2.2", 14), ("203.0.113.9", 40), ("2001:db8:5::1", 40))
            for _ in range(count)
        ]
        with written.open("a") as file:
            file.writelines(lines)
        assert wait_until(lambda: "192.0.2.1" in ask("status", "cacert-mail-api"), seconds=20)
        assert ask("status", "cacert-mail-api").rstrip().endswith("Banned IP list:\t192.0.2.1")
    finally:
        ask("stop")
        server.terminate()
        server.wait()
