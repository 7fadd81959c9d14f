"""What Dovecot is answered: what counts as a guess, for whom, from where and how long; and who may ask."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import insert, select

from app.config import ApiSettings
from app.credentials.policy_key import load_policy_key
from app.credentials.tokens import KeysUnusable
from app.db import Database
from app.main import create_app
from app.models.app_passwords import app_passwords
from app.models.login_failures import login_failures
from tests.conftest import PRIMARY, Clock
from tests.routers.accounts import make_user

pytestmark = pytest.mark.asyncio

KEY = "k" * 40
URL = "/dovecot/auth-policy"
ALICE = f"alice@{PRIMARY}"
HERE, THERE = "192.0.2.1", "198.51.100.1"
SHARED = "203.0.113.7"


@pytest.fixture
def settings(settings: ApiSettings, scratch: Path) -> ApiSettings:
    path = scratch / "policy.key"
    path.write_text(KEY + "\n")
    path.chmod(0o640)
    changed = {"auth_policy_key_file": path, "shared_sources": "203.0.113.0/24, 2001:db8:5::/48"}
    return settings.model_copy(update=changed)


class Dovecot:
    """Asks as Dovecot does: before, and once more after a right password; then it reports."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def send(self, command: str, **said: Any) -> int:
        answer = await self.client.post(f"{URL}?command={command}", json=said)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
        assert answer.json()["msg"] == ""
        return int(answer.json()["status"])

    async def allow(self, login: str = ALICE, remote: str = HERE, pwhash: str = "000") -> int:
        return await self.send("allow", login=login, remote=remote, pwhash=pwhash)

    async def fail(self, login: str = ALICE, remote: str = HERE, pwhash: str = "000") -> int:
        """A wrong password: the answer before it is looked at."""
        status = await self.allow(login, remote, pwhash)
        said = {"login": login, "remote": remote, "pwhash": pwhash, "success": False, "policy_reject": status < 0}
        await self.send("report", **said)
        return status

    async def guess(self, count: int, login: str = ALICE, remote: str = HERE, *, first: int = 1) -> list[int]:
        return [await self.fail(login, remote, f"{number:03x}") for number in range(first, first + count)]

    async def sign_in(self, login: str = ALICE, remote: str = HERE, pwhash: str = "fff", **said: str) -> int:
        for _ in range(2):
            if (status := await self.allow(login, remote, pwhash)) < 0:
                break
        report = {"login": login, "remote": remote, "pwhash": pwhash, "policy_reject": status < 0, **said}
        await self.send("report", **report, success=status >= 0)
        return status


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    headers = {"X-API-Key": KEY}
    async with httpx.AsyncClient(transport=transport, base_url="http://mail.cacert.test", headers=headers) as client:
        yield client


@pytest_asyncio.fixture
async def dovecot(visitor: httpx.AsyncClient, client: httpx.AsyncClient) -> Dovecot:
    await make_user(client, "alice")
    return Dovecot(visitor)


async def rows(database: Database) -> list[Any]:
    async with database.read.connect() as connection:
        return list(await connection.execute(select(login_failures).order_by(login_failures.c.id)))


async def test_ten_guesses_are_slowed_more_and_more_and_then_refused(dovecot: Dovecot, seeded: Database) -> None:
    assert await dovecot.guess(12) == [0, 0, 0, 1, 2, 4, 8, 15, 15, 15, -1, -1]
    assert await dovecot.sign_in() == -1, "now the right one does not help either"
    assert await dovecot.sign_in(remote=THERE) == 0, "but the owner gets in elsewhere"
    counted = [row for row in await rows(seeded) if row.network == f"{HERE}/32"]
    assert (len(counted), {row.login for row in counted}) == (10, {ALICE}), "what was refused is not counted again"


async def test_a_refusal_ends_when_the_guesses_leave_the_window(dovecot: Dovecot, clock: Clock) -> None:
    await dovecot.guess(5)
    clock.forward(minutes=30)
    await dovecot.guess(5, first=6)
    assert await dovecot.allow() == -1
    clock.forward(minutes=29)
    assert await dovecot.allow() == -1
    clock.forward(minutes=1)
    assert await dovecot.allow() == 4, "five are left"
    clock.forward(minutes=30)
    assert await dovecot.allow() == 0


async def test_a_stale_phone_is_one_guess_and_slowed_and_never_refused(dovecot: Dovecot, seeded: Database) -> None:
    answers = [await dovecot.fail(pwhash="01d") for _ in range(60)]
    assert answers[:11] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert set(answers[30:]) == {5}
    (row,) = await rows(seeded)
    assert (row.attempts, row.guess) == (60, "01d")
    assert await dovecot.sign_in() == 5, "behind the same router the owner waits a little"
    assert await dovecot.sign_in(remote=THERE) == 0


async def test_a_success_clears_nothing(dovecot: Dovecot) -> None:
    await dovecot.guess(9)
    assert await dovecot.sign_in() == 15
    assert await dovecot.sign_in(remote=THERE) == 0
    await dovecot.guess(1, first=10)
    assert await dovecot.sign_in() == -1


async def test_a_login_has_one_form_whatever_is_written(dovecot: Dovecot, seeded: Database) -> None:
    variants = [ALICE, ALICE.upper(), "alice", "Alice", f"alice+x@{PRIMARY}", f"ALICE+Y@{PRIMARY}", "alice+z"]
    for number in range(10):
        await dovecot.fail(variants[number % len(variants)], pwhash=f"{number:03x}")
    assert {row.login for row in await rows(seeded)} == {ALICE}
    for login in variants:
        assert await dovecot.sign_in(login) == -1, login


async def test_one_network_that_tries_many_logins_is_refused(dovecot: Dovecot) -> None:
    for number in range(40):
        assert await dovecot.fail(f"user{number}@{PRIMARY}", pwhash="001") >= 0
    assert await dovecot.fail(f"user99@{PRIMARY}") == -1
    assert await dovecot.sign_in() == -1
    assert await dovecot.sign_in(remote=THERE) == 0


async def test_the_owner_gets_in_from_where_the_owner_signs_in_while_the_world_guesses(dovecot: Dovecot) -> None:
    assert await dovecot.sign_in(remote=THERE) == 0
    for number in range(100):
        await dovecot.fail(remote=f"10.0.{number}.1", pwhash=f"{number:03x}")
    assert await dovecot.fail(remote="10.1.0.1", pwhash="abc") == -1, "guesses from everywhere are bounded too"
    assert await dovecot.sign_in(remote=HERE) == -1
    assert await dovecot.sign_in(remote=THERE) == 0
    assert await dovecot.guess(10, remote=THERE) == [0, 0, 0, 1, 2, 4, 8, 15, 15, 15]
    assert await dovecot.sign_in(remote=THERE) == -1, "being known there is no licence to guess there"


async def test_guesses_from_everywhere_are_slowed_before(dovecot: Dovecot) -> None:
    for number in range(33):
        await dovecot.fail(remote=f"10.0.{number}.1", pwhash=f"{number:03x}")
    assert await dovecot.allow(pwhash="fff") == 8


async def test_a_known_network_is_forgotten_after_two_weeks(dovecot: Dovecot, clock: Clock) -> None:
    await dovecot.sign_in(remote=THERE)
    clock.forward(days=15)
    for number in range(100):
        await dovecot.fail(remote=f"10.0.{number}.1", pwhash=f"{number:03x}")
    assert await dovecot.sign_in(remote=THERE) == -1


async def test_a_known_network_stays_known_by_daily_use_and_costs_one_row(
    dovecot: Dovecot, clock: Clock, seeded: Database
) -> None:
    for _ in range(20):
        clock.forward(days=1, seconds=1)
        for _ in range(3):
            assert await dovecot.sign_in() == 0
    (row,) = await rows(seeded)
    assert (row.guess, row.attempts) == ("known", 1)
    assert (clock.now - row.last_at).total_seconds() < 1


async def test_a_shared_source_is_counted_by_login_only(dovecot: Dovecot) -> None:
    for number in range(200):
        assert await dovecot.fail(f"user{number}@{PRIMARY}", SHARED, "001") == 0, "the whole town behind one address"
    assert await dovecot.guess(99, remote="203.0.113.99", first=1) == [0] * 30 + [1, 2, 4, 8] + [15] * 65
    assert await dovecot.fail(remote=SHARED, pwhash="abc") == 15
    assert await dovecot.sign_in(remote="2001:db8:5:1::7") == -1, "all shared sources count as one"
    assert await dovecot.sign_in(f"bob@{PRIMARY}", SHARED) == 0


async def test_guesses_from_elsewhere_close_no_webmail(dovecot: Dovecot) -> None:
    for number in range(100):
        await dovecot.fail(remote=f"10.0.{number}.1", pwhash=f"{number:03x}")
    assert await dovecot.sign_in(remote=SHARED) == 0


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
async def test_networks(dovecot: Dovecot, first: str, second: str, same: bool) -> None:
    await dovecot.guess(10, remote=first)
    assert (await dovecot.allow(remote=second) == -1) is same


async def test_guesses_on_their_way_count(dovecot: Dovecot, clock: Clock, seeded: Database) -> None:
    """A thousand connections at once: none has been reported when the last one asks."""
    answers = [await dovecot.allow(pwhash=f"{number:03x}") for number in range(100)]
    assert [status >= 0 for status in answers] == [True] * 10 + [False] * 90
    assert await dovecot.allow(remote=THERE) >= 0
    assert await rows(seeded) == []
    # One of them is the right one. The others have been reported by then, and Dovecot asks again before it lets in.
    for number in range(1, 10):
        await dovecot.send(
            "report", login=ALICE, remote=HERE, pwhash=f"{number:03x}", success=False, policy_reject=False
        )
    assert await dovecot.allow(pwhash="000") == 15
    await dovecot.send("report", login=ALICE, remote=HERE, pwhash="000", success=False, policy_reject=False)
    assert await dovecot.allow(pwhash="fff") == -1
    clock.forward(minutes=61)
    assert await dovecot.allow(pwhash="fff") == 0


async def test_a_login_that_is_never_reported_about_is_forgotten(dovecot: Dovecot, clock: Clock) -> None:
    for number in range(10):
        await dovecot.allow(pwhash=f"{number:03x}")
    assert await dovecot.allow(pwhash="fff") == -1
    clock.forward(seconds=61)
    assert await dovecot.allow(pwhash="fff") == 0


async def test_one_password_on_many_connections_is_one_guess(dovecot: Dovecot) -> None:
    assert [await dovecot.allow(pwhash="fff") for _ in range(200)] == [0] * 200


STRANGE = [
    "hunter2 is my password",
    f"My-Secret-1@{PRIMARY}",
    "hunter2",
    "é" * 20,
    "ａｌｉｃｅ",
    f"al\0ice@{PRIMARY}",
    "x" * 10_000,
    "a\nb",
    "'; DROP TABLE users; --",
    "\ud800",
    f"@{PRIMARY}",
    "+",
    "alice@",
]


@pytest.mark.parametrize("login", STRANGE)
async def test_a_login_that_is_none_of_ours_is_kept_as_a_hash(dovecot: Dovecot, seeded: Database, login: str) -> None:
    body = f'{{"login": {json.dumps(login)}, "remote": "{HERE}", "pwhash": "PW", "success": false}}'
    for command, pwhash in [("allow", "001"), ("report", "001")] + [("report", f"{n:03x}") for n in range(2, 11)]:
        answer = await dovecot.client.post(
            f"{URL}?command={command}",
            content=body.replace("PW", pwhash).encode(),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 200
    kept = await rows(seeded)
    if "\\ud800" in body:  # no character: what is no text names nobody
        assert {row.login for row in kept} <= {""}
        return
    assert len(kept) == 10
    assert len({row.login for row in kept}) == 1
    assert kept[0].login.startswith("~")
    assert len(kept[0].login) == 33
    assert login[:4] not in kept[0].login
    assert await dovecot.allow(login) == -1
    assert await dovecot.allow() >= 0


async def test_without_a_login_only_the_network_counts(dovecot: Dovecot) -> None:
    await dovecot.guess(20, "")
    assert await dovecot.allow("", THERE) == 0
    await dovecot.guess(20, "", first=30)
    assert await dovecot.allow("") == -1
    assert await dovecot.allow() == -1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"login": 1, "remote": [], "pwhash": {}}', b'{"remote": "nonsense"}']
)
@pytest.mark.parametrize("command", ["allow", "report"])
async def test_nonsense_from_a_mail_host_is_answered(visitor: httpx.AsyncClient, body: bytes, command: str) -> None:
    answer = await visitor.post(f"{URL}?command={command}", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (200, {"status": 0, "msg": ""})


@pytest.mark.parametrize("given", [{"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"X-API-Key": KEY + "x"}, None])
async def test_another_key_is_refused(visitor: httpx.AsyncClient, given: dict[str, str] | None) -> None:
    if given is None:
        del visitor.headers["X-API-Key"]
    answer = await visitor.post(f"{URL}?command=allow", json={}, headers=given or {})
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")


@pytest.mark.parametrize(
    ("peer", "networks", "status"),
    [
        ("127.0.0.1", "127.0.0.0/8", 200),
        ("::ffff:127.0.0.1", "127.0.0.0/8", 200),
        ("192.0.2.1", "127.0.0.0/8", 403),
        ("192.0.2.1", "127.0.0.0/8, 192.0.2.1", 200),
        ("::1", "::1", 200),
        ("127.0.0.1", "", 403),
        ("nonsense", "0.0.0.0/0, ::/0", 403),
    ],
)
async def test_only_from_the_networks_of_the_settings(
    settings: ApiSettings, seeded: Database, peer: str, networks: str, status: int
) -> None:
    app = create_app(settings.model_copy(update={"auth_policy_networks": networks}))
    transport = httpx.ASGITransport(app, client=(peer, 1))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://x", headers={"X-API-Key": KEY}) as client,
    ):
        assert (await client.post(f"{URL}?command=allow", json={})).status_code == status


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
async def test_nothing_that_came_through_a_proxy(visitor: httpx.AsyncClient, header: str) -> None:
    answer = await visitor.post(f"{URL}?command=allow", json={}, headers={header: "127.0.0.1"})
    assert answer.status_code == 403


async def test_it_is_off_without_a_key(settings: ApiSettings, seeded: Database) -> None:
    app = create_app(settings.model_copy(update={"auth_policy_key_file": None}))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers={"X-API-Key": KEY}) as client:
        assert (await client.post(f"{URL}?command=allow", json={})).status_code == 404
    await app.state.service.database.close()


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("short", 0o600, "one line"),
        ("k" * 40 + "\nmore", 0o600, "one line"),
        ("k k" * 20, 0o600, "one line"),
        (KEY, 0o644, "alone"),
        (None, 0o600, "No such file"),
    ],
)
async def test_a_key_file_that_will_not_do(scratch: Path, text: str | None, mode: int, says: str) -> None:
    path = scratch / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(KeysUnusable, match=says) as raised:
        load_policy_key(path)
    assert "kkk" not in str(raised.value)


async def test_a_lost_database_is_said_at_once(settings: ApiSettings) -> None:
    app = create_app(settings)
    await app.state.service.database.close()

    async def never(*args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(30)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers={"X-API-Key": KEY}) as client:
        object.__setattr__(app.state.service.database, "reading", never)
        answer = await client.post(f"{URL}?command=allow", json={"login": ALICE})
    assert answer.status_code == 503


async def test_the_last_use_of_an_app_password_is_noted_once_a_minute(
    dovecot: Dovecot, seeded: Database, clock: Clock
) -> None:
    row = {"user_id": 1, "name": "phone", "secret_hash": "0" * 64, "imap": True, "pop3": True, "smtp": True}
    async with seeded.write.begin() as connection:
        await connection.execute(insert(app_passwords), {**row, "sieve": False, "created_at": clock.now})

    async def used() -> Any:
        async with seeded.read.connect() as connection:
            return (await connection.execute(select(app_passwords))).one()

    await dovecot.fail(pwhash="001")
    assert (await used()).last_used_at is None
    first = clock.now
    await dovecot.sign_in(app_password_id="1")
    assert ((await used()).last_used_at, (await used()).last_used_from) == (first, HERE)
    clock.forward(seconds=59)
    await dovecot.sign_in(remote=THERE, app_password_id="1")
    assert ((await used()).last_used_at, (await used()).last_used_from) == (first, HERE)
    clock.forward(seconds=1)
    await dovecot.sign_in(remote=THERE, app_password_id="1")
    assert ((await used()).last_used_at, (await used()).last_used_from) == (clock.now, THERE)
    for strange in ("", "x", "-1", "²", "9" * 30, "77"):
        await dovecot.sign_in(app_password_id=strange)
