"""People and services over HTTP: what they are given, how their keys change, and who may do that to whom."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastapi import FastAPI
from sqlalchemy import select

from app.db import Database, utc_now
from app.errors import LastPrimary
from app.models.audit_events import audit_events
from app.models.idempotency_keys import idempotency_keys
from app.models.principals import principal_keys, principals
from app.permissions import Permission, Principal, Role
from app.services.changes import Change
from app.services.principals import change_principal, create_principal
from tests.conftest import ACTOR, Clock, anonymous
from tests.routers.accounts import make_user
from tests.web.certificates import certificate

pytestmark = pytest.mark.asyncio

Caller = httpx.AsyncClient
Make = Callable[..., Awaitable[Caller]]


@pytest_asyncio.fixture
async def caller(api: FastAPI, seeded: Database) -> AsyncIterator[Make]:
    """`await caller(role, **of create_principal)`: a client of that role; its id is `client.headers["x-me"]`."""
    made: list[Caller] = []

    async def make(role: Role = Role.PRIMARY, permissions: Any = None, **options: Any) -> Caller:
        async with seeded.write.begin() as connection:
            change = Change(connection, ACTOR, utc_now())
            credentials = await create_principal(change, f"{role} {len(made)}", role, permissions, **options)
        client = anonymous(api)
        client.auth = httpx.BasicAuth(*credentials)
        client.headers["x-me"] = credentials.id
        made.append(client)
        return client

    yield make
    for client in made:
        await client.aclose()


def me(client: Caller) -> str:
    return client.headers["x-me"]


async def create(client: Caller, role: str = "website", name: str = "New", **members: Any) -> httpx.Response:
    return await client.post("/v1/principals", json={"role": role, "name": name, **members})


async def new(client: Caller, role: str = "website", name: str = "New", **members: Any) -> dict[str, Any]:
    answer = await create(client, role, name, **members)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def believed(api: FastAPI, client_id: str, secret: str, clock: Clock, peer: str = "127.0.0.1") -> bool:
    """Asked two seconds later, so that no row is remembered."""
    clock.forward(seconds=2)
    transport = httpx.ASGITransport(api, client=(peer, 1))
    async with httpx.AsyncClient(transport=transport, base_url="https://mail.cacert.test") as visitor:
        answer = await visitor.get("/v1/me", auth=(client_id, secret))
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


async def everything_stored(database: Database) -> str:
    async with database.read.connect() as connection:
        tables = (principals, principal_keys, audit_events, idempotency_keys)
        return str([(await connection.execute(select(table))).all() for table in tables])


# Made, read, listed


async def test_a_new_one_gets_a_secret_that_is_shown_once(
    api: FastAPI, client: Caller, seeded: Database, clock: Clock
) -> None:
    answer = await create(client, networks=["192.0.2.0/24", "2001:db8::1"], permissions=["users:read"])
    made = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/principals/{made['id']}"
    assert answer.headers["etag"] == '"1.0"'
    assert made["id"].startswith("website-")
    assert (made["role"], made["rank"], made["state"], made["permissions"]) == ("website", 0, "active", ["users:read"])
    assert made["networks"] == ["192.0.2.0/24", "2001:db8::1/128"]
    (key,) = made["keys"]
    assert key.keys() == {"id", "kind", "fingerprint", "created_at", "ends_at"}
    assert (key["kind"], key["fingerprint"], key["ends_at"]) == ("secret", None, None)
    secret = made.pop("secret")
    assert len(secret) == 43
    read = await client.get(f"/v1/principals/{made['id']}")
    assert read.json() == made, "the same, without the secret"
    assert secret not in await everything_stored(seeded)
    assert hashlib.sha256(secret.encode()).hexdigest() not in read.text + (await client.get("/v1/principals")).text
    assert await believed(api, made["id"], secret, clock, "192.0.2.7")


async def test_a_repeat_shows_the_resource_and_no_secret(client: Caller, seeded: Database) -> None:
    body = {"role": "website", "name": "New"}
    headers = {"Idempotency-Key": "once"}
    first = await client.post("/v1/principals", json=body, headers=headers)
    again = await client.post("/v1/principals", json=body, headers=headers)
    assert first.json()["secret"] is not None
    assert (again.status_code, again.headers["idempotency-replayed"]) == (201, "true")
    assert again.json() == first.json() | {"secret": None}
    path = f"/v1/principals/{first.json()['id']}/rotate"
    first = await client.post(path, json={}, headers={"Idempotency-Key": "twice"})
    again = await client.post(path, json={}, headers={"Idempotency-Key": "twice"})
    assert again.json() == first.json() | {"secret": None}
    assert len(again.json()["keys"]) == 2, "and nothing was done twice"
    assert first.json()["secret"] not in await everything_stored(seeded)


async def test_a_list_has_pages_and_filters(client: Caller) -> None:
    made = sorted([(await new(client, role, f"{role} {n}"))["id"] for role in ("auditor", "webmail") for n in range(3)])
    seen, cursor = [], {}
    while True:
        answer = (await client.get("/v1/principals", params={"limit": 2, **cursor})).json()
        seen += [item["id"] for item in answer["items"]]
        if answer["next_cursor"] is None:
            break
        cursor = {"cursor": answer["next_cursor"]}
    assert seen == sorted(seen)
    assert set(made) < set(seen)
    only = (await client.get("/v1/principals?role=webmail")).json()["items"]
    assert [item["id"] for item in only] == made[3:]
    await client.patch(f"/v1/principals/{made[0]}", json={"state": "disabled"})
    off = (await client.get("/v1/principals?state=disabled")).json()["items"]
    assert [item["id"] for item in off] == made[:1]


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"role": "owner"}, "/role"),
        ({"role": "king"}, "/role"),
        ({"name": ""}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"permissions": ["users:purge"]}, "/permissions"),
        ({"permissions": ["all"]}, "/permissions/0"),
        ({"networks": []}, "/networks"),
        ({"networks": ["10.0.0.5/8"]}, "/networks/0"),
        ({"networks": ["example.org"]}, "/networks/0"),
        ({"networks": ["::ffff:10.0.0.0/104"]}, "/networks/0"),
        ({"expires_at": "2030-01-01T00:00:00"}, "/expires_at"),
        ({"user": 99}, "/user"),
        ({"colour": "red"}, "/colour"),
    ],
)
async def test_what_cannot_be_is_refused_by_field(client: Caller, members: dict[str, Any], pointer: str) -> None:
    answer = await client.post("/v1/principals", json={"role": "website", "name": "New", **members})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)


async def test_a_name_is_given_once(client: Caller) -> None:
    one, two = await new(client, name="One"), await new(client, name="Two")
    assert (await create(client, name="One")).json()["errors"][0]["pointer"] == "/name"
    clash = await client.patch(f"/v1/principals/{two['id']}", json={"name": "One"})
    assert (clash.status_code, clash.json()["errors"][0]["pointer"]) == (422, "/name")
    assert (await client.get(f"/v1/principals/{one['id']}")).json()["version"] == 1


# Changed


async def test_a_change_raises_the_version_and_the_same_again_does_not(client: Caller, seeded: Database) -> None:
    made = await new(client)
    path = f"/v1/principals/{made['id']}"
    body = {"name": "Better", "permissions": ["users:read"], "expires_at": "2030-01-01T00:00:00+02:00"}
    changed = await client.patch(path, json=body)
    assert changed.headers["etag"] == '"2.0"'
    assert changed.json()["expires_at"] == "2029-12-31T22:00:00Z"
    assert (await client.patch(path, json=body)).json()["version"] == 2
    assert (await client.patch(path, json={"name": "Worse"}, headers={"If-Match": '"1.0"'})).status_code == 412
    assert (await client.get(path, headers={"If-None-Match": '"2.0"'})).status_code == 304
    assert (await client.patch(path, json={"permissions": None})).json()["permissions"] is None
    for wrong in ({"role": "primary"}, {"state": None}, {"name": None}, {"secret": "x"}):
        assert (await client.patch(path, json=wrong)).status_code == 422, wrong
    async with seeded.read.connect() as connection:
        query = select(audit_events.c.action, audit_events.c.before, audit_events.c.after)
        theirs = query.where(audit_events.c.subject_id == made["id"], audit_events.c.outcome == "accepted")
        rows = (await connection.execute(theirs.order_by(audit_events.c.id))).all()
    assert [row.action for row in rows] == ["principals.create", "principals.change", "principals.change"]
    assert "secret" not in str(rows)
    assert rows[1].before == {"name": "New", "permissions": None, "expires_at": None}


async def test_disabled_is_refused_and_enabled_again_is_not(api: FastAPI, client: Caller, clock: Clock) -> None:
    made = await new(client)
    path = f"/v1/principals/{made['id']}"
    token = await client.post(
        "/oauth/token", data={"grant_type": "client_credentials"}, auth=(made["id"], made["secret"])
    )
    bearer = {"Authorization": f"Bearer {token.json()['access_token']}"}
    assert (await client.patch(path, json={"state": "disabled"})).json()["state"] == "disabled"
    assert not await believed(api, made["id"], made["secret"], clock)
    assert (await client.get("/v1/me", headers=bearer, auth=None)).status_code == 401
    assert (await client.patch(path, json={"state": "active"})).status_code == 200
    assert await believed(api, made["id"], made["secret"], clock)


async def test_an_expired_one_is_refused_like_a_wrong_secret(api: FastAPI, client: Caller, clock: Clock) -> None:
    made = await new(client, expires_at=(clock.now + timedelta(seconds=60)).isoformat())
    token = await client.post(
        "/oauth/token", data={"grant_type": "client_credentials"}, auth=(made["id"], made["secret"])
    )
    bearer = {"Authorization": f"Bearer {token.json()['access_token']}"}
    assert await believed(api, made["id"], made["secret"], clock)
    clock.forward(seconds=57.9)
    assert (await client.get("/v1/me", auth=(made["id"], made["secret"]))).status_code == 200
    clock.forward(seconds=0.1)  # the row is still remembered, and the moment counts all the same
    late = await client.get("/v1/me", auth=(made["id"], made["secret"]))
    wrong = await client.get("/v1/me", auth=(made["id"], "wrong"))
    assert (late.status_code, late.json()["detail"]) == (401, wrong.json()["detail"])
    assert (await client.get("/v1/me", headers=bearer, auth=None)).status_code == 401


@pytest.mark.parametrize(
    ("peer", "inside"),
    [
        ("192.0.2.7", True),
        ("::ffff:192.0.2.7", True),
        ("192.0.3.7", False),
        ("2001:db8:0:1::5", True),
        ("2001:db8:0:2::5", False),
        ("127.0.0.1", False),
        ("nonsense", False),
    ],
)
async def test_networks_hold_for_secrets_and_tokens(
    api: FastAPI, client: Caller, clock: Clock, peer: str, inside: bool
) -> None:
    made = await new(client, networks=["192.0.2.0/24", "2001:db8:0:1::/64"])
    home = httpx.ASGITransport(api, client=("192.0.2.1", 1))
    async with httpx.AsyncClient(transport=home, base_url="https://mail.cacert.test") as at_home:
        auth = (made["id"], made["secret"])
        token = await at_home.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=auth)
    bearer = {"Authorization": f"Bearer {token.json()['access_token']}"}
    transport = httpx.ASGITransport(api, client=(peer, 1))
    async with httpx.AsyncClient(transport=transport, base_url="https://mail.cacert.test") as there:
        by_secret = await there.get("/v1/me", auth=(made["id"], made["secret"]))
        by_token = await there.get("/v1/me", headers=bearer)
        wrong = await there.get("/v1/me", auth=(made["id"], "wrong"))
    assert by_secret.status_code == by_token.status_code == (200 if inside else 401)
    if not inside:
        assert by_secret.json()["detail"] == wrong.json()["detail"]


# Keys


async def test_two_secrets_live_side_by_side_and_no_third(api: FastAPI, client: Caller, clock: Clock) -> None:
    made = await new(client)
    client_id, path = made["id"], f"/v1/principals/{made['id']}"
    grant = {"grant_type": "client_credentials"}
    token = await client.post("/oauth/token", data=grant, auth=(client_id, made["secret"]))
    old_token = {"Authorization": f"Bearer {token.json()['access_token']}"}
    rotated = await client.post(f"{path}/rotate", json={"overlap_seconds": 60})
    assert rotated.status_code == 201
    second = rotated.json()["secret"]
    assert [key["ends_at"] is None for key in rotated.json()["keys"]] == [False, True]
    assert await believed(api, client_id, made["secret"], clock)
    assert await believed(api, client_id, second, clock)

    third = await client.post(f"{path}/rotate", json={"overlap_seconds": 60})
    assert (third.status_code, third.json()["type"]) == (409, "/problems/too-many-keys")
    assert third.json()["keys"] == [key["id"] for key in rotated.json()["keys"]]

    clock.forward(seconds=60)
    assert not await believed(api, client_id, made["secret"], clock), "its time is over"
    assert (await client.get("/v1/me", headers=old_token, auth=None)).status_code == 401, "and its token's"
    assert await believed(api, client_id, second, clock)

    third = await client.post(f"{path}/rotate", json={"overlap_seconds": 60})
    assert third.status_code == 201, "an ended one does not count"
    last = (await client.post(f"{path}/rotate", json={"overlap_seconds": 0})).json()
    assert [await believed(api, client_id, each, clock) for each in (second, third.json()["secret"])] == [False, False]
    assert await believed(api, client_id, last["secret"], clock)
    assert last["version"] == 4


async def test_a_rotation_never_prolongs_what_is_ending(client: Caller, clock: Clock) -> None:
    made = await new(client)
    path = f"/v1/principals/{made['id']}"
    await client.post(f"{path}/rotate", json={"overlap_seconds": 60})
    before = (await client.get(path)).json()["keys"]
    await client.post(f"{path}/keys/{before[1]['id']}/revoke")
    after = (await client.post(f"{path}/rotate", json={"overlap_seconds": 3600})).json()["keys"]
    assert after[0]["ends_at"] == before[0]["ends_at"]


@pytest.mark.parametrize("overlap", [-1, 604_801, "x", None])
async def test_an_overlap_is_at_most_a_week(client: Caller, overlap: Any) -> None:
    made = await new(client)
    answer = await client.post(f"/v1/principals/{made['id']}/rotate", json={"overlap_seconds": overlap})
    assert answer.status_code == 422


async def test_a_key_is_ended_at_once_and_for_good(api: FastAPI, client: Caller, clock: Clock) -> None:
    made = await new(client)
    path = f"/v1/principals/{made['id']}"
    second = (await client.post(f"{path}/rotate", json={})).json()
    first_key = second["keys"][0]["id"]
    ended = await client.post(f"{path}/keys/{first_key}/revoke")
    assert (ended.status_code, ended.json()["version"]) == (200, 3)
    assert (await client.post(f"{path}/keys/{first_key}/revoke")).json()["version"] == 3, "twice is no change"
    assert not await believed(api, made["id"], made["secret"], clock)
    assert await believed(api, made["id"], second["secret"], clock)
    other = await new(client, name="Other")
    assert (await client.post(f"{path}/keys/{other['keys'][0]['id']}/revoke")).status_code == 404, "somebody else's"


async def test_a_certificate_is_registered_by_its_hash(client: Caller, seeded: Database) -> None:
    made, other = await new(client), await new(client, name="Other")
    path = f"/v1/principals/{made['id']}/certificates"
    pem, der, _ = certificate("site")
    digest = hashlib.sha256(der).hexdigest()
    answer = await client.post(path, json={"certificate": pem})
    assert (answer.status_code, answer.json()["version"]) == (201, 2)
    assert answer.json()["keys"][1]["fingerprint"] == digest
    assert answer.json()["keys"][1]["kind"] == "certificate"
    for again in (path, f"/v1/principals/{other['id']}/certificates"):
        refused = await client.post(again, json={"fingerprint": digest})
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/certificate-known")
    await client.post(f"/v1/principals/{made['id']}/keys/{answer.json()['keys'][1]['id']}/revoke")
    assert (await client.post(path, json={"certificate": pem})).status_code == 409, "what was ended stays so"
    printed = "sha256 Fingerprint=" + ":".join(f"{number:02X}" for number in range(32))
    answer = await client.post(path, json={"fingerprint": printed})
    assert answer.json()["keys"][2]["fingerprint"] == bytes(range(32)).hex()


async def test_what_is_no_certificate_is_refused(client: Caller, clock: Clock) -> None:
    made = await new(client)
    path = f"/v1/principals/{made['id']}/certificates"
    pem, _, key = certificate("site")
    expired, _, _ = certificate("old", not_after=clock.now - timedelta(days=1))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for body in (
        {},
        {"certificate": pem, "fingerprint": "0" * 64},
        {"certificate": "rubbish"},
        {"certificate": pem + pem},
        {"certificate": pem.replace("M", "N")},
        {"certificate": pem + private},
        {"certificate": private},
        {"certificate": expired},
        {"fingerprint": "0" * 63},
        {"fingerprint": "0" * 63 + "g"},
        {"fingerprint": "٠" * 64},
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code == 422, (body, answer.text)
        assert private.splitlines()[1] not in answer.text


async def test_certificates_have_a_limit(client: Caller) -> None:
    made = await new(client)
    path = f"/v1/principals/{made['id']}/certificates"
    answers = [await client.post(path, json={"fingerprint": f"{number:064x}"}) for number in range(11)]
    assert [answer.status_code for answer in answers] == [201] * 10 + [409]


# Rank, and one's own rights


async def test_nobody_acts_on_a_higher_role(caller: Make) -> None:
    primary, secondary = await caller(), await caller(Role.SECONDARY)
    path = f"/v1/principals/{me(primary)}"
    key = (await secondary.get(path)).json()["keys"][0]["id"]
    for answer in (
        await secondary.patch(path, json={"name": "Mine"}),
        await secondary.patch(path, json={"state": "disabled"}),
        await secondary.patch(path, json={"networks": ["192.0.2.1"]}),
        await secondary.patch(path, json={}),
        await secondary.post(f"{path}/rotate", json={}),
        await secondary.post(f"{path}/certificates", json={"fingerprint": "0" * 64}),
        await secondary.post(f"{path}/keys/{key}/revoke"),
        await create(secondary, "primary"),
    ):
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/outranked"), answer.text
    assert (await secondary.get(path)).json()["version"] == 1
    other = await new(secondary, "secondary")
    assert (await primary.patch(f"/v1/principals/{other['id']}", json={"state": "disabled"})).status_code == 200
    assert (await secondary.patch(f"/v1/principals/{other['id']}", json={"name": "Equal"})).status_code == 200


async def test_nobody_acts_on_the_account_of_a_higher_role(caller: Make, client: Caller) -> None:
    primary, secondary = await caller(), await caller(Role.SECONDARY)
    webmail, website = await caller(Role.WEBMAIL), await caller(Role.WEBSITE)
    alice = (await make_user(client, "alice"))["id"]
    linked = await client.patch(f"/v1/principals/{me(primary)}", json={"user": "alice@cacert.test"})
    assert linked.json()["user_id"] == alice
    for one in (secondary, website):
        for answer in (
            await one.patch(f"/v1/users/{alice}", json={"display_name": "Mine"}),
            await one.patch("/v1/users/alice@cacert.test", json={"state": "suspended"}),
            await one.delete(f"/v1/users/{alice}"),
            await one.post(f"/v1/users/{alice}/restore"),
            await one.post(f"/v1/users/{alice}/owner-tokens"),
        ):
            assert (answer.status_code, answer.json()["type"]) == (403, "/problems/outranked"), answer.text
    assert (await secondary.post(f"/v1/users/{alice}/purge")).json()["type"] == "/problems/outranked"
    assert (await webmail.post(f"/v1/users/{alice}/owner-tokens")).json()["type"] == "/problems/outranked"
    # Nor is it taken by calling it one's own, or by unlinking it.
    stolen = await secondary.patch(f"/v1/principals/{me(webmail)}", json={"user": alice})
    assert stolen.json()["type"] == "/problems/outranked"
    assert (await create(secondary, "secondary", user=alice)).json()["type"] == "/problems/outranked"
    assert (await primary.patch(f"/v1/users/{alice}", json={"display_name": "Fine"})).status_code == 202


async def test_what_a_higher_role_may_send_as_is_theirs(caller: Make, client: Caller) -> None:
    primary, secondary = await caller(), await caller(Role.SECONDARY)
    alice, _ = [(await make_user(client, name))["id"] for name in ("alice", "bob")]
    assert (await client.patch(f"/v1/principals/{me(primary)}", json={"user": alice})).status_code == 200
    body = {"address": "pr@cacert.test", "kind": "send_as", "destinations": ["bob@cacert.test"]}
    made = await primary.post("/v1/aliases", json={**body, "designated": ["alice@cacert.test"]})
    assert made.status_code == 202, made.text
    path = f"/v1/aliases/{made.json()['id']}"
    for answer in (
        await secondary.patch(path, json={"designated": []}),
        await secondary.patch(path, json={"designated": ["bob@cacert.test"]}),
        await secondary.delete(path),
        await secondary.post(
            "/v1/aliases", json={**body, "address": "x@cacert.test", "designated": ["alice@cacert.test"]}
        ),
    ):
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/outranked"), answer.text
    both = {"designated": ["alice@cacert.test", "bob@cacert.test"]}
    assert (await secondary.patch(path, json=both)).status_code == 202, "bob is nobody's superior"
    assert (await secondary.patch(path, json={"note": "Press"})).status_code == 202
    assert (await primary.patch(path, json={"designated": ["bob@cacert.test"]})).status_code == 202


async def test_the_address_of_a_higher_role_is_not_taken(caller: Make, client: Caller) -> None:
    primary, secondary = await caller(), await caller(Role.SECONDARY)
    alice = (await make_user(client, "alice"))["id"]
    assert (await client.patch(f"/v1/principals/{me(primary)}", json={"user": alice})).status_code == 200
    assert (await primary.delete(f"/v1/users/{alice}")).status_code == 202
    user = {"address": "alice@cacert.test", "reuse_address": True}
    await make_user(client, "bob")
    alias = {**user, "kind": "receive_only", "destinations": ["bob@cacert.test"]}
    for answer in (await secondary.post("/v1/users", json=user), await secondary.post("/v1/aliases", json=alias)):
        assert (answer.status_code, answer.json().get("type")) == (403, "/problems/outranked"), answer.text
    assert (await primary.post("/v1/users", json=user)).status_code == 202


async def test_nobody_raises_their_own_rights(caller: Make, clock: Clock) -> None:
    soon = clock.now + timedelta(days=1)
    some = [Permission.PRINCIPALS_READ, Permission.PRINCIPALS_WRITE, Permission.USERS_READ]
    admin = await caller(Role.SECONDARY, some, networks=["127.0.0.0/24"], expires_at=soon)
    path = f"/v1/principals/{me(admin)}"
    for body in (
        {"permissions": None},
        {"permissions": [*some, "users:write"]},
        {"networks": None},
        {"networks": ["127.0.0.0/23"]},
        {"networks": ["127.0.0.1", "::1"]},
        {"expires_at": None},
        {"expires_at": (soon + timedelta(seconds=1)).isoformat()},
        {"state": "disabled"},
        {"networks": ["127.0.0.1"], "permissions": None},
    ):
        answer = await admin.patch(path, json=body)
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/own-rights"), (body, answer.text)
    less = {"networks": ["127.0.0.1"], "expires_at": (soon - timedelta(hours=1)).isoformat(), "permissions": some[:2]}
    assert (await admin.patch(path, json=less)).status_code == 200, "less is fine"


async def test_nobody_gives_what_they_do_not_have(caller: Make, clock: Clock) -> None:
    some = [Permission.PRINCIPALS_READ, Permission.PRINCIPALS_WRITE, Permission.USERS_READ]
    admin, whole = await caller(Role.SECONDARY, some), await caller(Role.SECONDARY)
    lesser = await new(admin, "auditor", permissions=["users:read"])
    path, above = f"/v1/principals/{lesser['id']}", f"/v1/principals/{me(whole)}"
    for answer in (
        await create(admin, "website", "Puppet"),
        await create(admin, "secondary", "Puppet", permissions=[*some, "users:write"]),
        await admin.patch(path, json={"permissions": None}),
        await admin.patch(path, json={"permissions": ["hosts:read"]}),
        await admin.patch(above, json={"networks": None, "permissions": [*some, "users:write"]}),
        await admin.post(f"{above}/rotate", json={}),
        await admin.post(f"{above}/certificates", json={"fingerprint": "0" * 64}),
    ):
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden"), answer.text
        assert answer.json()["missing"] not in some
    assert (await admin.patch(above, json={"state": "disabled"})).status_code == 200, "to stop somebody is not to give"
    up = await admin.patch(above, json={"state": "active"})
    assert up.status_code == 403


async def test_a_narrowed_token_gives_no_more_than_it_has(caller: Make) -> None:
    whole = await caller(Role.PRIMARY)
    grant = {"grant_type": "client_credentials", "scope": "principals:write principals:read"}
    token = (await whole.post("/oauth/token", data=grant)).json()["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    path = f"/v1/principals/{me(whole)}"
    for answer in (
        await whole.post("/v1/principals", json={"role": "primary", "name": "Puppet"}, headers=headers, auth=None),
        await whole.post("/v1/principals", json={"role": "limited", "name": "Puppet"}, headers=headers, auth=None),
        await whole.post(f"{path}/rotate", json={}, headers=headers, auth=None),
        await whole.post(f"{path}/certificates", json={"fingerprint": "0" * 64}, headers=headers, auth=None),
    ):
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden"), answer.text
    assert (await whole.get(path)).json()["version"] == 1


async def test_a_restriction_is_not_got_rid_of_by_a_puppet(caller: Make, clock: Clock) -> None:
    soon = clock.now + timedelta(days=1)
    admin = await caller(Role.PRIMARY, networks=["127.0.0.0/24"], expires_at=soon)
    for role in ("primary", "secondary", "limited", "auditor"):
        for members in ({}, {"networks": ["127.0.0.1"]}, {"expires_at": soon.isoformat()}):
            for narrowed in ({}, {"permissions": ["users:read"]} if role != "limited" else {}):
                answer = await create(admin, role, "Puppet", **members, **narrowed)
                assert (answer.status_code, answer.json()["type"]) == (403, "/problems/own-rights"), answer.text
    everywhere = await caller(Role.PRIMARY, [Permission.USERS_READ])
    answer = await admin.post(f"/v1/principals/{me(everywhere)}/rotate", json={"overlap_seconds": 0})
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/own-rights"), answer.text
    fine = await new(admin, "primary", "Colleague", networks=["127.0.0.7"], expires_at=soon.isoformat())
    wider = await admin.patch(f"/v1/principals/{fine['id']}", json={"networks": None})
    assert wider.status_code == 403
    assert (await create(admin, "website", "Site", networks=["192.0.2.1"])).status_code == 201, "that makes nobody"


async def test_a_key_that_is_ending_makes_no_other(api: FastAPI, caller: Make, clock: Clock) -> None:
    admin = await caller(Role.PRIMARY)
    path = f"/v1/principals/{me(admin)}"
    newer = (await admin.post(f"{path}/rotate", json={"overlap_seconds": 3600})).json()
    assert newer["secret"]
    for answer in (
        await admin.post(f"{path}/rotate", json={"overlap_seconds": 0}),
        await admin.post(f"{path}/certificates", json={"fingerprint": "0" * 64}),
    ):
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/own-rights"), answer.text
    clock.forward(seconds=2)
    answer = await admin.post(f"{path}/rotate", json={"overlap_seconds": 0}, auth=(me(admin), newer["secret"]))
    assert answer.status_code == 201


async def test_somebody_who_can_do_everything_is_left(caller: Make, seeded: Database, clock: Clock) -> None:
    last, secondary = await caller(), await caller(Role.SECONDARY)
    narrow = await caller(Role.PRIMARY, [Permission.PRINCIPALS_READ])
    brief = await caller(Role.PRIMARY, expires_at=clock.now + timedelta(days=1))
    path = f"/v1/principals/{me(last)}"
    key = (await last.get(path)).json()["keys"][0]["id"]
    for body in ({"expires_at": "2030-01-01T00:00:00Z"}, {"permissions": ["users:read"]}):
        answer = await last.patch(path, json=body)
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/last-primary"), answer.text
    assert (await last.post(f"{path}/keys/{key}/revoke")).json()["type"] == "/problems/last-primary"
    assert (await brief.patch(path, json={"state": "disabled"})).json()["type"] == "/problems/last-primary"
    assert (await last.patch(path, json={"name": "Still here", "networks": ["127.0.0.1"]})).status_code == 200
    for other in (narrow, brief, secondary):
        assert (await last.patch(f"/v1/principals/{me(other)}", json={"state": "disabled"})).status_code == 200
    second = await new(last, "primary", networks=["127.0.0.1"])
    assert (
        await last.patch(
            f"/v1/principals/{me(last)}", json={"state": "disabled"}, auth=(second["id"], second["secret"])
        )
    ).status_code == 200


async def test_of_two_that_end_each_other_one_is_left(caller: Make) -> None:
    for _ in range(5):
        one, other = await caller(), await caller()
        # Everybody else goes first, so that these two are the last.
        for item in (await one.get("/v1/principals?role=primary&state=active")).json()["items"]:
            if item["id"] not in (me(one), me(other)):
                await one.patch(f"/v1/principals/{item['id']}", json={"state": "disabled"})
        answers = await asyncio.gather(
            one.patch(f"/v1/principals/{me(other)}", json={"state": "disabled"}),
            other.patch(f"/v1/principals/{me(one)}", json={"state": "disabled"}),
        )
        assert sorted(answer.status_code for answer in answers) == [200, 409], [answer.text for answer in answers]


async def test_the_second_waits_for_what_the_first_does(seeded: Database) -> None:
    """Two transactions at once, each about to disable the other: the rows of all primaries are locked by the first."""
    callers: list[Principal] = []
    async with seeded.write.begin() as connection:
        for name in ("one", "other"):
            made = await create_principal(Change(connection, ACTOR, utc_now()), name, Role.PRIMARY)
            callers.append(Principal(made.id, name, Role.PRIMARY, frozenset(Permission)))
    one, other = callers

    async def end(whom: Principal, by: Principal) -> None:
        async with seeded.write.begin() as connection:
            await change_principal(Change(connection, ACTOR, utc_now()), whom.id, {"state": "disabled"}, caller=by)

    async with seeded.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await change_principal(change, other.id, {"state": "disabled"}, caller=one)
        second = asyncio.create_task(end(one, other))
        await asyncio.wait({second}, timeout=0.3)
        assert not second.done()
    with pytest.raises(LastPrimary):
        await second


async def test_our_own_command_may_end_the_last_one(caller: Make, seeded: Database, clock: Clock) -> None:
    last = await caller()
    async with seeded.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await change_principal(change, me(last), {"state": "disabled"})
    clock.forward(seconds=2)
    assert (await last.get("/v1/me")).status_code == 401


async def test_a_restricted_principal_is_not_reached_through_a_name(caller: Make) -> None:
    admin = await caller()
    for path in ("/v1/principals/nobody", "/v1/principals/nobody/rotate", "/v1/principals/nobody/keys/1/revoke"):
        method = "GET" if path.endswith("nobody") else "POST"
        answer = await admin.request(method, path, json=None if method == "GET" else {})
        assert answer.status_code == 404, answer.text
    for path in ("/v1/principals/%00", "/v1/principals/" + "x" * 41, "/v1/principals/%C3%BC"):
        assert (await admin.get(path)).status_code == 422
    assert (await admin.get("/v1/principals?cursor=w7w")).status_code == 422
