"""App passwords in Dovecot's own query, at IMAP, POP3 and submission. On rows and homes made by hand."""

import hashlib
import imaplib
import poplib
import re
import smtplib
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.stack.accounts import HASH, NOW, OTHER, PASSWORD, Account
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB

ALICE, BOB = f"alice@{PRIMARY_DOMAIN}", f"bob@{PRIMARY_DOMAIN}"
SECRET = "abcd-efgh-jkmn-pqrs-tuvw-xyz2-3456"
ANOTHER = "2345-6789-abcd-efgh-jkmn-pqrs-tuvw"
PROTOCOLS = ("imap", "pop3", "smtp", "sieve")

AppPassword = Callable[..., None]


@pytest.fixture
def app_password(mariadb: MariaDB) -> AppPassword:
    """Adds one to an account, as the API would."""

    def make(address: str, *protocols: str, secret: str = SECRET) -> None:
        allowed = ", ".join(f"{name} = {int(name in protocols)}" for name in PROTOCOLS)
        mariadb.sql(
            f"INSERT app_passwords SET user_id = (SELECT id FROM users WHERE address = '{address}'), name = 'x',"
            f" secret_hash = '{hashlib.sha256(secret.encode()).hexdigest()}', created_at = {NOW}, {allowed}",
            "owner",
        )

    return make


def refused(as_wrong: bool) -> bool:
    assert as_wrong, "not for the password's sake"
    return False


def imap(stack: MailStack, login: str = ALICE, password: str = SECRET) -> bool:
    try:
        stack.imap(login, password).logout()
    except imaplib.IMAP4.error as error:
        return refused("AUTHENTICATIONFAILED" in str(error))
    return True


def pop3(stack: MailStack, login: str = ALICE, password: str = SECRET) -> bool:
    try:
        stack.pop3(login, password).quit()
    except poplib.error_proto as error:
        return refused(b"[AUTH]" in error.args[0])
    return True


def smtp(stack: MailStack, login: str = ALICE, password: str = SECRET) -> bool:
    try:
        stack.submission(login, password).quit()
    except smtplib.SMTPAuthenticationError as error:
        return refused(error.smtp_code == 535)
    return True


LOGINS = {"imap": imap, "pop3": pop3, "smtp": smtp}


def asked(stack: MailStack, service: str, password: str = SECRET, login: str = ALICE) -> list[str] | None:
    """What Dovecot's authentication answers to a program of this protocol. None: refused."""
    argv: list[str] = ["doveadm", "-c", str(stack.dovecot_config), "auth", "test", "-x", f"service={service}"]
    done = subprocess.run([*argv, "--", login, password], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 77), done.stderr
    return done.stdout.partition("extra fields:")[2].split() if done.returncode == 0 else None


def at_once(function: Callable[..., Any], tries: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Dovecot takes half a second for each refusal, but looks at many side by side."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda each: function(*each), tries))


@pytest.mark.parametrize("allowed", [*((name,) for name in PROTOCOLS), ("imap", "smtp"), PROTOCOLS])
def test_each_protocol_that_it_is_for_and_no_other(
    stack: MailStack, account: Account, app_password: AppPassword, allowed: Iterable[str]
) -> None:
    account(ALICE)
    app_password(ALICE, *allowed)
    names = (*PROTOCOLS, "submission", "lmtp", "doveadm", "", "%s", "im'ap", "x' WHEN 'x' THEN 1 --")
    answers = at_once(asked, ((stack, name) for name in names))
    assert {name for name, answer in zip(names, answers, strict=True) if answer is not None} == set(allowed)
    opened = at_once(lambda login: login(stack), ((login,) for login in LOGINS.values()))
    assert opened == [name in allowed for name in LOGINS]
    assert all(login(stack, password=PASSWORD) for login in LOGINS.values()), "the account's own password"


def test_the_policy_report_can_tell_which(stack: MailStack, account: Account, app_password: AppPassword) -> None:
    account(ALICE)
    app_password(ALICE, "imap")
    app_password(ALICE, "imap", secret=ANOTHER)
    for _ in range(2):  # the second answer is a remembered one
        ids = []
        for password in (SECRET, ANOTHER):
            answer = asked(stack, "imap", password)
            assert answer is not None
            assert f"user={ALICE}" in answer
            ids += [field for field in answer if field.startswith("app_password_id=")]
        assert len(set(ids)) == 2
        own = asked(stack, "imap", PASSWORD)
        assert own is not None
        assert not any(field.startswith("app_password_id=") for field in own)


def test_of_this_account_alone(stack: MailStack, account: Account, app_password: AppPassword) -> None:
    account(ALICE)
    account(BOB)
    account(f"alice@{OTHER}")
    app_password(ALICE, *PROTOCOLS)
    for login in ("alice", "ALICE", ALICE.upper()):
        assert imap(stack, login)
    for login in (BOB, "bob", f"alice@{OTHER}", f"nobody@{PRIMARY_DOMAIN}", f"alice+x@{PRIMARY_DOMAIN}"):
        assert not any(at_once(lambda by, login=login: by(stack, login), [(imap,), (smtp,)]))
    others = (SECRET.upper(), SECRET.replace("-", ""), hashlib.sha256(SECRET.encode()).hexdigest())
    assert not any(at_once(imap, ((stack, ALICE, password) for password in others))), "the hash is no password"


def test_not_on_another_host(stack: MailStack, account: Account, app_password: AppPassword) -> None:
    account(ALICE, host="elsewhere")
    app_password(ALICE, *PROTOCOLS)
    assert asked(stack, "imap") is None


def test_an_account_without_a_password_of_its_own(
    mariadb: MariaDB, stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    account(ALICE)
    mariadb.sql("UPDATE users SET password_hash = NULL", "owner")
    app_password(ALICE, "imap")
    assert imap(stack)
    assert not pop3(stack)
    for password in (PASSWORD, "", "NULL", "{SHA256.HEX}"):
        assert not imap(stack, password=password)


@pytest.mark.parametrize(
    "end",
    [
        "state = 'suspended'",
        "state = 'deleted', state_before = 'active', deleted_at = created_at, purge_at = created_at",
    ],
)
def test_ends_with_the_account(
    mariadb: MariaDB, stack: MailStack, account: Account, app_password: AppPassword, end: str
) -> None:
    account(ALICE)
    app_password(ALICE, *PROTOCOLS)
    assert imap(stack)
    mariadb.sql(f"UPDATE users SET {end}", "owner")
    stack.doveadm("auth", "cache", "flush", ALICE)
    assert not any(login(stack) for login in LOGINS.values())


def test_a_successor_of_the_address_has_none_of_them(
    mariadb: MariaDB, stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    account(ALICE)
    app_password(ALICE, *PROTOCOLS)
    assert imap(stack)
    mariadb.sql(
        "UPDATE users SET state = 'deleted', state_before = 'active', deleted_at = created_at, purge_at = created_at;"
        "UPDATE applied SET stands = 0;"
        "INSERT users (id, address, local_part, domain_id, host, display_name, state, password_hash, version, created_at,"
        f" updated_at) SELECT 2, '{ALICE}', 'alice', domain_id, host, '', 'active', '{HASH}', 1, {NOW}, {NOW} FROM users;"
        "INSERT applied SELECT host, kind, 2, 1, 1, 1, proofs, result, applied_at FROM applied",
        "owner",
    )
    stack.doveadm("auth", "cache", "flush", ALICE)
    assert not any(login(stack) for login in LOGINS.values())
    assert all(login(stack, password=PASSWORD) for login in LOGINS.values())


def test_a_revoked_one_opens_nothing_from_then_on(
    mariadb: MariaDB, stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    account(ALICE)
    account(BOB)
    for secret in (SECRET, ANOTHER):
        app_password(ALICE, "imap", "smtp", secret=secret)
    assert all(imap(stack, password=each) and smtp(stack, password=each) for each in (SECRET, ANOTHER, PASSWORD))
    revoked = hashlib.sha256(SECRET.encode()).hexdigest()
    mariadb.sql(f"UPDATE app_passwords SET revoked_at = {NOW} WHERE secret_hash = '{revoked}'", "owner")
    assert not imap(stack)
    assert not smtp(stack)
    assert all(imap(stack, password=each) and smtp(stack, password=each) for each in (ANOTHER, PASSWORD))


def test_a_new_one_is_good_at_once(stack: MailStack, account: Account, app_password: AppPassword) -> None:
    """No refusal is remembered, not even for a moment, of what was tried before."""
    account(ALICE)
    for number in range(3):
        secret = f"{SECRET[:-1]}{number + 2}"
        app_password(ALICE, "imap", secret=secret)
        assert asked(stack, "imap", "a guess") is None
        assert asked(stack, "imap", ANOTHER) is None
        assert asked(stack, "imap", secret) is not None
        assert asked(stack, "imap", PASSWORD) is not None


HOSTILE = (
    "'",
    '"',
    "\\",
    "\\'",
    "' OR 1=1 -- ",
    "' UNION SELECT 1 -- ",
    "%",
    "%%",
    "%w",
    "%{sha256:password}",
    "%{sha256",
    "x" * 1000,
    "ü",
    "\u202e",
    "\x7f\x01",
    " ",
    "*",
    ";",
    "{SHA256.HEX}",
    "a;*;a;%{sha256:password};x",
    "????-????-????-????-????-????-????",
    "'bcd-efgh-jkmn-pqrs-tuvw-xyz2-3456",
    "\\bcd-efgh-jkmn-pqrs-tuvw-xyz2-345'",
    "%{0-efgh-jkmn-pqrs-tuvw-xyz2-345}",
    SECRET + ";",
    f" {SECRET}",
    f"{SECRET}\n",
)


def test_what_is_sent_as_a_password_harms_nothing(
    stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    account(ALICE)
    app_password(ALICE, "imap")
    before = len(stack.dovecot_log.read_text())
    asking = [(stack, service, password) for password in HOSTILE for service in ("imap", "smtp")]
    assert set(at_once(asked, asking)) == {None}
    for raw in (b"\xff\xfe\x80", b"\x00", b"a\x00b", b"\xc3", b"x" * 5000, SECRET.encode() + b"\x00"):
        with pytest.raises(imaplib.IMAP4.error):
            authenticate(stack, raw)
    assert imap(stack)
    assert imap(stack, password=PASSWORD)
    log = stack.dovecot_log.read_text()[before:]
    assert "Error" not in log, log
    assert SECRET not in stack.dovecot_log.read_text()


def authenticate(stack: MailStack, password: bytes) -> None:
    """AUTHENTICATE PLAIN with any octets."""
    with imaplib.IMAP4_SSL("127.0.0.1", stack.settings.imaps_port, ssl_context=stack.tls, timeout=10) as client:
        client.authenticate("PLAIN", lambda _: b"\x00" + ALICE.encode() + b"\x00" + password)


def test_no_hash_of_a_chosen_password_is_ever_sent_to_the_database(
    mariadb: MariaDB, stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    """A plain SHA-256 of what people choose can be guessed against, and a server may log what it is asked."""
    account(ALICE)
    app_password(ALICE, "imap")
    mariadb.sql("SET GLOBAL log_output = 'TABLE'; SET GLOBAL general_log = 1")
    try:
        for password in (PASSWORD, "a guess", SECRET, "seven-green-lanterns-over-the-harbour"):
            imap(stack, password=password)
    finally:
        mariadb.sql("SET GLOBAL general_log = 0; SET GLOBAL log_output = 'FILE'")
    asked = [row[0] for row in mariadb.sql("SELECT argument FROM mysql.general_log") if "secret_hash = " in row[0]]
    assert len(asked) >= 2
    assert sorted({re.findall("secret_hash = '([^']*)'", each)[0] for each in asked}) == [
        "",
        hashlib.sha256(SECRET.encode()).hexdigest(),
    ]


def test_no_login_is_remembered(stack: MailStack, account: Account, app_password: AppPassword) -> None:
    """A login that is half done while its password is replaced would put the old one back (decision 17)."""
    account(ALICE)
    app_password(ALICE, "imap")
    for password in (PASSWORD, SECRET, "a guess"):
        assert (asked(stack, "imap", password) is not None) == (password != "a guess")
    assert stack.doveadm("auth", "cache", "flush", ALICE).split()[0] == "0"


def test_sends_as_the_account_and_under_no_other_name(
    stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    account(ALICE)
    home = account(BOB)
    app_password(ALICE, "smtp")
    before = len(stack.mail_log.read_text())
    with stack.submission("alice", SECRET) as client:
        assert client.mail(BOB)[0] == 553
        client.rset()
        client.sendmail(ALICE, [BOB], f"From: {ALICE}\r\nTo: {BOB}\r\nSubject: x\r\n\r\nx\r\n")
        client.rset()
    stack.wait_for_mail(home)
    assert f"sasl_username={ALICE}\n" in stack.mail_log.read_text()[before:]


def test_one_indexed_read_however_many_there_are(
    mariadb: MariaDB, stack: MailStack, account: Account, app_password: AppPassword
) -> None:
    account(ALICE)
    app_password(ALICE, "imap")
    mariadb.sql(
        "INSERT app_passwords (user_id, name, secret_hash, imap, pop3, smtp, sieve, created_at)"
        f" SELECT 1, 'x', SHA2(seq, 256), 1, 1, 1, 1, {NOW} FROM seq_1_to_5000",
        "owner",
    )
    (query,) = [
        line.partition(" = ")[2]
        for line in (stack.dovecot_config.parent / "dovecot-sql.conf.ext").read_text().splitlines()
        if line.startswith("password_query = ")
    ]
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    query = re.sub(r"%\{if;.*;\}", digest, query).replace("%Lu", ALICE).replace("%Ls", "imap")
    assert "%" not in query
    [[user, password, number, _access]] = mariadb.sql(query, "dovecot")
    assert (user, password, number.isdigit()) == (ALICE, "{SHA256.HEX}" + digest, True)
    plan = {row[2]: (row[3], row[5]) for row in mariadb.sql(f"EXPLAIN {query}", "owner") if row[1] == "PRIMARY"}
    assert plan["p"] == ("const", "uq_app_passwords_secret_hash")
