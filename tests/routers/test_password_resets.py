"""Links that set a password without the old one: who gets one, what is told, how often it works."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import event, select, update

from app.config import ApiSettings
from app.credentials.links import load_link_key, token_hash
from app.credentials.passwords import password_matches
from app.db import Database
from app.models.app_passwords import app_passwords
from app.models.audit_events import audit_events
from app.models.idempotency_keys import idempotency_keys
from app.models.jobs import jobs
from app.models.login_failures import login_failures
from app.models.notices import notices
from app.models.password_resets import password_resets
from app.models.users import users
from app.permissions import Role
from tests.conftest import PRIMARY, Clock, TestDatabase, anonymous
from tests.routers.accounts import ALICE, BOB, credentials_of, make_user

pytestmark = pytest.mark.asyncio

NEW = "seven green lanterns over the harbour"
OTHER = "eleven brown foxes below the bridge"
HASH = "{ARGON2ID}$argon2id$v=19$m=8192,t=1,p=1$c2FsdHNhbHRzYWx0c2FsdA$DYFAS5QpLBm0KKZKwM8bR4MwmUEyJ3tqXkmOc1rbzAM"
CONTACT = "alice@example.net"
Client = httpx.AsyncClient


@pytest_asyncio.fixture
async def website(api: FastAPI, seeded: Database) -> AsyncIterator[Client]:
    async with anonymous(api) as made:
        made.auth = await credentials_of(seeded, Role.WEBSITE)
        yield made


@pytest_asyncio.fixture
async def limited(api: FastAPI, seeded: Database) -> AsyncIterator[Client]:
    async with anonymous(api) as made:
        made.auth = await credentials_of(seeded, Role.LIMITED)
        yield made


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[Client]:
    async with anonymous(api) as made:
        yield made


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def one(database: Database, query: Any) -> Any:
    (row,) = await rows(database, query)
    return row


async def make_alice(client: Client, **members: Any) -> dict[str, Any]:
    return await make_user(client, "alice", **{"contact_address": CONTACT, "password_hash": HASH, **members})


async def shown_link(client: Client, user: str | int = ALICE) -> str:
    body = {"user": user, "reason": "Called", "deliver": "show"}
    answer = await client.post("/v1/password-resets", json=body)
    assert answer.status_code == 202, answer.text
    link: str = answer.json()["link"]
    return link


async def shown_token(client: Client, user: str | int = ALICE) -> str:
    return (await shown_link(client, user)).partition("#")[2]


async def confirm(visitor: Client, token: str, password: str = NEW, **members: Any) -> httpx.Response:
    return await visitor.post("/v1/password-resets/confirm", json={"token": token, "password": password, **members})


# --- asked for by a caller that must not learn who is there


async def _prepare(client: Client, database: Database, which: str) -> str | int:
    """What to ask for, so that there is no link, or one."""
    if which == "unknown":
        return f"nobody@{PRIMARY}"
    if which == "unknown id":
        return 987654
    if which == "another domain":
        return "alice@elsewhere.test"
    user = await make_alice(client, **({"contact_address": None} if which == "no contact address" else {}))
    if which == "suspended":
        await client.patch(f"/v1/users/{ALICE}", json={"state": "suspended"})
    elif which == "locked":
        await client.post(f"/v1/users/{ALICE}/lock")
    elif which in ("deleted", "deleted id"):
        await client.delete(f"/v1/users/{ALICE}")
        return int(user["id"]) if which == "deleted id" else ALICE
    elif which == "higher rank":
        await credentials_of(database, Role.SECONDARY, user_id=user["id"])
    return ALICE


NO_LINK = (
    "unknown",
    "unknown id",
    "another domain",
    "suspended",
    "locked",
    "deleted",
    "deleted id",
    "no contact address",
    "higher rank",
)


class Statements:
    """What is run on the database, without its values."""

    def __init__(self, database: Database) -> None:
        self.seen: list[str] = []
        for engine in (database.read, database.write):
            event.listen(engine.sync_engine, "before_cursor_execute", self._note)

    def _note(self, connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        self.seen.append(re.sub(r"\(\s*%s.*?\)|\(\?.*?\)", "(…)", statement))


@pytest.mark.parametrize("which", NO_LINK)
async def test_a_website_learns_nothing_and_the_same_is_done(
    api: FastAPI, client: Client, website: Client, seeded: Database, which: str
) -> None:
    await make_user(client, "bob", contact_address="bob@example.net")
    asked = await _prepare(client, seeded, which)
    body = {"user": BOB if isinstance(asked, str) else (await client.get(f"/v1/users/{BOB}")).json()["id"]}
    # What is read once in a while is read: who the caller is, and which domain is the primary one.
    await website.get("/v1/me")
    await api.state.service.throttle.count_request("anybody")
    statements = Statements(api.state.service.database)
    known = await website.post("/v1/password-resets", json=body)
    of_known = statements.seen.copy()
    statements.seen.clear()
    unknown = await website.post("/v1/password-resets", json={"user": asked})
    assert statements.seen == of_known
    assert len(of_known) >= 6

    assert known.status_code == unknown.status_code == 202
    assert known.content == unknown.content == b'{"accepted":true,"minutes":30}'
    told = [{name: v for name, v in answer.headers.items() if name != "x-request-id"} for answer in (known, unknown)]
    assert told[0] == told[1]
    assert {"location", "link", "etag"}.isdisjoint(told[0])

    of_bob, of_nobody = await rows(seeded, select(password_resets).order_by(password_resets.c.user_id.is_(None)))
    assert of_bob.user_id is not None
    assert of_nobody.user_id is None
    mails = await rows(seeded, select(notices).where(notices.c.kind == "reset").order_by(notices.c.id))
    assert [(mail.recipient, mail.user_id, mail.reset_id) for mail in mails] == [
        ("bob@example.net", of_bob.user_id, of_bob.id),
        (None, None, of_nobody.id),
    ]
    sending = await rows(
        seeded, select(jobs).where(jobs.c.kind == "mail.send", jobs.c.subject_id.in_([m.id for m in mails]))
    )
    assert [(job.host, job.subject_id, job.lane) for job in sending] == [
        ("-", mail.id, f"mail:{mail.id}") for mail in mails
    ]
    audited = await rows(
        seeded,
        select(audit_events).where(audit_events.c.action == "password-resets.create").order_by(audit_events.c.id),
    )
    assert [(entry.user_id, entry.after["user"], entry.after["reason"]) for entry in audited] == [
        (of_bob.user_id, body["user"], None),
        (None, asked, None),
    ]


async def test_it_is_shown_no_link(client: Client, website: Client, seeded: Database) -> None:
    await make_alice(client)
    answer = await website.post("/v1/password-resets", json={"user": ALICE, "deliver": "show", "reason": "x"})
    assert (answer.status_code, answer.json()["missing"]) == (403, "password-resets:write")
    assert await rows(seeded, select(password_resets)) == []


async def test_what_it_sends_twice_with_one_key_is_done_once(client: Client, website: Client, seeded: Database) -> None:
    await make_alice(client)
    for replayed in (None, "true"):
        answer = await website.post(
            "/v1/password-resets", json={"user": ALICE}, headers={"Idempotency-Key": "one wish".replace(" ", "-")}
        )
        assert (answer.status_code, answer.headers.get("idempotency-replayed")) == (202, replayed)
    assert len(await rows(seeded, select(password_resets))) == 1


@pytest.mark.parametrize("asked", [ALICE, f"nobody@{PRIMARY}"])
async def test_too_many_for_one_account_are_refused_alike(client: Client, website: Client, asked: str) -> None:
    await make_alice(client)
    answers = [await website.post("/v1/password-resets", json={"user": asked}) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [202] * 5 + [429]
    assert int(answers[-1].headers["retry-after"]) > 0


# --- asked for by a caller that sees


async def test_limited_sees_whose_link_it_is_and_where_it_goes(
    client: Client, limited: Client, seeded: Database, test_database: TestDatabase, clock: Clock
) -> None:
    user = await make_alice(client)
    answer = await limited.post("/v1/password-resets", json={"user": user["id"], "reason": "Called, knew her assurer"})
    assert (answer.status_code, answer.headers["cache-control"]) == (202, "no-store")
    body = answer.json()
    reset = await one(seeded, select(password_resets))
    assert answer.headers["location"] == f"/v1/password-resets/{reset.id}"
    assert body == {
        "id": str(reset.id),
        "kind": "reset",
        "state": "pending",
        "user": {"id": user["id"], "address": ALICE},
        "contact_address": "a•••@e•••.net",
        "deliver": "mail",
        "reason": "Called, knew her assurer",
        "requested_by": reset.principal_id,
        "mail": {"state": "waiting", "sent_at": None, "bounced_at": None, "detail": None},
        "created_at": "2026-11-23T12:00:00Z",
        "expires_at": "2026-11-23T12:30:00Z",
        "used_at": None,
        "cancelled_at": None,
        "link": None,
    }
    assert CONTACT not in answer.text
    assert (await limited.get(answer.headers["location"])).json() == body

    service = Database(test_database.url("service"))
    async with service.write.begin() as connection:
        told = {"sent_at": clock(), "bounced_at": clock() + timedelta(seconds=9), "bounce": f"550 <{CONTACT}> unknown"}
        await connection.execute(update(notices).values(**told))
    await service.close()
    mail = (await limited.get(answer.headers["location"])).json()["mail"]
    assert mail == {
        "state": "bounced",
        "sent_at": "2026-11-23T12:00:00Z",
        "bounced_at": "2026-11-23T12:00:09Z",
        "detail": None,
    }
    assert (await client.get(answer.headers["location"])).json()["mail"]["detail"] == f"550 <{CONTACT}> unknown"
    clock.forward(minutes=30)
    assert (await limited.get(answer.headers["location"])).json()["state"] == "expired"


@pytest.mark.parametrize(
    ("which", "status", "problem"),
    [
        ("unknown", 404, "not-found"),
        ("unknown id", 404, "not-found"),
        ("suspended", 409, "user-not-active"),
        ("locked", 409, "user-locked"),
        ("deleted", 404, "not-found"),
        ("deleted id", 409, "user-deleted"),
        ("no contact address", 409, "no-contact-address"),
        ("higher rank", 403, "outranked"),
    ],
)
async def test_limited_is_told_what_stands_in_the_way(
    client: Client, limited: Client, seeded: Database, which: str, status: int, problem: str
) -> None:
    asked = await _prepare(client, seeded, which)
    for deliver in ("mail", "show") if which != "no contact address" else ("mail",):
        answer = await limited.post("/v1/password-resets", json={"user": asked, "reason": "x", "deliver": deliver})
        assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{problem}")
    assert await rows(seeded, select(password_resets)) == []


async def test_those_who_see_say_why(client: Client, limited: Client) -> None:
    await make_alice(client)
    for caller in (client, limited):
        for reason in ({}, {"reason": None}, {"reason": ""}):
            answer = await caller.post("/v1/password-resets", json={"user": ALICE, **reason})
            assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/reason")


async def test_a_shown_link_is_shown_once_and_its_owner_is_told(
    client: Client, limited: Client, visitor: Client, seeded: Database, settings: ApiSettings
) -> None:
    await make_alice(client)
    body = {"user": ALICE, "reason": "Her contact address is gone", "deliver": "show"}
    headers = {"Idempotency-Key": "k", "Host": "evil.test", "X-Forwarded-Host": "evil.test"}
    first = await limited.post("/v1/password-resets", json=body, headers=headers)
    link = first.json()["link"]
    base, _, token = link.partition("#")
    assert base == f"{settings.public_url}/reset"
    assert len(base64.urlsafe_b64decode(token + "=")) == 32
    again = await limited.post("/v1/password-resets", json=body, headers=headers)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    assert again.json() == {**first.json(), "link": None}
    assert (await limited.get(first.headers["location"])).json()["link"] is None
    told = await one(seeded, select(notices))
    assert (told.kind, told.recipient) == ("reset_shown", CONTACT)
    assert (await confirm(visitor, token)).status_code == 202


async def test_a_link_can_be_shown_where_none_can_be_mailed(client: Client, limited: Client, seeded: Database) -> None:
    await make_alice(client, contact_address=None)
    link = await shown_link(limited)
    assert link.startswith("http")
    told = await one(seeded, select(notices))
    assert (told.kind, told.recipient) == ("reset_shown", ALICE), "nobody takes an account over in silence"
    assert told.details is None


async def test_no_usable_form_is_in_the_database(client: Client, seeded: Database, settings: ApiSettings) -> None:
    await make_alice(client)
    token = await shown_token(client)
    row = await one(seeded, select(password_resets))
    assert row.token_hash == token_hash(token)
    tables = (password_resets, notices, jobs, audit_events, idempotency_keys)
    kept = json.dumps([[list(row) for row in await rows(seeded, select(table))] for table in tables], default=str)
    assert row.token_hash in kept
    assert token not in kept
    assert load_link_key(settings.link_key_file).hex() not in kept


async def test_ids_are_random_and_of_62_bits(client: Client, seeded: Database) -> None:
    await make_alice(client)
    await make_user(client, "bob")
    for user in (ALICE, BOB):
        for _ in range(4):
            await client.post("/v1/password-resets", json={"user": user, "reason": "Called", "deliver": "show"})
    ids = [row.id for row in await rows(seeded, select(password_resets))]
    assert len(set(ids)) == 8
    assert 2**50 < max(ids) < 2**62
    assert sorted(ids) != list(range(min(ids), min(ids) + 8))


# --- used


async def test_a_link_sets_the_password_and_ends_what_the_old_one_opened(
    client: Client, visitor: Client, seeded: Database, clock: Clock
) -> None:
    user = await make_alice(client)
    token = await shown_token(client)
    clock.forward(minutes=29, seconds=59)
    answer = await confirm(visitor, token)
    assert (answer.status_code, answer.headers["cache-control"]) == (202, "no-store")
    body = answer.json()
    assert answer.headers["link"] == f'</v1/jobs/{body["job"]["id"]}>; rel="monitor"'
    assert {name: body[name] for name in ("id", "address", "version", "ready", "app_passwords")} == {
        "id": user["id"],
        "address": ALICE,
        "version": 2,
        "ready": False,
        "app_passwords": [],
    }
    assert CONTACT not in answer.text
    row = await one(seeded, select(users))
    assert row.version == 2
    assert row.access_ended_at == clock()
    assert await password_matches(NEW, row.password_hash)
    [job] = await rows(seeded, select(jobs).where(jobs.c.kind == "mailbox.sync", jobs.c.version == 2))
    assert (job.id, job.subject_id) == (body["job"]["id"], user["id"])
    told = await one(seeded, select(notices).where(notices.c.kind == "password_changed"))
    assert (told.recipient, told.user_id, told.reset_id) == (CONTACT, user["id"], None)
    entry = await one(seeded, select(audit_events).where(audit_events.c.action == "users.reset-password"))
    assert (entry.principal_id, entry.user_id) == (f"owner-{user['id']}", user["id"])
    for secret in (NEW, token, row.password_hash):
        assert secret not in str(list(entry))


async def _spoil(client: Client, visitor: Client, clock: Clock, token: str, how: str) -> str:
    """The token to send then."""
    match how:
        case "unknown":
            return token[:-1] + ("A" if token[-1] != "A" else "B")
        case "nonsense":
            return "swordfish ü"
        case "empty":
            return ""
        case "expired":
            clock.forward(minutes=30)
        case "used":
            assert (await confirm(visitor, token, OTHER)).status_code == 202
        case "another link used":
            assert (await confirm(visitor, await shown_token(client), OTHER)).status_code == 202
        case "password set":
            answer = await client.put(f"/v1/users/{ALICE}/password", json={"password": OTHER})
            assert answer.status_code == 202
        case "contact address changed":
            await client.patch(f"/v1/users/{ALICE}", json={"contact_address": "alice@example.org"})
        case "suspended and resumed":
            for state in ("suspended", "active"):
                await client.patch(f"/v1/users/{ALICE}", json={"state": state})
        case "locked and unlocked":
            for verb in ("lock", "unlock"):
                assert (await client.post(f"/v1/users/{ALICE}/{verb}")).status_code == 202
        case "deleted and restored":
            user = (await client.delete(f"/v1/users/{ALICE}")).json()
            assert (await client.post(f"/v1/users/{user['id']}/restore")).status_code == 202
    return token


SPOILT = (
    "unknown",
    "nonsense",
    "empty",
    "expired",
    "used",
    "another link used",
    "password set",
    "contact address changed",
    "suspended and resumed",
    "locked and unlocked",
    "deleted and restored",
)


@pytest.mark.parametrize("how", SPOILT)
async def test_a_link_that_is_not_good_is_always_the_same_problem(
    client: Client, visitor: Client, seeded: Database, clock: Clock, how: str
) -> None:
    await make_alice(client)
    token = await _spoil(client, visitor, clock, await shown_token(client), how)
    before = await one(seeded, select(users))
    answer = await confirm(visitor, token)
    problem = answer.json()
    assert (answer.status_code, problem["type"], problem["detail"]) == (
        410,
        "/problems/link-not-valid",
        "This link is not good, or no longer.",
    )
    assert set(problem) == {"type", "title", "status", "detail", "remedy", "request_id"}
    assert await one(seeded, select(users)) == before
    # What is counted has the network, and nothing of the link.
    [failure] = await rows(seeded, select(login_failures).where(login_failures.c.login == ""))
    assert failure.kind == "reset"
    assert not token or token not in str(list(failure))


async def test_other_changes_leave_a_link_good(client: Client, visitor: Client) -> None:
    await make_alice(client)
    token = await shown_token(client)
    await client.patch(f"/v1/users/{ALICE}", json={"display_name": "Alice", "quota_bytes": 5_000_000})
    await shown_token(client)
    assert (await confirm(visitor, token)).status_code == 202


async def test_of_two_at_one_moment_one_wins(client: Client, visitor: Client, seeded: Database) -> None:
    await make_alice(client)
    token = await shown_token(client)
    answers = await asyncio.gather(*(confirm(visitor, token, password) for password in (NEW, OTHER, NEW, OTHER)))
    assert sorted(answer.status_code for answer in answers) == [202, 410, 410, 410]
    won = next(n for n, answer in enumerate(answers) if answer.status_code == 202)
    row = await one(seeded, select(users))
    assert row.version == 2
    assert await password_matches((NEW, OTHER)[won % 2], row.password_hash)


async def test_of_two_links_at_one_moment_one_wins(client: Client, visitor: Client, seeded: Database) -> None:
    await make_alice(client)
    tokens = [await shown_token(client) for _ in range(2)]
    answers = await asyncio.gather(*(confirm(visitor, token) for token in tokens))
    assert sorted(answer.status_code for answer in answers) == [202, 410]
    assert (await one(seeded, select(users))).version == 2


@pytest.mark.parametrize(
    ("password", "says"),
    [
        ("q7-x9", "too short"),
        ("alicealicealice1", "made of the address"),
        (PRIMARY.replace(".", "") + "2026!", "made of the address"),
        ("aliceexample2026", "the name of its owner"),
        ("abcabcabcabcabca", "repeated"),
    ],
)
async def test_a_refused_password_names_the_rule_and_leaves_the_link_good(
    client: Client, visitor: Client, seeded: Database, password: str, says: str
) -> None:
    await make_alice(client, display_name="Alice Example")
    token = await shown_token(client)
    answer = await confirm(visitor, token, password)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-password")
    assert answer.json()["errors"][0]["pointer"] == "/password"
    assert says in answer.json()["detail"]
    assert password not in answer.text
    assert await rows(seeded, select(login_failures).where(login_failures.c.login == "")) == []
    assert (await confirm(visitor, token)).status_code == 202


async def _app_password(client: Client, name: str) -> int:
    body = {"name": name, "protocols": ["imap"]}
    answer = await client.post(f"/v1/users/{ALICE}/app-passwords", json=body)
    assert answer.status_code == 201, answer.text
    return int(answer.json()["id"])


async def test_app_passwords_are_listed_and_go_when_asked(client: Client, visitor: Client, seeded: Database) -> None:
    await make_alice(client)
    made = [{"id": await _app_password(client, name), "name": name} for name in ("Telephone", "Laptop")]
    answer = await confirm(visitor, await shown_token(client))
    assert answer.json()["app_passwords"] == made
    answer = await confirm(visitor, await shown_token(client), OTHER, revoke=["app_passwords"])
    assert (answer.status_code, answer.json()["app_passwords"], answer.json()["version"]) == (202, [], 3)
    assert all(row.revoked_at is not None for row in await rows(seeded, select(app_passwords)))


async def test_the_owner_of_a_higher_role_uses_a_link_that_somebody_of_that_role_asked_for(
    client: Client, visitor: Client, seeded: Database
) -> None:
    """Rank was looked at when it was asked for."""
    user = await make_alice(client)
    await credentials_of(seeded, Role.PRIMARY, user_id=user["id"])
    assert (await confirm(visitor, await shown_token(client))).status_code == 202


async def test_guessing_links_is_slowed_down(client: Client, visitor: Client) -> None:
    await make_alice(client)
    token = await shown_token(client)
    statuses = {(await confirm(visitor, f"guess-{n}")).status_code for n in range(40)}
    assert statuses == {410}
    answer = await confirm(visitor, "guess-40")
    assert (answer.status_code, answer.json()["type"]) == (429, "/problems/too-many-tries")
    assert (await confirm(visitor, token)).status_code == 429


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/token"),
        ({"token": "swordfish"}, "/password"),
        ({"token": "x" * 129, "password": NEW}, "/token"),
        ({"token": "swordfish", "password": "swordfish" * 50}, "/password"),
        ({"token": "swordfish", "password": NEW, "revoke": ["certificates"]}, "/revoke/0"),
        ({"token": "swordfish", "password": NEW, "user": ALICE}, "/user"),
    ],
)
async def test_bad_bodies_are_named_without_their_values(visitor: Client, body: dict[str, Any], pointer: str) -> None:
    answer = await visitor.post("/v1/password-resets/confirm", json=body)
    assert answer.status_code == 422
    assert pointer in [error["pointer"] for error in answer.json()["errors"]]
    assert "swordfish" not in answer.text


async def test_another_site_cannot_have_a_browser_send_it(visitor: Client) -> None:
    """What a form can send without asking first is refused; for JSON a browser asks, and is not let."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        content = json.dumps({"token": "t", "password": NEW})
        answer = await visitor.post("/v1/password-resets/confirm", content=content, headers={"content-type": kind})
        assert answer.status_code == 415
    asked = {"Origin": "https://evil.test", "Access-Control-Request-Method": "POST"}
    answer = await visitor.options("/v1/password-resets/confirm", headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control-")]


# --- invitations


async def test_an_invitation_comes_with_the_account(
    client: Client, visitor: Client, seeded: Database, clock: Clock
) -> None:
    user = await make_user(client, "alice", contact_address=CONTACT, invite=True)
    assert not user["has_password"]
    reset, mail = await one(seeded, select(password_resets)), await one(seeded, select(notices))
    assert (reset.kind, reset.user_id, reset.expires_at - clock()) == ("invitation", user["id"], timedelta(days=7))
    assert (mail.kind, mail.recipient, mail.reset_id) == ("invitation", CONTACT, reset.id)
    assert (await client.get(f"/v1/password-resets/{reset.id}")).json()["kind"] == "invitation"


async def test_without_it_nothing_is_mailed(client: Client, seeded: Database) -> None:
    await make_alice(client)
    assert await rows(seeded, select(notices)) == []
    assert await rows(seeded, select(password_resets)) == []


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"invite": True}, "/contact_address"),
        ({"invite": True, "contact_address": CONTACT, "password": NEW}, ""),
        ({"invite": True, "contact_address": CONTACT, "password_hash": HASH}, ""),
    ],
)
async def test_an_invitation_needs_an_address_and_no_password(
    client: Client, seeded: Database, members: dict[str, Any], pointer: str
) -> None:
    answer = await client.post("/v1/users", json={"address": ALICE, **members})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
    assert await rows(seeded, select(users)) == []


async def test_an_invitation_that_is_sent_twice_with_one_key_is_one(client: Client, seeded: Database) -> None:
    body = {"address": ALICE, "contact_address": CONTACT, "invite": True}
    made = [await client.post("/v1/users", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert made[0].json()["id"] == made[1].json()["id"]
    assert len(await rows(seeded, select(notices))) == 1


# --- just enough of an account


async def test_a_summary_is_just_enough(client: Client, limited: Client) -> None:
    user = await make_alice(client, display_name="Alice Example", external_id="42")
    answer = await limited.get(f"/v1/users/{ALICE}/summary")
    assert answer.json() == {
        "id": user["id"],
        "address": ALICE,
        "display_name": "Alice Example",
        "state": "active",
        "locked": False,
        "contact_address": "a•••@e•••.net",
        "may_reset": True,
        "why_not": None,
    }
    assert (await limited.get(f"/v1/users/{ALICE}")).status_code == 403


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("suspended", "suspended"),
        ("locked", "locked"),
        ("no contact address", "no contact address"),
        ("deleted id", "deleted"),
        ("higher rank", "higher"),
    ],
)
async def test_a_summary_says_what_stands_in_the_way(
    client: Client, limited: Client, seeded: Database, which: str, says: str
) -> None:
    asked = await _prepare(client, seeded, which)
    body = (await limited.get(f"/v1/users/{asked}/summary")).json()
    assert body["may_reset"] is False
    assert says in body["why_not"]
    assert body["locked"] == (which == "locked")


@pytest.mark.parametrize(
    "path", ["/v1/users/nobody@cacert.test/summary", "/v1/users/987/summary", "/v1/password-resets/987"]
)
async def test_what_is_not_there(limited: Client, path: str) -> None:
    assert (await limited.get(path)).status_code == 404
