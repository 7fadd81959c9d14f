"""Mail hosts: added, switched off, set up; removed only while nothing lies on them."""

from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update

from app.db import Database, utc_now
from app.mailconfig.hosts import HostSettings
from app.models.audit_events import audit_events
from app.models.hosts import host_status, hosts
from app.models.jobs import jobs
from app.queue.claim import Outcome, claim, give_up, record
from app.queue.contracts import MAILHOST_SYNC, THE_HOST
from tests.conftest import HOST, PRIMARY, Clock

pytestmark = pytest.mark.asyncio


async def add(client: httpx.AsyncClient, name: str = "mail2", **members: Any) -> dict[str, Any]:
    answer = await client.post("/v1/hosts", json={"name": name, **members})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def test_a_host_is_added_read_and_removed(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/hosts", json={"name": "mail2"})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/hosts/mail2"
    assert answer.json() == {
        "name": "mail2",
        "enabled": True,
        "version": 1,
        "created_at": "2026-11-23T12:00:00Z",
        "updated_at": "2026-11-23T12:00:00Z",
        **dict.fromkeys(("heartbeat_at", "started_at", "release", "swept_at", "sweep", "job")),
        "settings": HostSettings().model_dump(mode="json"),
        "ready": False,
        "proofs": {},
    }
    assert (await client.get("/v1/hosts/mail2")).json() == answer.json()
    assert (await client.delete("/v1/hosts/mail2")).status_code == 204
    assert (await client.get("/v1/hosts/mail2")).status_code == 404
    assert (await client.delete("/v1/hosts/mail2")).status_code == 404


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/name"),
        *(({"name": name}, "/name") for name in ("", "-", "Mail", "a/b", "..", ".a", "a.", "mail\n", "ü", "x" * 65, 5)),
        ({"name": "mail2", "enabled": "perhaps"}, "/enabled"),
        ({"name": "mail2", "settings": {}}, "/settings"),
    ],
)
async def test_bad_input_is_named(client: httpx.AsyncClient, body: dict[str, Any], pointer: str) -> None:
    answer = await client.post("/v1/hosts", json=body)
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert len((await client.get("/v1/hosts")).json()["items"]) == 1


async def test_a_name_is_taken_once(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/hosts", json={"name": HOST})
    assert (answer.status_code, answer.json()["type"], answer.json()["host"]) == (409, "/problems/host-exists", HOST)


async def test_a_disabled_host_takes_no_new_accounts(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    changed = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
    assert (changed.status_code, changed.json()["enabled"], changed.json()["version"]) == (200, False, 2)
    refused = await client.post("/v1/users", json={"address": f"bob@{PRIMARY}"})
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/host-not-chosen")
    assert "no enabled mail host" in refused.json()["detail"]
    renamed = await client.patch(f"/v1/users/{made.json()['id']}", json={"display_name": "A"})
    assert renamed.status_code == 202
    await client.patch(f"/v1/hosts/{HOST}", json={"enabled": True})
    assert (await client.post("/v1/users", json={"address": f"bob@{PRIMARY}"})).status_code == 202


async def test_with_several_hosts_one_is_named(client: httpx.AsyncClient) -> None:
    await add(client)
    for host, says in ((None, "several hosts"), ("mail3", "no enabled host mail3")):
        body = {"address": f"alice@{PRIMARY}", "host": host}
        answer = await client.post("/v1/users", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (409, "/host")
        assert says in answer.json()["detail"]
    answer = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}", "host": "mail2"})
    assert (answer.status_code, answer.json()["host"]) == (202, "mail2")


async def test_what_is_so_already_is_no_change(client: httpx.AsyncClient) -> None:
    answer = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": True})
    assert (answer.status_code, answer.json()["version"]) == (200, 1)
    answer = await client.patch(f"/v1/hosts/{HOST}", json={})
    assert (answer.status_code, answer.json()["version"]) == (200, 1)
    for bad in ({"enabled": None}, {"settings": None}, {"name": "x"}, {"enabled": True, "name": "x"}):
        assert (await client.patch(f"/v1/hosts/{HOST}", json=bad)).status_code == 422, bad


async def test_if_match_protects_a_change(client: httpx.AsyncClient) -> None:
    tag = (await client.get(f"/v1/hosts/{HOST}")).headers["etag"]
    first = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": tag})
    assert first.status_code == 200
    late = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": True}, headers={"If-Match": tag})
    assert (late.status_code, late.json()["type"], late.json()["version"]) == (412, "/problems/version-conflict", 2)
    assert (await client.get(f"/v1/hosts/{HOST}")).json()["enabled"] is False
    for given in (first.headers["etag"], "*", 'W/"2"'):
        again = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": given})
        assert again.status_code == 200
    rubbish = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": "2"})
    assert (rubbish.status_code, rubbish.json()["type"]) == (422, "/problems/bad-field")


async def test_what_has_or_had_mailboxes_stays(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    await client.delete(f"/v1/users/{made.json()['id']}")
    answer = await client.delete(f"/v1/hosts/{HOST}")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/host-in-use")
    assert (await client.get(f"/v1/hosts/{HOST}")).status_code == 200


async def test_the_worker_is_seen(client: httpx.AsyncClient, worker_database: Database, clock: Clock) -> None:
    before = await client.get(f"/v1/hosts/{HOST}")
    status = {
        "host": HOST,
        "heartbeat_at": clock() - timedelta(seconds=3),
        "started_at": clock() - timedelta(hours=1),
        "release": "0.1.0",
        "swept_at": clock() - timedelta(minutes=5),
        "sweep": {"checked": 3, "repaired": 1},
    }
    async with worker_database.write.begin() as connection:
        await connection.execute(insert(host_status), status)
    after = await client.get(f"/v1/hosts/{HOST}", headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200, "a heartbeat is news"
    assert after.json()["heartbeat_at"] == "2026-11-23T11:59:57Z"
    assert (after.json()["release"], after.json()["sweep"]) == ("0.1.0", {"checked": 3, "repaired": 1})
    listed = await client.get("/v1/hosts")
    assert listed.json()["items"] == [after.json()]
    same = await client.get(f"/v1/hosts/{HOST}", headers={"If-None-Match": after.headers["etag"]})
    assert same.status_code == 304
    # It takes part in reading only: no heartbeat makes a change fail.
    changed = await client.patch(
        f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": before.headers["etag"]}
    )
    assert changed.status_code == 200


async def test_lists_page_by_name(client: httpx.AsyncClient) -> None:
    for name in ("b", "a", "z-1", "c.d"):
        await add(client, name)
    seen: list[str] = []
    cursor = None
    while True:
        page = await client.get("/v1/hosts", params={"limit": 2, **({"cursor": cursor} if cursor else {})})
        seen += [item["name"] for item in page.json()["items"]]
        cursor = page.json()["next_cursor"]
        if cursor is None:
            break
        assert f"cursor={cursor}" in page.headers["link"]
    assert seen == ["a", "b", "c.d", HOST, "z-1"]
    for bad in ("limit=0", "limit=501", "cursor=%C3%BC", "cursor=gP8", "enabled=true"):
        assert (await client.get(f"/v1/hosts?{bad}")).status_code == 422, bad


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize(("name", "status"), [("none", 404), ("ü", 422), ("%00", 422), ("x" * 65, 422), ("A", 422)])
async def test_what_is_not_there(client: httpx.AsyncClient, method: str, name: str, status: int) -> None:
    body = {"json": {"enabled": True}} if method == "PATCH" else {}
    answer = await client.request(method, f"/v1/hosts/{name}", **body)  # type: ignore[arg-type]
    assert answer.status_code == status, answer.text


async def test_a_repeat_with_the_same_key_makes_nothing_twice(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await client.post("/v1/hosts", json={"name": "mail2"}, headers=headers)
    await client.patch("/v1/hosts/mail2", json={"enabled": False})
    repeat = await client.post("/v1/hosts", json={"name": "mail2"}, headers=headers)
    assert (first.status_code, repeat.status_code) == (201, 201)
    assert repeat.headers["idempotency-replayed"] == "true"
    assert repeat.json()["enabled"] is False, "the host as it is now"


async def test_a_deletion_may_ask_for_a_version(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/hosts", json={"name": "mail9"})
    url = made.headers["location"]
    assert (await client.delete(url, headers={"If-Match": '"99.0"'})).status_code == 412
    assert (await client.delete(url, headers={"If-Match": made.headers["etag"]})).status_code == 204


# Settings


async def settle(client: httpx.AsyncClient, **settings: Any) -> httpx.Response:
    return await client.patch(f"/v1/hosts/{HOST}", json={"settings": settings})


async def stored(database: Database) -> Any:
    async with database.read.connect() as connection:
        return (await connection.execute(select(hosts.c.settings).where(hosts.c.name == HOST))).scalar_one()


async def sync_jobs(database: Database) -> list[tuple[Any, ...]]:
    columns = (jobs.c.host, jobs.c.lane, jobs.c.kind, jobs.c.subject_id, jobs.c.version)
    async with database.read.connect() as connection:
        return [tuple(row) for row in await connection.execute(select(*columns).order_by(jobs.c.id))]


async def test_single_settings_are_merged_and_null_is_the_default(
    client: httpx.AsyncClient, database: Database
) -> None:
    defaults = HostSettings().model_dump(mode="json")
    first = await settle(client, imap_port=1143, pop3_enabled=False)
    assert first.status_code == 200
    assert first.json()["settings"] == {**defaults, "imap_port": 1143, "pop3_enabled": False}
    assert (first.json()["version"], first.json()["ready"]) == (2, False)
    job = first.json()["job"]
    assert first.headers["link"] == f'<{job["url"]}>; rel="monitor"'
    second = await settle(client, smtp_port=1025, imap_port=None)
    assert second.json()["settings"] == {**defaults, "smtp_port": 1025, "pop3_enabled": False}
    assert await stored(database) == {"smtp_port": 1025, "pop3_enabled": False}, "only what differs from the defaults"
    assert (await client.get(f"/v1/hosts/{HOST}")).json() == second.json()
    # What is so already: no version, no job.
    for same in ({}, {"smtp_port": 1025}, {"imap_port": None}, {"imap_port": defaults["imap_port"]}):
        assert (await settle(client, **same)).json()["version"] == 3, same
    assert await sync_jobs(database) == [(HOST, "mailhost", "mailhost.sync", 1, version) for version in (2, 3)]
    both = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False, "settings": {"pop3_enabled": None}})
    assert (both.json()["version"], both.json()["enabled"]) == (4, False)
    assert await stored(database) == {"smtp_port": 1025}
    async with database.read.connect() as connection:
        query = select(audit_events.c.before, audit_events.c.after).where(audit_events.c.action == "hosts.change")
        events = [tuple(row) for row in await connection.execute(query.order_by(audit_events.c.id))]
    assert events[1] == (
        {"settings": {"imap_port": 1143, "pop3_enabled": False}},
        {"settings": {"pop3_enabled": False, "smtp_port": 1025}},
    )


@pytest.mark.parametrize(
    ("sent", "pointer"),
    [
        ({"smtp_port": 0}, "/settings/smtp_port"),
        ({"smtp_port": 65536}, "/settings/smtp_port"),
        ({"smtp_port": "25"}, "/settings/smtp_port"),
        ({"smtp_port": True}, "/settings/smtp_port"),
        ({"smtp_port": 25.5}, "/settings/smtp_port"),
        ({"smtp_port": [25]}, "/settings/smtp_port"),
        ({"smtp_port": {"$": 25}}, "/settings/smtp_port"),
        ({"smtp_port": "25\nroot"}, "/settings/smtp_port"),
        ({"pop3_enabled": "yes"}, "/settings/pop3_enabled"),
        ({"pop3_enabled": 1}, "/settings/pop3_enabled"),
        ({"message_size_limit": 10**20}, "/settings/message_size_limit"),
        ({"smtp_port": 143}, "/settings"),
        ({"imap_port": 2525, "imaps_port": 2525}, "/settings"),
        ({"no_such": 1}, "/settings/no_such"),
        ({"no_such": None}, "/settings/no_such"),
        ({"a/b~c": 1}, "/settings/a~1b~0c"),
        ({"x" * 1000: 1}, "/settings/" + "x" * 64),
        # No settings: secrets, paths and trusted networks stay in the host's own file.
        ({"postfix_password": "secret"}, "/settings/postfix_password"),
        ({"tls_key": "/etc/shadow"}, "/settings/tls_key"),
        ({"trusted_networks": ["0.0.0.0/0"]}, "/settings/trusted_networks"),
        ({"homes": "/"}, "/settings/homes"),
        ({"model_fields": 1}, "/settings/model_fields"),
    ],
)
@pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
async def test_a_setting_that_cannot_be_is_named_and_nothing_changes(
    client: httpx.AsyncClient, database: Database, sent: dict[str, Any], pointer: str
) -> None:
    answer = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False, "settings": sent})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-field")
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    for value in ("secret", "shadow", "root"):
        assert value not in answer.text
    host = (await client.get(f"/v1/hosts/{HOST}")).json()
    assert (host["enabled"], host["version"], host["job"]) == (True, 1, None)
    assert await sync_jobs(database) == []


async def test_a_collision_with_what_was_set_before(client: httpx.AsyncClient) -> None:
    assert (await settle(client, imap_port=2143)).status_code == 200
    assert (await settle(client, smtp_port=2143)).status_code == 422
    assert (await settle(client, smtp_port=143)).status_code == 200
    assert (await settle(client, imap_port=None)).status_code == 422, "the default is somebody else's by now"


async def test_a_setting_of_an_earlier_release_is_in_nobodys_way(client: httpx.AsyncClient, database: Database) -> None:
    async with database.write.begin() as connection:
        await connection.execute(update(hosts).values(settings={"gone": 1, "imap_port": 2143}))
    assert (await client.get(f"/v1/hosts/{HOST}")).json()["settings"]["imap_port"] == 2143
    assert (await settle(client, smtp_port=2525)).status_code == 200
    assert await stored(database) == {"smtp_port": 2525, "imap_port": 2143}


async def test_ready_is_the_version_and_no_failed_proof(client: httpx.AsyncClient, worker_database: Database) -> None:
    changed = await settle(client, smtp_port=2525)
    waiting = await client.get(f"/v1/hosts/{HOST}")

    async def applies(version: int, result: str) -> None:
        outcome = Outcome(version, True, {"postfix": {"result": result, "detail": "its answer"}}, {})
        async with worker_database.write.begin() as connection:
            await record(connection, HOST, MAILHOST_SYNC, THE_HOST, outcome, utc_now())

    await applies(1, "ok")
    assert (await client.get(f"/v1/hosts/{HOST}")).json()["ready"] is False, "an older version"
    await applies(2, "failed")
    failed = await client.get(f"/v1/hosts/{HOST}")
    assert (failed.json()["ready"], failed.json()["proofs"]["postfix"]["result"]) == (False, "failed")
    await applies(2, "not configured")
    ready = await client.get(f"/v1/hosts/{HOST}", headers={"If-None-Match": waiting.headers["etag"]})
    assert (ready.status_code, ready.json()["ready"], ready.json()["job"]) == (200, True, None), "that is news"
    same = await client.get(f"/v1/hosts/{HOST}", headers={"If-None-Match": ready.headers["etag"]})
    assert same.status_code == 304
    again = await client.patch(
        f"/v1/hosts/{HOST}", json={"settings": {}}, headers={"If-Match": changed.headers["etag"], "Prefer": "wait=9"}
    )
    assert (again.status_code, again.json()) == (200, ready.json())
    assert (await client.get("/v1/hosts")).json()["items"] == [ready.json()]


async def test_a_dead_job_of_a_host_is_tried_again(
    client: httpx.AsyncClient, worker_database: Database, clock: Clock
) -> None:
    await settle(client, smtp_port=2525)
    [job] = await claim(worker_database, HOST, clock(), limit=10, kinds=[MAILHOST_SYNC])
    await give_up(worker_database, job, "postfix check says no", clock())
    host = (await client.get(f"/v1/hosts/{HOST}")).json()
    assert (host["job"]["state"], host["job"]["error"]) == ("dead", "postfix check says no")
    await settle(client, smtp_port=2526)
    answer = await client.post(f"/v1/jobs/{job.id}/retry")
    assert (answer.status_code, answer.json()["kind"], answer.json()["host"], answer.json()["version"]) == (
        202,
        "mailhost.sync",
        HOST,
        3,
    )
