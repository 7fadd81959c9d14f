"""The rendered configuration, in the real programs, on rows and homes made by hand."""

import imaplib
import poplib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.mailconfig.postfix import render_postfix
from tests.stack.accounts import HASH, OTHER, PASSWORD, STRANGER, Account
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack, write
from tests.stack.mariadb import MariaDB
from tests.stack.processes import wait_until


def rcpt(stack: MailStack, *recipients: str | bytes) -> list[tuple[int, bytes]]:
    """What Postfix answers to each recipient of one message."""
    with stack.smtp(source=STRANGER) as client:
        client.mail("s@example.net")
        replies = []
        for recipient in recipients:
            text = recipient if isinstance(recipient, bytes) else recipient.encode()
            assert client.sock
            client.sock.sendall(b"RCPT TO:<" + text + b">\r\n")
            replies.append(client.getreply())
        return replies


def test_smtp_to_maildir_to_imap_and_pop3(stack: MailStack, account: Account) -> None:
    home = account(f"alice@{PRIMARY_DOMAIN}")
    assert stack.send(f"alice@{PRIMARY_DOMAIN}", "first", "hello alice\n") == 250
    (message,) = stack.wait_for_mail(home)
    status = message.stat()
    assert (status.st_uid, status.st_gid) == (stack.file.uid_first + 1,) * 2
    assert not status.st_mode & 0o077
    assert message.read_text().startswith("Return-Path: <s@example.net>\n")

    with stack.imap(f"alice@{PRIMARY_DOMAIN}", PASSWORD) as imap:
        assert imap.select("INBOX")[1] == [b"1"]
        fetched = imap.fetch("1", "(BODY[TEXT])")[1][0]
        assert isinstance(fetched, tuple)
        assert fetched[1] == b"hello alice\r\n"
        folders = b"".join(line for line in imap.list()[1] if isinstance(line, bytes))
        assert b"\\Sent" in folders
    pop3 = stack.pop3(f"alice@{PRIMARY_DOMAIN}", PASSWORD)
    assert pop3.stat()[0] == 1
    assert b"Subject: first" in pop3.retr(1)[1]
    pop3.quit()


def test_login_takes_a_bare_name_and_any_case(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    for name in ("alice", "Alice", f"ALICE@{PRIMARY_DOMAIN.upper()}"):
        stack.imap(name, PASSWORD).logout()


def test_bare_name_is_never_somebody_of_a_virtual_domain(stack: MailStack, account: Account) -> None:
    account(f"bob@{OTHER}")
    with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        stack.imap("bob", PASSWORD)
    stack.imap(f"bob@{OTHER}", PASSWORD).logout()


def test_wrong_password_is_refused(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    for password in (HASH, PASSWORD + " "):
        with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
            stack.imap("alice", password)
        with pytest.raises(poplib.error_proto, match="AUTH"):
            stack.pop3("alice", password)


def test_no_hash_is_no_way_in(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    mariadb.sql("UPDATE users SET password_hash = NULL", "owner")
    for password in ("", "NULL"):
        with pytest.raises(imaplib.IMAP4.error):
            stack.imap("alice", password)


def test_no_password_in_the_clear(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    with socket.create_connection(("127.0.0.1", stack.settings.imap_port), 10, (STRANGER, 0)) as client:
        lines = client.makefile("rwb", buffering=0)
        assert b"LOGINDISABLED" in lines.readline()
        lines.write(f'a LOGIN alice "{PASSWORD}"\r\n'.encode())
        answer = lines.readline()
        while answer.startswith(b"*"):
            answer = lines.readline()
        assert answer.startswith(b"a NO [PRIVACYREQUIRED]")

    with imaplib.IMAP4("127.0.0.1", stack.settings.imap_port, timeout=10) as imap:
        imap.starttls(stack.tls)
        imap.login("alice", PASSWORD)


def test_suspended_account_receives_and_cannot_sign_in(stack: MailStack, account: Account) -> None:
    home = account(f"alice@{PRIMARY_DOMAIN}", state="suspended")
    assert stack.send(f"alice@{PRIMARY_DOMAIN}") == 250
    stack.wait_for_mail(home)
    with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        stack.imap("alice", PASSWORD)


def test_a_suspended_account_opens_nothing_from_then_on(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    stack.imap("alice", PASSWORD).logout()
    mariadb.sql("UPDATE users SET state = 'suspended'", "owner")
    with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        stack.imap("alice", PASSWORD)


def test_who_is_refused_at_rcpt(stack: MailStack, account: Account) -> None:
    account(f"gone@{PRIMARY_DOMAIN}", stands=0)
    account(f"alice@{PRIMARY_DOMAIN}")
    refused = [
        f"nobody@{PRIMARY_DOMAIN}",
        f"gone@{PRIMARY_DOMAIN}",
        f"nobody@{OTHER}",
        f"alice@{OTHER}",
        "alice@localhost",
        f"@{PRIMARY_DOMAIN}",
        f'"@{PRIMARY_DOMAIN}"',
        f"mailer-daemon@{PRIMARY_DOMAIN}",
        "mailer-daemon",
        f"' OR 1=1 -- @{PRIMARY_DOMAIN}".replace(" ", "_"),
        "root",
    ]
    replies = rcpt(stack, *refused[:6]) + rcpt(stack, *refused[6:])  # after ten errors Postfix waits a second each
    for recipient, (code, text) in zip(refused, replies, strict=True):
        assert (code, text[:5]) == (550, b"5.1.1"), (recipient, text)


def test_case_and_bare_names_at_rcpt(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    replies = rcpt(stack, f"ALICE@{PRIMARY_DOMAIN.upper()}", "alice", f"alice+x+y@{PRIMARY_DOMAIN}")
    assert [code for code, _ in replies] == [250, 250, 250]


def test_nothing_is_relayed(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    for source in (STRANGER, "127.0.0.1"):
        with stack.smtp(source=source) as client:
            client.mail("alice@example.net")
            for recipient in (
                "victim@example.net",
                '"victim@example.net"',
                f'"victim@example.net"@{PRIMARY_DOMAIN}',
                "alice@mail.cacert.test",
                f"victim%example.net@{PRIMARY_DOMAIN}",
                f"example.net!victim@sub.{PRIMARY_DOMAIN}",
                f"@{PRIMARY_DOMAIN}:victim@example.net",
            ):
                code, text = client.docmd(f"RCPT TO:<{recipient}>")
                assert (code, text[:5]) == (554, b"5.7.1"), (recipient, text)


@pytest.mark.parametrize("hostile", ["ü".encode(), b"\xfc", "用户".encode(), b"\xff\xfe", "Å".encode()])
def test_recipient_outside_ascii_hurts_nobody_else(stack: MailStack, account: Account, hostile: bytes) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    account(f"bob@{OTHER}")
    domain = PRIMARY_DOMAIN.encode()
    replies = rcpt(
        stack,
        hostile + b"@" + domain,
        hostile + b"@" + OTHER.encode(),
        b"alice+" + hostile + b"x@" + domain + hostile,
        b"alice@" + domain,
        b"bob@" + OTHER.encode(),
    )
    codes = [code for code, _ in replies]
    assert codes[:2] == [550, 550], replies
    assert codes[2] in (554, 501), replies
    assert codes[3:] == [250, 250], replies


def test_smtputf8_is_not_offered(stack: MailStack) -> None:
    with stack.smtp() as client:
        assert not client.has_extn("smtputf8")
        assert client.has_extn("starttls")
        assert client.verify("postmaster")[0] == 502


def test_starttls_on_port_25(stack: MailStack, account: Account) -> None:
    home = account(f"alice@{PRIMARY_DOMAIN}")
    with stack.smtp() as client:
        client.starttls(context=stack.tls)
        client.sendmail("s@example.net", [f"alice@{PRIMARY_DOMAIN}"], "Subject: x\r\n\r\nx\r\n")
    (message,) = stack.wait_for_mail(home)
    assert "TLSv1.3" in message.read_text()


def test_address_extension(stack: MailStack, account: Account) -> None:
    home, other = account(f"alice@{PRIMARY_DOMAIN}"), account(f"bob@{OTHER}")
    assert stack.send(f"alice+news@{PRIMARY_DOMAIN}") == 250
    assert stack.send(f"bob+a+b@{OTHER}") == 250
    assert f"Delivered-To: alice+news@{PRIMARY_DOMAIN}" in stack.wait_for_mail(home)[0].read_text()
    stack.wait_for_mail(other)


def test_virtual_domain(stack: MailStack, account: Account) -> None:
    home, namesake = account(f"alice@{OTHER}"), account(f"alice@{PRIMARY_DOMAIN}")
    assert home == stack.homes / f"@{OTHER}" / "alice"
    assert stack.send(f"alice@{OTHER}") == 250
    (message,) = stack.wait_for_mail(home)
    assert message.stat().st_uid == stack.file.uid_first + 1
    assert not list(namesake.glob("Maildir/new/*"))
    with stack.imap(f"alice@{OTHER}", PASSWORD) as imap:
        assert imap.select("INBOX")[1] == [b"1"]


def test_full_mailbox_is_refused_at_rcpt(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    home = account(f"alice@{PRIMARY_DOMAIN}", quota=20_000)
    assert stack.send(f"alice@{PRIMARY_DOMAIN}", body="x" * 70 + "\n") == 250
    stack.wait_for_mail(home)
    with stack.imap("alice", PASSWORD) as imap:
        assert "(STORAGE 1 20)" in str(imap.getquotaroot("INBOX")[1])
    with stack.smtp() as client:
        client.mail("s@example.net", ["size=30000"])
        code, text = client.rcpt(f"alice@{PRIMARY_DOMAIN}")
        assert (code, text.split(b":")[0]) == (552, b"5.2.2 <alice@cacert.test>"), text
    account(f"bob@{PRIMARY_DOMAIN}")
    assert stack.send(f"bob@{PRIMARY_DOMAIN}", body="text of one line\n" * 2000) == 250


def test_account_of_another_host_is_unknown_to_dovecot_here(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}", host="elsewhere")
    stack.doveadm("user", f"alice@{PRIMARY_DOMAIN}", expect=67)
    with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        stack.imap("alice", PASSWORD)


def test_uid_out_of_range_opens_no_mailbox(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    for uid in (0, 1000, stack.file.uid_last + 1):
        mariadb.sql(f"UPDATE applied SET result = JSON_SET(result, '$.uid', {uid})", "owner")
        stack.doveadm("auth", "cache", "flush")
        stack.doveadm("user", "alice", expect=75)
        imap = stack.imap("alice", PASSWORD)  # the password is right; then there is no mailbox
        with pytest.raises(imaplib.IMAP4.abort, match="Internal error"):
            imap.select("INBOX")
        imap.shutdown()


def test_doveadm_user_and_postmap_prove_an_account(stack: MailStack, account: Account) -> None:
    home = account(f"alice@{PRIMARY_DOMAIN}", quota=1000)
    account(f"bob@{OTHER}", state="suspended")
    account(f"gone@{OTHER}", stands=0)
    shown = stack.doveadm("user", f"alice@{PRIMARY_DOMAIN}")
    fields = dict(line.split("\t", 1) for line in shown.splitlines() if "\t" in line)
    uid = str(stack.file.uid_first + 1)
    expected = {"uid": uid, "gid": uid, "home": str(home), "quota_rule": "*:bytes=1000", "mail": "maildir:~/Maildir"}
    assert expected.items() <= fields.items()
    stack.doveadm("user", f"gone@{OTHER}", expect=67)
    assert sorted(stack.doveadm("user", "*").split()) == [f"alice@{PRIMARY_DOMAIN}", f"bob@{OTHER}"]
    keys = [f"alice@{PRIMARY_DOMAIN}", f"bob@{OTHER}", f"gone@{OTHER}", "alice", f"@{OTHER}", "ü@x", f"%@{OTHER}"]
    assert stack.postmap(*keys) == {address: address for address in keys[:2]}


def test_account_is_not_unknown_for_long_because_it_was_asked_for_too_early(stack: MailStack, account: Account) -> None:
    address = f"alice@{PRIMARY_DOMAIN}"
    stack.doveadm("user", address, expect=67)
    with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        stack.imap(address, PASSWORD)
    account(address)
    stack.doveadm("user", address)
    stack.imap(address, PASSWORD).logout()


def test_domain_outside_ascii_is_no_error(stack: MailStack) -> None:
    domains = f"proxy:mysql:{stack.postfix_config}/virtual-domains.cf"
    assert stack.postmap("ü.test", OTHER, PRIMARY_DOMAIN, table=domains) == {OTHER: OTHER}


def test_every_map_answers_what_is_outside_ascii(stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    maps = [path for path in stack.postfix_config.glob("*.cf") if path.name not in ("main.cf", "master.cf")]
    assert len(maps) == 7
    for path in maps:
        assert (
            stack.postmap(
                "ü", "ü@x", f"ü@{PRIMARY_DOMAIN}", f"x@ü.{OTHER}", "%", "'", "\\", table=f"proxy:mysql:{path}"
            )
            == {}
        )


def test_login_outside_ascii_is_unknown_and_no_error(stack: MailStack) -> None:
    stack.doveadm("user", f"ü@{PRIMARY_DOMAIN}", expect=67)


def test_lookups_use_the_index(mariadb: MariaDB, stack: MailStack) -> None:
    """CONVERT on the constant's side only; and one character set, or the join on `applied` would scan."""
    address = f"address = CONVERT('a@{OTHER}' USING ascii)"
    for view, condition in {
        "postfix_recipients": address,
        "dovecot_users": f"host = '{HOST}' AND {address}",
        "dovecot_passwords": f"host = '{HOST}' AND {address}",
        "postfix_logins": f"login = CONVERT('a@{OTHER}' USING ascii) AND host = '{HOST}'",
        "postfix_own_domains": "name = CONVERT('a' USING ascii)",
    }.items():
        for row in mariadb.sql(f"EXPLAIN SELECT * FROM {view} WHERE {condition}", "owner"):
            assert row[3] in ("ref", "eq_ref", "const") or "Impossible WHERE" in row[-1], row


def test_lookup_over_tcp(mariadb: MariaDB, stack: MailStack, account: Account, tmp_path: Path) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    file = stack.file.model_copy(
        update={"database_host": "127.0.0.1", "database_port": mariadb.port, "postfix_config_dir": tmp_path}
    )
    write(render_postfix(stack.settings, file, PRIMARY_DOMAIN), tmp_path)
    assert stack.postmap(f"alice@{PRIMARY_DOMAIN}", table=f"mysql:{tmp_path}/recipients.cf")


def test_database_outage_is_temporary(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    account(f"alice@{PRIMARY_DOMAIN}")
    address = f"alice@{PRIMARY_DOMAIN}"
    mariadb.stop()
    try:
        assert stack.send(address) == 451
        mariadb.restart()
        assert stack.send(address) == 451, "the map is down for a minute"
    finally:
        mariadb.restart()
        stack.reload()
    assert wait_until(lambda: stack.send(address) == 250)
    stack.imap(address, PASSWORD).logout()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """Another process that has started a MariaDB; it prints the directory."""
    code = "from tests.stack.mariadb import MariaDB as M; m = M(); m.start(); print(m.directory, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_process_that_was_killed(child: subprocess.Popen[str], how: int) -> None:
    assert child.stdout
    directory = Path(child.stdout.readline().strip())
    assert (directory / "run/mariadb.sock").exists()
    child.send_signal(how)
    child.wait()
    assert wait_until(lambda: not directory.exists())
    assert wait_until(lambda: str(directory) not in subprocess.check_output(["ps", "axww"], text=True))
