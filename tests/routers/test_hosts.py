"""Mail hosts: added, switched off, set up; removed only while nothing lies on them."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update

from app.db import Database, utc_now
from app.mailconfig.hosts import HostSettings
from app.models.audit_events import audit_events
from app.models.hosts import host_status, hosts
from app.models.jobs import jobs
from app.queue.claim import Outcome, claim, finish, give_up, record
from app.queue.contracts import ALIASES_SYNC, MAILHOST_SYNC, THE_HOST
from tests.conftest import HOST, PRIMARY, Clock
from tests.routers.accounts import ALICE, apply, make_alias, make_user, post_alias

pytestmark = pytest.mark.asyncio


async def add(client: httpx.AsyncClient, name: str = "mail2", **members: Any) -> dict[str, Any]:
    answer = await client.post("/v1/hosts", json={"name": name, **members})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def test_a_host_is_added_read_and_removed(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/hosts", json={"name": "mail2"})
    assert answer.status_code == 202
    assert answer.headers["location"] == "/v1/hosts/mail2"
    job = answer.json()["job"]
    assert (job["state"], answer.headers["link"]) == ("ready", f'<{job["url"]}>; rel="monitor"')
    assert answer.json() == {
        "name": "mail2",
        "enabled": True,
        "version": 1,
        "created_at": "2026-11-23T12:00:00Z",
        "updated_at": "2026-11-23T12:00:00Z",
        **dict.fromkeys(("heartbeat_at", "started_at", "release", "swept_at", "sweep")),
        "job": job,
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
    assert (changed.status_code, changed.json()["enabled"], changed.json()["version"]) == (202, False, 2)
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
    for same in ({"enabled": True}, {}):
        answer = await client.patch(f"/v1/hosts/{HOST}", json=same)
        assert (answer.status_code, answer.json()["version"]) == (202, 1), "and its worker has not been there yet"
    for bad in ({"enabled": None}, {"settings": None}, {"name": "x"}, {"enabled": True, "name": "x"}):
        assert (await client.patch(f"/v1/hosts/{HOST}", json=bad)).status_code == 422, bad


async def test_if_match_protects_a_change(client: httpx.AsyncClient) -> None:
    tag = (await client.get(f"/v1/hosts/{HOST}")).headers["etag"]
    first = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": tag})
    assert first.status_code == 202
    late = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": True}, headers={"If-Match": tag})
    assert (late.status_code, late.json()["type"], late.json()["version"]) == (412, "/problems/version-conflict", 2)
    assert (await client.get(f"/v1/hosts/{HOST}")).json()["enabled"] is False
    for given in (first.headers["etag"], "*", 'W/"2"'):
        again = await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": given})
        assert again.status_code == 202
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
    async with worker_database.read.connect() as connection:
        since = (await connection.execute(select(hosts.c.created_at))).scalar_one()
    status = {
        "host": HOST,
        "heartbeat_at": since + timedelta(seconds=3),
        "started_at": clock() - timedelta(hours=1),
        "release": "0.1.0",
        "swept_at": clock() - timedelta(minutes=5),
        "sweep": {"checked": 3, "repaired": 1},
    }
    async with worker_database.write.begin() as connection:
        await connection.execute(insert(host_status), status)
    after = await client.get(f"/v1/hosts/{HOST}", headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200, "a heartbeat is news"
    assert datetime.fromisoformat(after.json()["heartbeat_at"]) == status["heartbeat_at"]
    assert (after.json()["release"], after.json()["sweep"]) == ("0.1.0", {"checked": 3, "repaired": 1})
    listed = await client.get("/v1/hosts")
    assert listed.json()["items"] == [after.json()]
    same = await client.get(f"/v1/hosts/{HOST}", headers={"If-None-Match": after.headers["etag"]})
    assert same.status_code == 304
    # It takes part in reading only: no heartbeat makes a change fail.
    changed = await client.patch(
        f"/v1/hosts/{HOST}", json={"enabled": False}, headers={"If-Match": before.headers["etag"]}
    )
    assert changed.status_code == 202


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
    assert (first.status_code, repeat.status_code) == (202, 202)
    assert repeat.headers["idempotency-replayed"] == "true"
    assert repeat.json()["enabled"] is False, "the host as it is now"


async def test_a_deletion_may_ask_for_a_version(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/hosts", json={"name": "mail9"})
    url = made.headers["location"]
    assert (await client.delete(url, headers={"If-Match": '"99.0"'})).status_code == 412
    assert (await client.delete(url, headers={"If-Match": made.headers["etag"]})).status_code == 204


async def test_what_an_earlier_host_of_the_name_did_is_not_this_ones(
    client: httpx.AsyncClient, database: Database, worker_database: Database, clock: Clock
) -> None:
    """Neither ready nor alive by what was applied and reported for another, whose versions this one would count through again;
    and not kept from being ready by it."""
    await make_user(client, "alice")
    await add(client)
    await client.patch("/v1/hosts/mail2", json={"settings": {"smtp_port": 2525}})
    alias = await make_alias(client, "pr", ALICE)

    async def applies(version: int) -> None:
        outcome = Outcome(version, True, {"files": {"result": "ok", "detail": None}}, {})
        async with worker_database.write.begin() as connection:
            await record(connection, "mail2", MAILHOST_SYNC, THE_HOST, outcome, clock())

    for host in (HOST, "mail2"):
        await apply(worker_database, alias["id"], 1, host=host)
    for version in (1, 2):
        await applies(version)
    status = {"host": "mail2", "heartbeat_at": clock(), "started_at": clock(), "release": "0"}
    async with worker_database.write.begin() as connection:
        await connection.execute(insert(host_status), status)
    assert (await client.get("/v1/hosts/mail2")).json()["ready"] is True
    assert (await client.get(f"/v1/aliases/{alias['id']}")).json()["ready"] is True
    assert (await client.delete("/v1/hosts/mail2")).status_code == 204
    clock.forward(hours=1)
    made = await add(client)
    assert (made["ready"], made["version"], made["heartbeat_at"], made["started_at"]) == (False, 3, None, None)
    for _ in range(2):  # settings are changed as often as the first one's
        assert made["ready"] is False
        assert (await client.get(f"/v1/aliases/{alias['id']}")).json()["ready"] is False
        made = (await client.patch("/v1/hosts/mail2", json={"enabled": not made["enabled"]})).json()
    assert (made["version"], made["job"]["state"]) == (5, "ready")
    await applies(5)
    await apply(worker_database, alias["id"], 3, host="mail2")
    await apply(worker_database, alias["id"], 3)
    assert (await client.get("/v1/hosts/mail2")).json()["ready"] is True
    assert (await client.get(f"/v1/aliases/{alias['id']}")).json()["ready"] is True


async def test_a_worker_that_is_late_with_an_earlier_hosts_job(
    client: httpx.AsyncClient, worker_database: Database, clock: Clock
) -> None:
    """It had read the version of a host that was removed and added again meanwhile."""
    await add(client)
    await client.patch("/v1/hosts/mail2", json={"settings": {"smtp_port": 2525}})
    await client.delete("/v1/hosts/mail2")
    made = await add(client)
    assert made["version"] == 3, "above what was asked, though nothing was applied"
    [job] = await claim(worker_database, "mail2", clock(), limit=1, kinds=[MAILHOST_SYNC])
    await finish(worker_database, job, Outcome(2, True, {}, {}), clock())
    late = (await client.get("/v1/hosts/mail2")).json()
    assert (late["ready"], late["job"]["id"]) == (False, made["job"]["id"])


async def test_an_enabled_host_looks_at_every_alias(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    first, second, gone = [await make_alias(client, name, ALICE) for name in ("a", "b", "c")]
    await client.delete(f"/v1/aliases/{gone['id']}")

    async def asked(host: str) -> list[tuple[Any, ...]]:
        query = select(jobs.c.subject_id, jobs.c.version, jobs.c.lane).order_by(jobs.c.id)
        async with database.read.connect() as connection:
            found = await connection.execute(query.where(jobs.c.host == host, jobs.c.kind == ALIASES_SYNC))
            return [tuple(row) for row in found]

    await add(client, "new")
    of_both = [(alias["id"], 2, "aliases") for alias in (first, second)]
    assert await asked("new") == of_both
    assert (await asked(HOST))[-2:] == of_both, "they are of another version now, there too"
    await add(client, "off", enabled=False)
    assert await asked("off") == []
    await client.patch("/v1/hosts/off", json={"settings": {"smtp_port": 2525}})
    assert await asked("off") == []
    await client.patch("/v1/hosts/off", json={"enabled": True})
    assert await asked("off") == [(alias["id"], 3, "aliases") for alias in (first, second)]
    await client.patch("/v1/hosts/off", json={"enabled": False})
    assert len(await asked("off")) == 2


# SRS


def srs_needed(answer: httpx.Response) -> tuple[int, str, str, list[str]]:
    problem = answer.json()
    return answer.status_code, problem["type"], problem["errors"][0]["pointer"], problem["aliases"]


async def test_srs_stays_on_while_aliases_lead_elsewhere(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    await client.post("/v1/domains", json={"name": "lists.test", "kind": "relay"})
    await settle(client, srs=True)
    relayed = await make_alias(client, "relayed", "team@lists.test")
    gone = await make_alias(client, "gone", "x@example.net")
    await client.delete(f"/v1/aliases/{gone['id']}")
    assert (await settle(client, srs=None)).status_code == 202, "what is relayed, or was deleted, needs none"
    assert (await settle(client, srs=True)).status_code == 202
    pr = await make_alias(client, "pr", ALICE, "x@example.net")
    info = await make_alias(client, "info", pr["address"], "y@example.net", "z@example.net")
    before = (await client.get(f"/v1/hosts/{HOST}")).json()
    for off in (None, False):
        refused = await settle(client, srs=off, smtp_port=2525)
        named = [info["address"], pr["address"]]
        assert srs_needed(refused) == (409, "/problems/srs-needed", "/settings/srs", named)
        assert refused.json()["detail"].startswith(f"{info['address']}, {pr['address']} lead to other mail servers")
    refused = await client.post("/v1/hosts", json={"name": "mail2"})
    assert srs_needed(refused)[:3] == (409, "/problems/srs-needed", "/enabled")
    assert (await client.get("/v1/hosts/mail2")).status_code == 404
    await add(client, enabled=False)
    refused = await client.patch("/v1/hosts/mail2", json={"enabled": True})
    assert srs_needed(refused)[:3] == (409, "/problems/srs-needed", "/enabled")
    assert (await client.get(f"/v1/hosts/{HOST}")).json() == before
    both = await client.patch("/v1/hosts/mail2", json={"enabled": True, "settings": {"srs": True}})
    assert (both.status_code, both.json()["enabled"]) == (202, True)
    # Nobody passes anything on there.
    off = await client.patch("/v1/hosts/mail2", json={"enabled": False, "settings": {"srs": None}})
    assert off.status_code == 202
    assert (await client.patch("/v1/hosts/mail2", json={"settings": {"smtp_port": 2525}})).status_code == 202
    for alias in (pr, info):
        await client.patch(f"/v1/aliases/{alias['id']}", json={"destinations": [ALICE]})
    assert (await settle(client, srs=False)).status_code == 202
    assert relayed["destinations"] == ["team@lists.test"]


async def test_many_that_lead_elsewhere_are_counted(client: httpx.AsyncClient) -> None:
    await settle(client, srs=True)
    for number in range(12):
        await make_alias(client, f"a{number:02}", "x@example.net")
    refused = await settle(client, srs=False)
    assert refused.json()["aliases"] == [f"a{number:02}@{PRIMARY}" for number in range(10)]
    assert f"a09@{PRIMARY} and 2 more lead to" in refused.json()["detail"]


async def test_of_srs_off_and_an_alias_elsewhere_at_once_one_is_refused(client: httpx.AsyncClient) -> None:
    won = set()
    for turn in range(12):
        assert (await settle(client, srs=True)).status_code == 202
        steps = [settle(client, srs=False), post_alias(client, f"a{turn}", "x@example.net")]
        pause = (turn % 4) * 0.001
        order = steps if turn % 2 else steps[::-1]

        async def late(step: Any, seconds: float = pause) -> httpx.Response:
            await asyncio.sleep(seconds)
            return await step  # type: ignore[no-any-return]

        answers = await asyncio.gather(order[0], late(order[1]))
        off, made = answers if turn % 2 else reversed(answers)
        assert sorted((off.status_code, made.status_code)) in ([202, 409], [202, 422]), (off.text, made.text)
        won.add(off.status_code)
        if made.status_code == 202:
            await client.delete(f"/v1/aliases/{made.json()['id']}")
    assert won == {202, 409}, "each of them at times"


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
    assert first.status_code == 202
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
    assert (await settle(client, imap_port=2143)).status_code == 202
    assert (await settle(client, smtp_port=2143)).status_code == 422
    assert (await settle(client, smtp_port=143)).status_code == 202
    assert (await settle(client, imap_port=None)).status_code == 422, "the default is somebody else's by now"


async def test_a_setting_of_an_earlier_release_is_in_nobodys_way(client: httpx.AsyncClient, database: Database) -> None:
    async with database.write.begin() as connection:
        await connection.execute(update(hosts).values(settings={"gone": 1, "imap_port": 2143}))
    assert (await client.get(f"/v1/hosts/{HOST}")).json()["settings"]["imap_port"] == 2143
    assert (await settle(client, smtp_port=2525)).status_code == 202
    assert await stored(database) == {"smtp_port": 2525, "imap_port": 2143}


async def test_ready_is_the_version_and_no_failed_proof(client: httpx.AsyncClient, worker_database: Database) -> None:
    changed = await settle(client, smtp_port=2525)
    assert changed.status_code == 202
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
