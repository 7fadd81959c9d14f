"""`cacert-mail policy`, as Postfix and rspamd see it: the real process, real sockets, both databases."""

import json
import socket
import subprocess
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from app.config import PolicySettings
from app.db import Database, utc_now
from app.models.aliases import sender_rules
from app.models.jobs import applied
from app.models.users import users
from app.workers.policy.loop import MAX_CONNECTIONS, MAX_REQUEST
from app.workers.policy.senders import MAX_BLOCK
from tests.cli.test_commands import cacert_mail
from tests.conftest import TestDatabase
from tests.stack.mariadb import MariaDB
from tests.stack.processes import wait_until
from tests.workers.policy.questions import PORT, question
from tests.workers.policy.site import Policy, everything, people, policy, running

pytestmark = pytest.mark.asyncio
__all__ = ["people", "policy"]
only_sqlite = pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
only_mariadb = pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)

MAY_NOT = "550 5.7.1 This account may not send mail. Ask the administrators of your mail server."
AGAIN = "421 4.7.0 This session has ended: your access was changed, or this server restarted. Sign in again."
NONE_OF_OURS = "This account may not send mail. Ask the administrators of your mail server."
FULL = "450 4.7.1 You may write to 3 recipients an hour, and have. Try again in 60 minutes."


# Postfix


async def test_who_may_send(policy: Policy) -> None:
    """And the answers come in the order of the questions."""
    logins = ["alice", "ALICE", "carol", "dora", "zoe", "nobody", "pr"]
    asked = [question(f"{name}@cacert.test") for name in logins]
    odd = [
        "",
        "alice",
        "alice@",
        "älice@cacert.test",
        "alice@cacert.test' OR 1=1 -- ",
        "a" * 3000,
        "alice@cacert.test ",
    ]
    expected = ["DUNNO"] * 2 + [MAY_NOT] * 5 + ["DUNNO"] + [MAY_NOT] * 6
    assert policy.ask(*asked, *map(question, odd)) == expected
    assert policy.ask(*(question(f"{name}@cacert.test", state="DATA") for name in logins)) == expected[:7]


async def test_a_limit_of_the_account_and_no_recipient_twice(policy: Policy) -> None:
    def bob(recipient: str, instance: str = "1", state: str = "RCPT") -> bytes:
        return question("bob@cacert.test", recipient, instance=instance, state=state)

    assert policy.ask(bob("a@x.test"), bob("a@x.test"), bob("b@x.test"), bob("", state="DATA")) == ["DUNNO"] * 4
    assert policy.ask(bob("a@x.test"), bob("a@x.test", "2"), bob("c@x.test", "2")) == ["DUNNO", "DUNNO", FULL]
    assert policy.ask(bob("b@x.test"), bob("c@x.test"), bob("", state="END-OF-MESSAGE")) == ["DUNNO", FULL, "DUNNO"]
    assert policy.ask(question("alice@cacert.test")) == ["DUNNO"], "others are not held up"
    assert policy.log.count("send_limit_reached") == 1


async def test_the_limit_of_the_setting(people: dict[str, int], test_database: TestDatabase, scratch: Path) -> None:
    asked = [question("alice@cacert.test", f"r{n}@x.test", instance="i") for n in range(3)]
    with running(test_database, scratch, RECIPIENTS_PER_HOUR="1") as policy:
        full = "450 4.7.1 You may write to 1 recipient an hour, and have. Try again in 60 minutes."
        assert policy.ask(*asked) == ["DUNNO", full, full]
    with running(test_database, scratch, RECIPIENTS_PER_HOUR="0") as policy:
        assert policy.ask(*asked, question("bob@cacert.test")) == [MAY_NOT] * 3 + ["DUNNO"]
    assert PolicySettings().recipients_per_hour == 200


async def test_a_suspended_account_ends_at_once(policy: Policy, seeded: Database, people: dict[str, int]) -> None:
    with policy.connect() as session:
        for state, answer in (("active", "DUNNO"), ("suspended", MAY_NOT), ("active", "DUNNO")):
            async with seeded.write.begin() as connection:
                await connection.execute(update(users).where(users.c.id == people["alice"]).values(state=state))
            session.sendall(question("alice@cacert.test"))
            assert session.recv(200) == f"action={answer}\n\n".encode()
    async with seeded.write.begin() as connection:
        await connection.execute(update(users).where(users.c.id == people["alice"]).values(state="suspended"))
    assert policy.ask_from("alice@cacert.test", "From: alice@cacert.test\r\n") == NONE_OF_OURS


# Sessions from before access was ended


ALL_STEPS = ("MAIL", "RCPT", "DATA", "END-OF-MESSAGE", "ETRN", "")


async def test_a_connection_is_noted_and_asked_for_no_login(policy: Policy) -> None:
    """By its port; XCLIENT of a proxy begins it too. Whoever did not sign in is no matter of ours."""
    for state, port in (("CONNECT", 1), ("XCLIENT", 2)):
        assert policy.ask(question("nobody@cacert.test", state=state, port=port)) == ["DUNNO"]
    for client, answer in (("1", "DUNNO"), ("2", "DUNNO"), ("3", AGAIN), ("0", AGAIN), ("unknown", AGAIN)):
        asked = [question("alice@cacert.test", state=state, port=client, instance="1") for state in ALL_STEPS]
        assert policy.ask(*asked) == [answer] * len(ALL_STEPS), client
        assert policy.ask(question("", port=client)) == ["DUNNO"]
    assert '"why": "unknown connection"' in policy.log


async def test_a_session_from_before_sends_nothing_more(
    policy: Policy, seeded: Database, worker_database: Database, people: dict[str, int]
) -> None:
    alice, ended = people["alice"], datetime(2026, 11, 24, 10, 0, 0, 7, tzinfo=UTC)

    def answers(port: int) -> set[str]:
        asked = [question("alice@cacert.test", state=state, port=port, instance="1") for state in ALL_STEPS]
        return set(policy.ask(*asked))

    async def carried_out(ended: datetime, flushed: str) -> None:
        result = {"access_ended_at": ended.isoformat(), "flushed_at": flushed}
        async with worker_database.write.begin() as connection:
            changed = update(applied).where(applied.c.subject_id == alice).values(result=result)
            await connection.execute(changed)

    assert answers(PORT) == {"DUNNO"}
    async with seeded.write.begin() as connection:
        await connection.execute(update(users).where(users.c.id == alice).values(access_ended_at=ended))
    assert answers(PORT) == {AGAIN}, "the host has not carried it out"
    await carried_out(ended - timedelta(microseconds=1), utc_now().isoformat())
    policy.ask(question("", state="CONNECT", port=2))
    assert answers(2) == {AGAIN}, "an earlier one was"
    await carried_out(ended, utc_now().isoformat())
    policy.ask(question("", state="CONNECT", port=3))
    assert [answers(port) for port in (PORT, 2, 3)] == [{AGAIN}, {AGAIN}, {"DUNNO"}]
    assert policy.ask(question("bob@cacert.test")) == ["DUNNO"], "others are not touched"


async def test_a_row_that_is_none_is_its_owners_alone(
    people: dict[str, int], worker_database: Database, test_database: TestDatabase, scratch: Path
) -> None:
    async with worker_database.write.begin() as connection:
        changed = update(applied).where(applied.c.subject_id == people["alice"])
        await connection.execute(changed.values(result={"flushed_at": "long ago"}))
    with running(test_database, scratch) as policy, policy.connect() as one, policy.connect() as other:
        for _ in range(3):
            one.sendall(question("alice@cacert.test"))
            other.sendall(question("bob@cacert.test", instance="1"))
            assert one.recv(300).startswith(b"action=451 4.3.0 ")
            assert other.recv(300) == b"action=DUNNO\n\n"
        assert "row_refused" in policy.log


async def test_many_at_once_share_a_query(policy: Policy) -> None:
    """Each gets the answer about its own login, whoever else asks."""
    logins = ["alice", "bob", "carol", "nobody", "zoe", "alice"] * 20
    clients = [policy.connect() for _ in logins]
    for _ in range(5):
        for client, name in zip(clients, logins, strict=True):
            client.sendall(question(f"{name}@cacert.test", state="MAIL"))
        for client, name in zip(clients, logins, strict=True):
            expected = "DUNNO" if name in ("alice", "bob") else MAY_NOT
            assert client.recv(200) == f"action={expected}\n\n".encode(), name
    for client in clients:
        client.close()


HOSTILE_QUESTIONS = [
    (b"\n\n", 0),
    (b"\n", 0),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\n\n", 0),
    (b"request=smtpd_access_policy\nno attribute\n\n", 0),
    (b"request=smtpd_access_policy\n=x\n\n", 0),
    (b"request=junk\n\n", 0),
    (b"sasl_username=alice@cacert.test\n\n", 0),
    (question("alice@cacert.test")[:-1], 0),
    (question("alice@cacert.test") + b"request=smtpd_acc", 1),
    (question("alice@cacert.test") + b"junk\n\n" + question("alice@cacert.test"), 1),
    (b"request=smtpd_access_policy\nx=" + b"x" * MAX_REQUEST + b"\n\n", 0),
    (question("alice@cacert.test") * 2 + b"x=" + b"x" * 1_000_000, 2),
    (b"\xff\x00\xfe=\x80\n" + question("alice@cacert.test"), 1),
    (question("\x1b[31malice\x00@cacert.test\r", "\xff\x00"), 1),
    (b"request=smtpd_access_policy\n\n", 1),
]
"""And how many of each are answered."""


@only_sqlite
async def test_hostile_questions_end_a_connection_and_nothing_else(policy: Policy) -> None:
    for sent, answers in HOSTILE_QUESTIONS:
        assert len(policy.ask(sent)) == answers, sent[:200]
        assert policy.ask(question("alice@cacert.test", instance="i")) == ["DUNNO"], sent[:200]
    assert "\x1b" not in policy.log


@only_sqlite
async def test_thousands_of_questions_at_once_and_one_octet_at_a_time(policy: Policy) -> None:
    many = b"".join(question("alice@cacert.test", instance="i", recipient=f"r{n % 100}") for n in range(3000))
    assert policy.ask(many) == ["DUNNO"] * 3000
    with policy.connect() as slow:
        for octet in question("alice@cacert.test", instance="i", recipient="r1"):
            slow.sendall(bytes([octet]))
        assert slow.recv(100) == b"action=DUNNO\n\n"


@only_sqlite
@pytest.mark.parametrize("door", ["policy", "from"])
async def test_slow_ones_are_sent_away(
    people: dict[str, int], test_database: TestDatabase, scratch: Path, door: str
) -> None:
    patch = "import app.workers.policy.loop as loop; loop.IDLE_SECONDS = 0.3; loop.SLOW_SECONDS = 0.2"
    with running(test_database, scratch, patch=patch) as policy:
        port = {"policy": policy.policy_port, "from": policy.from_port}[door]
        halves = {
            "policy": [b"", b"r", question("alice@cacert.test")[:-1]],
            "from": [b"", b"POST", b"POST /from HTTP/1.1\r\nX-Login: a\r\nContent-Length: 9\r\n\r\nFrom: a"],
        }
        for half in halves[door]:
            with policy.connect(port=port) as client:
                client.sendall(half)
                assert everything(client) == b""
        assert wait_until(lambda: policy.log.count("too slow, or idle") == 3), policy.log
        assert policy.stop() == 0
        assert "Traceback" not in policy.log


@only_sqlite
async def test_who_asks_and_never_reads_is_sent_away(
    people: dict[str, int], test_database: TestDatabase, scratch: Path
) -> None:
    # A small buffer of the kernel's, which otherwise holds some megabytes of answers; accepted sockets inherit it.
    patch = """
import socket
import app.cli.main as command
import app.workers.policy.loop as loop
def listen(*arguments, made=command.listen):
    (listener,) = made(*arguments)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return [listener]
command.listen = listen
loop.SLOW_SECONDS = 0.2
"""
    with running(test_database, scratch, patch=patch) as policy, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(10)
        deaf.connect(("127.0.0.1", policy.policy_port))
        with suppress(ConnectionError):
            deaf.sendall(b"request=smtpd_access_policy\n\n" * 20_000)
        assert wait_until(lambda: "too slow, or idle" in policy.log)
        assert policy.ask(question("alice@cacert.test")) == ["DUNNO"]


@only_sqlite
@pytest.mark.parametrize("door", ["policy", "from"])
async def test_too_many_are_refused_until_some_go(policy: Policy, door: str) -> None:
    port = {"policy": policy.policy_port, "from": policy.from_port}[door]
    held = [policy.connect(port=port) for _ in range(MAX_CONNECTIONS)]
    assert wait_until(lambda: everything_now(policy.connect(port=port)) == b"")
    for _ in range(20):
        assert everything_now(policy.connect(port=port)) == b""
    assert policy.log.count("too_many_connections") == 1
    if door == "policy":
        assert policy.ask_from("alice@cacert.test", GOOD) is None, "the other port is another matter"
    else:
        assert policy.ask(question("alice@cacert.test")) == ["DUNNO"]
    for client in held:
        client.close()
    assert wait_until(lambda: answers(policy, port))
    assert policy.ask_from("alice@cacert.test", GOOD) is None
    assert policy.ask(question("alice@cacert.test")) == ["DUNNO"]


def answers(policy: Policy, port: int) -> bool:
    """Whether a new connection stays open."""
    return everything_now(policy.connect(port=port)) is None


def everything_now(client: socket.socket) -> bytes | None:
    """None when the connection stays open."""
    client.settimeout(0.3)
    with client:
        try:
            return everything(client)
        except TimeoutError:
            return None


# rspamd


async def test_whose_from(policy: Policy) -> None:
    def ask(login: str, *lines: str) -> str | None:
        return policy.ask_from(f"{login}@cacert.test", "".join(f"{line}\r\n" for line in lines))

    accepted = [
        ("alice", ["From: Alice <ALICE@cacert.test>"]),
        ("alice", ["From: pr@cacert.test"]),
        ("alice", ["From: pr@cacert.test", "Sender: alice@cacert.test"]),
        ("alice", ["From: alice+list@cacert.test"]),
        ("alice", ["From: alice+a+b@cacert.test", "Reply-To: boss@cacert.test, x@example.org"]),
        ("alice", ["From: pr+a@cacert.test"]),
        ("alice", ["Resent-From: pr@cacert.test", "From: alice@cacert.test"]),
        ("ALICE", ["From: alice@cacert.test"]),
        ("bob", ["From: bob@cacert.test"]),
        ("zoe", ["From: zoe@cacert.test"]),
    ]
    for login, lines in accepted:
        assert ask(login, *lines) is None, lines
    own = "You may send as: alice@cacert.test, pr@cacert.test"
    for address in (
        "bob@cacert.test",
        "info@cacert.test",
        "bob+alice@cacert.test",
        "x@example.org",
        "alice@cacert.test.evil.test",
    ):
        assert ask("alice", f"From: {address}") == f"The From address {address} is not yours. {own}"
    for address in ("+alice@cacert.test", "al+ice@cacert.test", "alice-x@cacert.test", "alic@cacert.test"):
        assert ask("alice", f"From: {address}") == f"The From address {address} is not yours. {own}"
    assert ask("alice", "From: alice%x'\"@cacert.test") is not None
    assert ask("alice", "From: alice%x'@cacert.test") == f"The From address in it is not yours. {own}"
    for field in ("Sender", "Resent-From", "Resent-Sender"):
        refused = ask("alice", "From: alice@cacert.test", f"{field}: bob@cacert.test")
        assert refused == f"The {field} address bob@cacert.test is not yours. {own}"
    mine = "You may send as: bob@cacert.test"
    for address in ("pr@cacert.test", "postmaster@cacert.test", "alice@cacert.test"):
        assert ask("bob", f"From: {address}") == f"The From address {address} is not yours. {mine}"
    for login in ("carol", "dora", "nobody", "pr", "älice", "x' OR '1'='1"):
        if login.isascii():
            assert ask(login, f"From: {login}@cacert.test" if login.isalpha() else "From: a@b.test") == NONE_OF_OURS
    assert ask("alice", "From: alice@cacert.test", "From: bob@cacert.test") == (
        "The message has more than one From header field. Send it with one."
    )


async def test_a_designation_acts_at_once(policy: Policy, seeded: Database, people: dict[str, int]) -> None:
    assert policy.ask_from("alice@cacert.test", "From: pr@cacert.test") is None
    async with seeded.write.begin() as connection:
        await connection.execute(delete(sender_rules).where(sender_rules.c.user_id == people["alice"]))
    assert policy.ask_from("alice@cacert.test", "From: pr@cacert.test") == (
        "The From address pr@cacert.test is not yours. You may send as: alice@cacert.test"
    )


@only_sqlite
async def test_one_connection_many_questions(policy: Policy) -> None:
    connection = HTTPConnection("127.0.0.1", policy.from_port, timeout=10)
    for number in range(5):
        connection.request("POST", "/from", b"From: alice@cacert.test\n", {"x-login": "alice@cacert.test"})
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (200, {"action": "accept"}), number
    connection.close()
    asked = request(b"From: alice@cacert.test") + request(b"From: bob@cacert.test") + request(b"", "Connection: close")
    with policy.connect(port=policy.from_port) as client:
        client.sendall(asked + request(b"From: alice@cacert.test"))
        answers = everything(client)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 3, "pipelined; and the last said that it is the last"
    assert answers.index(b"accept") < answers.index(b"bob@cacert.test is not yours") < answers.index(b"has no From")


def request(body: bytes, *more: str, length: int | None = None, line: str = "POST /from HTTP/1.1") -> bytes:
    lines = [line, "X-Login: alice@cacert.test", f"Content-Length: {len(body) if length is None else length}", *more]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


GOOD = b"From: alice@cacert.test"


HOSTILE_REQUESTS = [
    (b"\r\n\r\n", 400),
    (b"request=smtpd_access_policy\n\n\r\n\r\n", 400),
    (request(GOOD, line="POST /from HTTP/1.0"), 400),
    (request(GOOD, line="POST /from"), 400),
    (request(GOOD, line="post /from HTTP/1.1"), 400),
    (request(GOOD, line="POST  /from HTTP/1.1"), 400),
    (request(GOOD, line="POST http://127.0.0.1/from HTTP/1.1"), 400),
    (request(GOOD, line="GET /from HTTP/1.1"), 405),
    (request(GOOD, line="POST /from/ HTTP/1.1"), 404),
    (request(GOOD, line="POST /from?x HTTP/1.1"), 404),
    (request(GOOD, "X-Login: bob@cacert.test"), 400),
    (request(GOOD, "x-login: alice@cacert.test"), 400),
    (request(GOOD, "Content-Length: 5"), 400),
    (request(GOOD, "Transfer-Encoding: chunked"), 411),
    (request(GOOD, "X-A: b", " folded"), 400),
    (request(GOOD, "X-A : b"), 400),
    (request(GOOD, "no field"), 400),
    (request(GOOD, "X-A: \xff"), 400),
    (request(GOOD, "X-A: a\nX-Login: b"), 400),
    (request(GOOD, "X-A: a\x00"), 400),
    (request(GOOD, "X-A: a\rb"), 400),
    (request(GOOD, length=-1), 411),
    (request(GOOD, length=99999999999), 411),
    (request(GOOD).replace(b"Content-Length: 23", b"Content-Length: 0x17"), 411),
    (request(GOOD).replace(b"Content-Length: 23", b"Content-Length: +23"), 411),
    (request(GOOD).replace(b"Content-Length: 23\r\n", b""), 411),
    (request(GOOD).replace(b"X-Login: alice@cacert.test\r\n", b""), 400),
    (request(GOOD).replace(b"alice@cacert.test\r\n", b"\r\n"), 400),
    (request(GOOD, length=100), None),
    (request(GOOD)[:40], None),
    (b"POST /from HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST + b"\r\n\r\n", None),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None),
]
"""And the status of the one answer, if there is any."""


@only_sqlite
async def test_hostile_requests_end_a_connection_and_nothing_else(policy: Policy) -> None:
    for sent, status in HOSTILE_REQUESTS:
        with policy.connect(port=policy.from_port) as client:
            client.sendall(sent if status is None else sent + request(GOOD))
            client.shutdown(socket.SHUT_WR)
            answer = everything(client)
        if status is None:
            assert answer == b"", sent[:200]
        else:
            assert answer.startswith(f"HTTP/1.1 {status} ".encode()), sent[:200]
            assert answer.count(b"HTTP/1.1") == 1, "what follows is not taken for a request"
            assert b"accept" not in answer
        assert policy.ask_from("alice@cacert.test", GOOD) is None


@only_sqlite
async def test_the_size_of_a_header(policy: Policy) -> None:
    start = b"From: alice@cacert.test\r\nX: "
    assert policy.ask_from("alice@cacert.test", start + b"x" * (MAX_BLOCK - len(start))) is None
    for size in (MAX_BLOCK + 1, 20_000_000):
        refused = policy.ask_from("alice@cacert.test", start + b"x" * (size - len(start)))
        assert refused == "The header of the message has more than 256 KiB. Write to fewer people at once."


@only_sqlite
async def test_nothing_from_outside_is_unescaped_in_the_log(policy: Policy, scratch: Path) -> None:
    login = "x\t\x1b[31m\n{}\x85"
    policy.ask(question(login, login))
    policy.ask(b"\x1b[31m\n\n")
    asked = f'POST /from HTTP/1.1\r\nX-Login: a\tb{{}}"\r\nContent-Length: {len(GOOD)}\r\n\r\n'.encode() + GOOD
    with policy.connect(port=policy.from_port) as client:
        client.sendall(asked)
        client.shutdown(socket.SHUT_WR)
        assert b"may not send" in everything(client)
    policy.ask_from("alice@cacert.test", b"From: \x1b[31m\xff")
    for line in policy.log.splitlines():
        assert line.isprintable()
        json.loads(line)


# The database


@only_mariadb
async def test_the_database_goes_and_comes_back(
    people: dict[str, int], test_database: TestDatabase, scratch: Path, mariadb: MariaDB
) -> None:
    with running(test_database, scratch) as policy:
        assert policy.ask(question("alice@cacert.test")) == ["DUNNO"]
        assert policy.ask_from("alice@cacert.test", GOOD) is None
        mariadb.stop()
        try:
            (away,) = policy.ask(question("bob@cacert.test"))
            assert away.startswith("451 4.3.0 ")
            with policy.connect(port=policy.from_port) as client:
                client.sendall(request(GOOD) * 2)
                client.shutdown(socket.SHUT_WR)
                assert everything(client).count(b"HTTP/1.1 503 ") == 2
            assert policy.ask_from("alice@cacert.test", b"From: a@b.test, c@d.test") is not None, "wants no database"
            assert wait_until(lambda: policy.ask(question("alice@cacert.test"))[0].startswith("451 "))
        finally:
            mariadb.restart()
        assert policy.ask(question("bob@cacert.test")) == ["DUNNO"]
        assert policy.ask_from("alice@cacert.test", GOOD) is None
        assert policy.log.count("database_away") == 1
        assert policy.log.count("database_back") == 1
        assert policy.stop() == 0
        assert "Traceback" not in policy.log


@only_mariadb
async def test_a_database_that_does_not_answer(
    people: dict[str, int], test_database: TestDatabase, scratch: Path, mariadb: MariaDB
) -> None:
    patch = "import app.workers.policy.rows as rows; rows.PATIENCE_SECONDS = 0.3"
    lock = subprocess.Popen(  # noqa: ASYNC220  nothing else runs in this loop
        [*mariadb.client("owner"), "--unbuffered", "cacertusers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert lock.stdin is not None
    assert lock.stdout is not None
    with lock, running(test_database, scratch, patch=patch) as policy:
        try:
            lock.stdin.write("LOCK TABLES users WRITE, applied WRITE; SELECT 'locked';\n")
            lock.stdin.flush()
            assert lock.stdout.readline() == "locked\n"
            asked = [question(f"{name}@cacert.test") for name in ("alice", "bob")]
            assert [answer[:4] for answer in policy.ask(*asked)] == ["451 ", "451 "]
        finally:
            lock.stdin.close()
            lock.wait()
        assert policy.ask(*asked) == ["DUNNO", "DUNNO"]


async def test_it_starts_without_a_database_and_not_without_a_schema(
    scratch: Path, people: dict[str, int], test_database: TestDatabase
) -> None:
    environment = {"POLICY_PORT": "1", "FROM_PORT": "1"}
    (scratch / "empty").mkdir()
    failed = cacert_mail("policy", at=scratch / "empty", **environment)
    assert (failed.returncode, failed.stderr) == (
        1,
        "The database has no schema of ours: run `cacert-mail db upgrade`.\n",
    )
    nowhere = "mysql+asyncmy://policy:hunter2@127.0.0.1:1/cacertusers"
    with running(test_database, scratch, DATABASE_URL=nowhere) as policy:
        assert policy.ask(question("alice@cacert.test"))[0].startswith("451 ")
        assert policy.stop() == 0
        assert "hunter2" not in policy.log


@only_sqlite
async def test_a_port_that_is_taken_is_named(policy: Policy, test_database: TestDatabase, scratch: Path) -> None:
    url = {"DATABASE_URL": test_database.url("policy")}
    for taken, free in (("POLICY_PORT", "FROM_PORT"), ("FROM_PORT", "POLICY_PORT")):
        failed = cacert_mail("policy", at=scratch, **url, **{taken: str(policy.policy_port), free: "31999"})
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"Port {policy.policy_port} on 127.0.0.1 is taken")
        assert f"{taken}= chooses another one." in failed.stderr


@only_sqlite
async def test_only_this_machine_is_listened_to(policy: Policy) -> None:
    for port in (policy.policy_port, policy.from_port):
        for address in ("127.0.0.2", "::1"):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), 5)


@only_sqlite
async def test_open_connections_do_not_keep_it_from_stopping(
    people: dict[str, int], test_database: TestDatabase, scratch: Path
) -> None:
    with (
        running(test_database, scratch) as policy,
        policy.connect() as idle,
        policy.connect(port=policy.from_port) as half,
    ):
        half.sendall(b"POST /from")
        idle.sendall(question("alice@cacert.test"))
        assert idle.recv(100) == b"action=DUNNO\n\n"
        assert policy.stop() == 0
        assert everything(idle) == b""
        assert "policy_stopped" in policy.log
        assert "Traceback" not in policy.log
