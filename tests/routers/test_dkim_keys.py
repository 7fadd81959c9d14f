"""DKIM keys over HTTP: made, read, activated, given up, rotated; and what is refused, without a change."""

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import select

from app.addresses import DomainName
from app.db import Database, utc_now
from app.errors import BadField, RotationUnderWay, VersionConflict
from app.models.audit_events import Outcome, audit_events
from app.models.dkim_keys import Algorithm, DkimState, dkim_keys
from app.models.hosts import SERVICE_HOST
from app.models.jobs import jobs
from app.queue.claim import claim, give_up
from app.queue.contracts import DKIM_SYNC
from app.services.changes import Change
from app.services.dkim_keys import DKIM_KEYS, check_public_key, rotate_dkim_keys, set_dkim_state
from tests.conftest import ACTOR, HOST, PRIMARY, Clock, TestDatabase
from tests.routers.keys import KEYS, PROVED, apply_key, bring_to, make_key, prove, public_key

pytestmark = pytest.mark.asyncio

OTHER = "other.test"
TIMES = "generated published active probed proved retiring revoked removed due checked".split()


@pytest_asyncio.fixture
async def service_database(test_database: TestDatabase) -> AsyncIterator[Database]:
    """As the service process's user."""
    database = Database(test_database.url("service"))
    yield database
    await database.close()


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list(await connection.execute(query))


async def asked(database: Database) -> list[tuple[str, str, int, int]]:
    """All jobs about keys, in the order in which they were added."""
    kinds = jobs.c.kind.in_(["dkim.sync", "dns.publish"])
    query = select(jobs.c.host, jobs.c.kind, jobs.c.subject_id, jobs.c.version).where(kinds).order_by(jobs.c.id)
    return [tuple(row) for row in await rows(database, query)]


async def events(database: Database) -> list[Any]:
    done = audit_events.c.outcome == Outcome.ACCEPTED
    query = select(audit_events).where(audit_events.c.subject_kind == "dkim-key", done).order_by(audit_events.c.id)
    return await rows(database, query)


async def add_host(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.post("/v1/hosts", json={"name": name})).status_code == 202


async def active(client: httpx.AsyncClient, database: Database, **members: Any) -> dict[str, Any]:
    """A new key that signs, and was proved."""
    key = await make_key(client, activate=True, **members)
    await bring_to(database, key, DkimState.ACTIVE, proved_at=utc_now())
    return key


async def test_a_key_is_made(client: httpx.AsyncClient, seeded: Database) -> None:
    answer = await client.post(KEYS, json={})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"{KEYS}/202611a"
    key = answer.json()
    assert answer.headers["link"] == f'<{key["job"]["url"]}>; rel="monitor"'
    assert answer.headers["etag"].startswith('"1.')
    assert key == {
        "id": key["id"],
        "domain": PRIMARY,
        "host": HOST,
        "selector": "202611a",
        "algorithm": "rsa-2048",
        "state": "generating",
        "activate": False,
        "next_step": "The host mail makes the private key.",
        "problem": None,
        "record": None,
        "dns": None,
        "version": 1,
        "created_at": "2026-11-23T12:00:00Z",
        "updated_at": "2026-11-23T12:00:00Z",
        **{f"{name}_at": None for name in TIMES},
        "ready": False,
        "proofs": {},
        "job": {"id": key["job"]["id"], "state": "ready", "error": None, "url": key["job"]["url"]},
    }
    assert (await client.get(f"{KEYS}/202611A")).json() == key
    assert await asked(seeded) == [(HOST, "dkim.sync", key["id"], 1)]
    [event] = await events(seeded)
    assert (event.action, event.subject_id, event.before) == ("dkim-keys.create", str(key["id"]), None)
    assert event.after == {
        "domain": PRIMARY,
        "host": HOST,
        "selector": "202611a",
        "algorithm": "rsa-2048",
        "state": "generating",
        "activate": False,
    }


async def test_all_of_it_can_be_chosen(client: httpx.AsyncClient) -> None:
    await add_host(client, "mail2")
    key = await make_key(client, host="mail2", selector="Mail.One", algorithm="ed25519", activate=True)
    shown = [key[name] for name in ("host", "selector", "algorithm", "activate")]
    assert shown == ["mail2", "mail.one", "ed25519", True]
    assert (await client.get(f"{KEYS}/mail.one")).status_code == 200


async def test_what_the_host_did_is_shown(client: httpx.AsyncClient, worker_database: Database) -> None:
    key = await make_key(client)
    await apply_key(worker_database, key)
    shown = (await client.get(f"{KEYS}/202611a")).json()
    assert (shown["ready"], shown["job"], shown["proofs"]) == (True, None, PROVED)
    assert shown["record"] is None, "only what the service process has looked at is believed"
    await apply_key(worker_database, key, {"key": {"result": "failed", "detail": "it is not root's"}})
    shown = (await client.get(f"{KEYS}/202611a")).json()
    assert (shown["ready"], shown["proofs"]["key"]["detail"]) == (False, "it is not root's")


async def test_prefer_wait_ends_with_a_dead_job(
    client: httpx.AsyncClient, worker_database: Database, clock: Clock
) -> None:
    await make_key(client)
    [job] = await claim(worker_database, HOST, clock(), limit=1, kinds=[DKIM_SYNC])
    waiting = asyncio.create_task(client.get(f"{KEYS}/202611a", headers={"Prefer": "wait=20"}))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await give_up(worker_database, job, "the disk is full", clock())
    answer = await asyncio.wait_for(waiting, 10)
    assert answer.headers["preference-applied"] == "wait"
    assert (answer.status_code, answer.json()["job"]["error"]) == (200, "the disk is full")
    retried = await client.post(f"{answer.json()['job']['url']}/retry")
    assert (retried.json()["kind"], retried.json()["state"]) == ("dkim.sync", "ready")
    assert retried.json()["subject_id"] == answer.json()["id"]


async def test_selectors_are_made_one_after_another_and_never_twice(
    client: httpx.AsyncClient, seeded: Database, clock: Clock
) -> None:
    letters = [*"abdefghijklmnopqrstuvwxyz"]
    await make_key(client, selector="202611c")
    for letter in [*letters, "aa"]:
        key = await make_key(client)
        assert key["selector"] == f"202611{letter}"
    await bring_to(seeded, {**key, "selector": "202611a"}, DkimState.REMOVED)
    assert (await make_key(client))["selector"] == "202611ab"
    clock.forward(days=30)
    assert (await make_key(client))["selector"] == "202612a"
    await client.post("/v1/domains", json={"name": OTHER})
    assert (await make_key(client, f"/v1/domains/{OTHER}/dkim-keys"))["selector"] == "202612a"


async def test_a_selector_is_taken_once(client: httpx.AsyncClient, seeded: Database) -> None:
    key = await make_key(client, selector="mail")
    await bring_to(seeded, key, DkimState.REMOVED)
    answer = await client.post(KEYS, json={"selector": "MAIL"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/dkim-key-exists")
    assert answer.json()["errors"][0]["pointer"] == "/selector"
    answers = await asyncio.gather(*(client.post(KEYS, json={"selector": "one"}) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 5
    made = await asyncio.gather(*(client.post(KEYS, json={}) for _ in range(6)))
    assert sorted(answer.json()["selector"] for answer in made) == [f"202611{letter}" for letter in "abcdef"]


NOT_LDH = (
    "",
    "-",
    "a-",
    "-a",
    "a_b",
    "a..b",
    ".a",
    "a.",
    "a/b",
    "../x",
    "a\n",
    "a\nb",
    "a b",
    "ä",
    "x" * 64,
    "a\x00",
    "*",
    '"',
)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        *(({"selector": selector}, "/selector") for selector in (*NOT_LDH, 5)),
        ({"host": "../mail"}, "/host"),
        ({"algorithm": "rsa-1024"}, "/algorithm"),
        ({"algorithm": None}, "/algorithm"),
        ({"activate": "perhaps"}, "/activate"),
        ({"private_key": "x"}, "/private_key"),
        ({"state": "active"}, "/state"),
        ({"public_key": "A" * 1025}, "/public_key"),
        ({"public_key": "no base64"}, "/public_key"),
        ({"public_key": ""}, "/public_key"),
        ({"public_key": 'AA==" "v=x'}, "/public_key"),
    ],
)
async def test_bad_input_is_named_and_changes_nothing(
    client: httpx.AsyncClient, seeded: Database, body: dict[str, Any], pointer: str
) -> None:
    answer = await client.post(KEYS, json=body)
    assert answer.status_code == 422, answer.text
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert (await client.get(KEYS)).json()["items"] == []
    assert await asked(seeded) == []


PATHS = [
    "/v1/domains/a_b.test/dkim-keys",
    "/v1/domains/..%2F..%2Fetc/dkim-keys",
    "/v1/domains/cacert.test%0A/dkim-keys",
    f"{KEYS}/a_b",
    f"{KEYS}/a%0A",
    f"{KEYS}/..%2Fx",
    f"{KEYS}/%2E%2E",
    f"{KEYS}/a%00",
    f"{KEYS}/ä",
    f"{KEYS}/a..b",
    f"{KEYS}/{'x' * 64}",
]


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_that_is_not_ldh_is_refused(client: httpx.AsyncClient, path: str) -> None:
    await make_key(client, selector="a")
    refused = (404, 405, 422) if "%2F" in path or "%2E" in path else (422,)
    for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/activate")):
        answer = await client.request(method, path + tail)
        assert answer.status_code in refused or (answer.status_code == 405 and path.endswith("dkim-keys")), answer.text
    [key] = (await client.get(KEYS)).json()["items"]
    assert key["version"] == 1


@pytest.mark.parametrize("path", [f"/v1/domains/{OTHER}/dkim-keys", f"/v1/domains/{OTHER}/dkim-keys/mail"])
async def test_a_relay_domain_has_no_keys(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404
    await client.post("/v1/domains", json={"name": OTHER, "kind": "relay"})
    for method, url in (("POST", ""), ("POST", "/rotate"), ("POST", "/mail/activate"), ("DELETE", "/mail")):
        answer = await client.request(method, f"/v1/domains/{OTHER}/dkim-keys{url}", json={})
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-is-relay"), url


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": OTHER})
    await make_key(client, f"/v1/domains/{OTHER}/dkim-keys", selector="mail")
    for method, url, says in (
        ("GET", f"{KEYS}/mail", "no DKIM key mail"),  # of the other domain
        ("DELETE", f"{KEYS}/mail", "no DKIM key mail"),
        ("POST", f"{KEYS}/mail/activate", "no DKIM key mail"),
        ("GET", "/v1/domains/none.test/dkim-keys", "no domain none.test"),
        ("GET", "/v1/domains/none.test/dkim-keys/mail", "no domain none.test"),
        ("POST", "/v1/domains/none.test/dkim-keys", "no domain none.test"),
        ("POST", "/v1/domains/none.test/dkim-keys/rotate", "no domain none.test"),
        ("DELETE", "/v1/domains/none.test/dkim-keys/mail", "no domain none.test"),
    ):
        answer = await client.request(method, url, json={})
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found"), url
        assert says in answer.json()["detail"]


async def test_the_host_is_one_that_is_enabled(client: httpx.AsyncClient) -> None:
    await add_host(client, "mail2")
    for url in (KEYS, f"{KEYS}/rotate"):
        answer = await client.post(url, json={"host": "mail3"})
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/host-not-chosen")
    answer = await client.post(KEYS, json={})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (409, "/host")
    await client.patch("/v1/hosts/mail2", json={"enabled": False})
    assert (await client.post(KEYS, json={"host": "mail2"})).status_code == 409
    assert (await make_key(client))["host"] == HOST
    await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
    for url in (KEYS, f"{KEYS}/rotate"):
        assert (await client.post(url, json={})).json()["type"] == "/problems/host-not-chosen"


async def test_a_host_with_keys_is_not_removed(client: httpx.AsyncClient, seeded: Database) -> None:
    await add_host(client, "mail2")
    key = await make_key(client, host="mail2")
    answer = await client.delete("/v1/hosts/mail2")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/host-in-use")
    assert "DKIM keys" in answer.json()["detail"]
    await bring_to(seeded, key, DkimState.REMOVED)
    assert (await client.delete("/v1/hosts/mail2")).status_code == 204


async def test_a_domain_with_keys_is_not_removed(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": OTHER})
    await make_key(client, f"/v1/domains/{OTHER}/dkim-keys")
    answer = await client.delete(f"/v1/domains/{OTHER}")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-in-use")
    assert "DKIM keys" in answer.json()["detail"]


async def test_a_key_that_is_there_already_begins_unpublished(client: httpx.AsyncClient) -> None:
    known = public_key(Algorithm.RSA_2048)
    key = await make_key(client, selector="mail", public_key=known, activate=True)
    assert (key["state"], key["generated_at"]) == ("unpublished", "2026-11-23T12:00:00Z")
    record = key["record"]
    assert record["name"] == f"mail._domainkey.{PRIMARY}"
    assert (record["type"], record["value"]) == ("TXT", f"v=DKIM1; k=rsa; p={known}")
    assert "by hand" in key["next_step"]


@pytest.mark.parametrize("given", list(Algorithm))
@pytest.mark.parametrize("named", list(Algorithm))
async def test_a_public_key_is_of_its_algorithm(named: Algorithm, given: Algorithm) -> None:
    if named is given:
        check_public_key(named, public_key(given))
        return
    with pytest.raises(BadField):
        check_public_key(named, public_key(given))


@pytest.mark.parametrize("text", ["", "=", "A", "AA", "AB==", "AA== ", "AA==\n", "ä", '"', "-_-_", "A" * 43 + "="])
async def test_a_public_key_is_base64_in_its_one_form(text: str) -> None:
    """What is not refused here is written into the DNS."""
    with pytest.raises(BadField):
        check_public_key(Algorithm.RSA_2048, text)


async def test_the_same_octets_in_another_form_are_refused() -> None:
    """Two bits of the last digit count for nothing."""
    known = public_key(Algorithm.ED25519)
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = known[:-2] + digits[digits.index(known[-2]) + 1] + "="
    assert b64decode(other) == b64decode(known)
    with pytest.raises(BadField):
        check_public_key(Algorithm.ED25519, other)


async def test_the_record_as_text_and_for_a_zone_file(client: httpx.AsyncClient, seeded: Database) -> None:
    key = await make_key(client, algorithm="rsa-3072")
    url = f"{KEYS}/{key['selector']}"
    none = await client.get(url, params={"format": "zone"})
    assert (none.status_code, none.json()["type"]) == (409, "/problems/dkim-step-not-now")
    assert (await client.get(url, params={"format": "bind"})).status_code == 422
    await bring_to(seeded, key, DkimState.UNPUBLISHED)
    record = (await client.get(url)).json()["record"]
    value = f"v=DKIM1; k=rsa; p={public_key(Algorithm.RSA_3072)}"
    assert record["value"] == value
    zone = await client.get(url, params={"format": "zone"})
    assert zone.headers["content-type"] == "text/plain; charset=utf-8"
    parts = f'"{value[:255]}" "{value[255:510]}" "{value[510:]}"'
    assert zone.text == f"{record['name']}. 3600 IN TXT {parts}\n" == record["zone"] + "\n"
    await bring_to(seeded, key, DkimState.REVOKED)
    assert (await client.get(url)).json()["record"]["value"] == "v=DKIM1; k=rsa; p="
    await bring_to(seeded, key, DkimState.REMOVED)
    assert (await client.get(url)).json()["record"] is None


async def test_a_key_is_activated_before_or_after_it_is_published(
    client: httpx.AsyncClient, seeded: Database, clock: Clock
) -> None:
    key = await make_key(client)
    url = f"{KEYS}/202611a/activate"
    clock.forward(seconds=5)
    first = await client.post(url)
    assert (first.status_code, first.json()["activate"], first.json()["version"]) == (202, True, 2)
    assert first.json()["updated_at"] == "2026-11-23T12:00:05Z"
    again = await client.post(url)
    assert again.json()["version"] == 2, "what is so already is no change"
    assert await asked(seeded) == [
        (HOST, "dkim.sync", key["id"], 1),
        (HOST, "dkim.sync", key["id"], 2),
        (SERVICE_HOST, "dns.publish", 1, 1),
    ]
    assert [(event.action, event.before, event.after) for event in (await events(seeded))[1:]] == [
        (
            "dkim-keys.activate",
            {"activate": False},
            {"activate": True, "domain": PRIMARY, "selector": "202611a"},
        )
    ]
    await bring_to(seeded, key, DkimState.ACTIVE)
    assert (await client.post(url)).json()["version"] == 3


@pytest.mark.parametrize("state", [DkimState.RETIRING, DkimState.REVOKED, DkimState.REMOVED])
async def test_what_is_on_its_way_out_is_left_alone(
    client: httpx.AsyncClient, seeded: Database, state: DkimState
) -> None:
    key = await make_key(client)
    await bring_to(seeded, key, state, due_at=datetime(2026, 12, 1, 6, 30, tzinfo=UTC))
    shown = (await client.get(f"{KEYS}/202611a")).json()
    for method, tail in (("POST", "/activate"), ("DELETE", "")):
        answer = await client.request(method, f"{KEYS}/202611a{tail}")
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/dkim-step-not-now")
        assert (answer.json()["state"], answer.json()["next_step"]) == (state, shown["next_step"])
    assert (await client.get(f"{KEYS}/202611a")).json()["version"] == 2


async def test_a_key_that_was_never_made_is_gone_at_once(client: httpx.AsyncClient, seeded: Database) -> None:
    """Nobody ever entered a record of it. Its host deletes what it may have made."""
    key = await make_key(client, activate=True)
    gone = (await client.delete(f"{KEYS}/202611a")).json()
    assert (gone["state"], gone["activate"], gone["revoked_at"]) == ("removed", False, None)
    assert gone["removed_at"] == "2026-11-23T12:00:00Z"
    assert (await asked(seeded))[-1] == (HOST, "dkim.sync", key["id"], 2)
    assert (await events(seeded))[-1].action == "dkim-keys.delete"


async def test_a_name_is_no_longer_than_a_file_can_have(client: httpx.AsyncClient) -> None:
    long = ".".join(["a" * 60] * 3) + ".test"
    await client.post("/v1/domains", json={"name": long})
    url = f"/v1/domains/{long}/dkim-keys"
    answer = await client.post(url, json={"selector": "x" * 42})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/selector")
    assert (await make_key(client, url, selector="x" * 41))["selector"] == "x" * 41


@pytest.mark.parametrize("state", [DkimState.UNPUBLISHED, DkimState.PUBLISHED])
async def test_a_key_that_never_took_over_is_given_up(
    client: httpx.AsyncClient, seeded: Database, state: DkimState
) -> None:
    key = await make_key(client, activate=True)
    version = await bring_to(seeded, key, state)
    answer = await client.delete(f"{KEYS}/202611a")
    gone = answer.json()
    assert (answer.status_code, gone["state"], gone["activate"]) == (202, "revoked", False)
    assert gone["due_at"] == gone["revoked_at"] == "2026-11-23T12:00:00Z", "nobody has a signature of it"
    assert (await asked(seeded))[-2:] == [
        (HOST, "dkim.sync", key["id"], version + 1),
        (SERVICE_HOST, "dns.publish", 1, 1),
    ]
    last = (await events(seeded))[-1]
    assert (last.action, last.before) == ("dkim-keys.delete", {"state": state, "activate": True})
    assert last.after == {"domain": PRIMARY, "selector": "202611a", "state": "revoked", "activate": False}


async def test_an_active_key_is_never_given_up(client: httpx.AsyncClient, seeded: Database) -> None:
    await active(client, seeded)
    answer = await client.delete(f"{KEYS}/202611a")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/dkim-key-signs")
    assert (await client.get(f"{KEYS}/202611a")).json()["state"] == "active"


async def test_if_match_protects_a_change(client: httpx.AsyncClient) -> None:
    await make_key(client)
    tag = (await client.get(f"{KEYS}/202611a")).headers["etag"]
    assert (await client.post(f"{KEYS}/202611a/activate", headers={"If-Match": tag})).status_code == 202
    for method, tail in (("POST", "/activate"), ("DELETE", "")):
        late = await client.request(method, f"{KEYS}/202611a{tail}", headers={"If-Match": tag})
        assert (late.status_code, late.json()["type"], late.json()["version"]) == (412, "/problems/version-conflict", 2)


async def test_a_repeat_with_the_same_key_makes_nothing_twice(client: httpx.AsyncClient, seeded: Database) -> None:
    await client.post(KEYS, json={"host": HOST})
    await bring_to(seeded, {"domain": PRIMARY, "selector": "202611a", "algorithm": "rsa-2048"}, DkimState.PUBLISHED)
    for number, (url, body) in enumerate(((KEYS, {}), (f"{KEYS}/rotate", {}), (f"{KEYS}/202611a/activate", None))):
        headers = {"Idempotency-Key": f"k{number}"}
        first = await client.post(url, json=body, headers=headers)
        repeat = await client.post(url, json=body, headers=headers)
        assert (repeat.status_code, repeat.json()) == (202, first.json())
        assert "idempotency-replayed" not in first.headers
        assert repeat.headers["idempotency-replayed"] == "true"
    assert len((await client.get(KEYS)).json()["items"]) == 3


async def test_lists_page_and_filter(client: httpx.AsyncClient, seeded: Database) -> None:
    await add_host(client, "mail2")
    for number in range(4):
        await make_key(client, host=("mail", "mail2")[number % 2])
    await bring_to(seeded, {"domain": PRIMARY, "selector": "202611b", "algorithm": "rsa-2048"}, DkimState.REMOVED)
    seen: list[str] = []
    url = f"{KEYS}?limit=3"
    while url:
        page = await client.get(url)
        seen += [item["selector"] for item in page.json()["items"]]
        link = page.headers.get("link")
        url = link.partition("<")[2].partition(">")[0] if link else ""
    assert seen == [f"202611{letter}" for letter in "abcd"]
    for query, found in (("state=removed", ["202611b"]), ("host=mail", ["202611a", "202611c"]), ("host=x", [])):
        assert [item["selector"] for item in (await client.get(f"{KEYS}?{query}")).json()["items"]] == found
    for bad in ("state=x", "host=%2F", "limit=0", "cursor=x", "selector=a"):
        assert (await client.get(f"{KEYS}?{bad}")).status_code == 422, bad


async def test_a_rotation_begins(client: httpx.AsyncClient, seeded: Database) -> None:
    """On each enabled host, and on each that signs: new keys as the active ones are, which then take over by themselves."""
    for host in ("mail2", "mail3"):
        await add_host(client, host)
    await active(client, seeded, host=HOST, algorithm="rsa-3072", selector="one")
    await active(client, seeded, host=HOST, algorithm="ed25519", selector="two")
    await active(client, seeded, host="mail2", algorithm="ed25519", selector="three")
    gone = await active(client, seeded, host="mail3", algorithm="ed25519", selector="four")
    await bring_to(seeded, gone, DkimState.RETIRING)
    await client.patch("/v1/hosts/mail2", json={"enabled": False})
    answer = await client.post(f"{KEYS}/rotate")
    assert answer.status_code == 202, answer.text
    made = answer.json()["items"]
    assert [(key["host"], key["algorithm"], key["selector"], key["activate"]) for key in made] == [
        (HOST, "rsa-3072", "202611a", True),
        (HOST, "ed25519", "202611b", True),
        ("mail2", "ed25519", "202611c", True),
        ("mail3", "rsa-2048", "202611d", True),
    ]
    assert {key["state"] for key in made} == {"generating"}
    assert [f'<{key["job"]["url"]}>; rel="monitor"' for key in made] == answer.headers["link"].split(", ")
    signing = (await client.get(f"{KEYS}?state=active")).json()["items"]
    assert [key["selector"] for key in signing] == ["one", "two", "three"], "until the new ones have taken over"


async def test_a_rotation_of_one_host_and_algorithm(client: httpx.AsyncClient, seeded: Database) -> None:
    await add_host(client, "mail2")
    await active(client, seeded, host=HOST)
    answer = await client.post(f"{KEYS}/rotate", json={"host": "mail2", "algorithm": "ed25519"})
    assert [(key["host"], key["algorithm"]) for key in answer.json()["items"]] == [("mail2", "ed25519")]
    for body, pointer in (
        ({"host": ".."}, "/host"),
        ({"algorithm": "dsa"}, "/algorithm"),
        ({"activate": True}, "/activate"),
    ):
        bad = await client.post(f"{KEYS}/rotate", json=body)
        assert (bad.status_code, bad.json()["errors"][0]["pointer"]) == (422, pointer)


async def test_one_rotation_at_a_time(client: httpx.AsyncClient, seeded: Database) -> None:
    old = await active(client, seeded, algorithm="ed25519", selector="old")
    new = (await client.post(f"{KEYS}/rotate")).json()["items"][0]
    for state in (None, DkimState.UNPUBLISHED, DkimState.PUBLISHED, DkimState.ACTIVE):
        if state:
            await bring_to(seeded, new, state)
        answer = await client.post(f"{KEYS}/rotate")
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/rotation-under-way"), state
        assert answer.json()["selectors"] == [new["selector"]]
    other = await client.post(f"{KEYS}/rotate", json={"algorithm": "rsa-2048"})
    assert other.status_code == 202, "another family is another rotation"
    await prove(seeded, new)
    await bring_to(seeded, old, DkimState.RETIRING)
    next_one = await client.post(f"{KEYS}/rotate", json={"algorithm": "ed25519"})
    assert next_one.status_code == 202


async def test_a_key_that_nobody_wants_active_is_no_rotation(client: httpx.AsyncClient) -> None:
    await make_key(client)
    assert (await client.post(f"{KEYS}/rotate")).status_code == 202


async def test_ten_rotations_at_once_are_one(client: httpx.AsyncClient, seeded: Database) -> None:
    answers = await asyncio.gather(*(client.post(f"{KEYS}/rotate") for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 9
    assert len((await client.get(KEYS)).json()["items"]) == 1
    assert len(await asked(seeded)) == 1


async def test_the_service_process_may_rotate_and_advance(
    client: httpx.AsyncClient, service_database: Database, clock: Clock
) -> None:
    """Under its own grants."""
    async with service_database.write.begin() as connection:
        change = Change(connection, ACTOR, clock())
        [key_id] = await rotate_dkim_keys(change, DomainName(PRIMARY))
        with pytest.raises(RotationUnderWay):
            await rotate_dkim_keys(change, DomainName(PRIMARY))
    [key] = (await client.get(KEYS)).json()["items"]
    assert key["id"] == key_id
    for state in list(DkimState)[1:]:
        clock.forward(seconds=1)
        await bring_to(service_database, key, state)
        assert (await client.get(f"{KEYS}/202611a")).json()["state"] == state


async def test_each_state_has_its_time_event_and_job(
    client: httpx.AsyncClient, seeded: Database, service_database: Database
) -> None:
    key = await make_key(client)
    before = key
    names = {"unpublished": "generated"}
    verbs = "generate publish sign retire revoke remove".split()
    for number, state in enumerate(list(DkimState)[1:]):
        async with service_database.write.begin() as connection:
            await connection.execute(dkim_keys.update().values(problem="something", due_at=utc_now()))
        version = await bring_to(service_database, key, state)
        shown = (await client.get(f"{KEYS}/202611a")).json()
        reached = f"{names.get(state, state)}_at"
        assert before[reached] is None
        assert shown[reached] == shown["updated_at"]
        assert (shown["version"], shown["problem"], shown["due_at"]) == (version, None, None)
        assert (await asked(seeded))[-1] == (HOST, "dkim.sync", key["id"], version)
        event = (await events(seeded))[-1]
        assert event.action == f"dkim-keys.{verbs[number]}"
        assert (event.before, event.after["state"]) == ({"state": before["state"]}, state)
        before = shown


async def test_a_key_that_the_dns_lost_signs_no_more(client: httpx.AsyncClient, seeded: Database) -> None:
    key = await make_key(client, activate=True)
    await bring_to(seeded, key, DkimState.PUBLISHED)
    published = (await client.get(f"{KEYS}/202611a")).json()["published_at"]
    await bring_to(seeded, key, DkimState.ACTIVE)
    await bring_to(seeded, key, DkimState.PUBLISHED, problem="ns1 answers: no such record")
    shown = (await client.get(f"{KEYS}/202611a")).json()
    assert (shown["state"], shown["active_at"], shown["published_at"]) == ("published", None, published)
    assert shown["problem"] == "ns1 answers: no such record"
    assert (await events(seeded))[-1].action == "dkim-keys.withdraw"


async def test_of_two_changes_at_one_moment_one_is_refused(client: httpx.AsyncClient, seeded: Database) -> None:
    key = await make_key(client)
    async with seeded.read.connect() as connection:
        row = (await connection.execute(DKIM_KEYS)).one()
    await bring_to(seeded, key, DkimState.UNPUBLISHED)
    count = len(await asked(seeded)), len(await events(seeded))
    with pytest.raises(VersionConflict):
        async with seeded.write.begin() as connection:
            await set_dkim_state(Change(connection, ACTOR, utc_now()), row, DkimState.REMOVED)
    assert (len(await asked(seeded)), len(await events(seeded))) == count
    assert (await client.get(f"{KEYS}/202611a")).json()["state"] == "unpublished"


async def test_the_next_step_is_one_sentence_each(
    client: httpx.AsyncClient, seeded: Database, worker_database: Database
) -> None:
    key = await make_key(client)
    seen = set()
    for publisher, who in ((None, "hand"), ("knot", "publisher knot")):
        await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": {"publisher": publisher}})
        for state in list(DkimState)[1:]:
            version = await bring_to(seeded, key, state, due_at=datetime(2026, 12, 1, 6, 30, tzinfo=UTC))
            if state is DkimState.RETIRING:
                step = (await client.get(f"{KEYS}/202611a")).json()["next_step"]
                assert "signs no more" in step
                assert step.endswith(".")
            await apply_key(worker_database, {**key, "version": version})
            step = (await client.get(f"{KEYS}/202611a")).json()["next_step"]
            assert step.endswith(".")
            if state in (DkimState.UNPUBLISHED, DkimState.RETIRING, DkimState.REVOKED):
                assert who in step, step
                assert step not in seen
            if state in (DkimState.RETIRING, DkimState.REVOKED):
                assert "2026-12-01 06:30 UTC" in step
            seen.add(step)
    assert len(seen) == 6 + 3


async def test_no_answer_has_a_private_key(client: httpx.AsyncClient, make_client: Callable[..., Any]) -> None:
    """A client that sends one is told that it does not belong here, and not what it sent."""
    secret = "-----BEGIN PRIVATE KEY-----MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
    for body in ({"public_key": secret}, {"private_key": secret}, {"selector": secret}):
        answer = await client.post(KEYS, json=body)
        assert answer.status_code == 422
        assert "MIIEvQ" not in answer.text


async def test_a_published_key_says_what_it_waits_for(client: httpx.AsyncClient, seeded: Database) -> None:
    key = await make_key(client)
    await bring_to(seeded, key, DkimState.PUBLISHED)
    assert "POST …/activate" in (await client.get(f"{KEYS}/202611a")).json()["next_step"]
    assert "by itself" in (await client.post(f"{KEYS}/202611a/activate")).json()["next_step"]
