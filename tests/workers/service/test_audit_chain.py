"""The chain over the audit trail: what adds to it, what it finds, and the heads that are kept elsewhere. On both databases."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr, ValidationError
from sqlalchemy import insert, select, text

from app.config import ServiceSettings
from app.credentials.links import create_link_key, load_link_key
from app.db import Database
from app.models.audit_chain import audit_chain
from app.models.audit_events import audit_events
from app.services.audit_chain import FIRST, LATE, Head, head_line, link_hash, parse_head, read_head, verify_chain
from app.workers.service import audit_chain as chaining
from app.workers.service.audit_chain import BATCH, LOOK_AT_ALL, NEAR, Chain
from app.workers.service.loop import Parts
from tests.conftest import Clock, TestDatabase

pytestmark = pytest.mark.asyncio

EVENT = {
    "id": 7,
    "at": datetime(2026, 11, 24, 1, 2, 3, 40, tzinfo=UTC),
    "principal_id": "primary-0123456789ab",
    "key_id": 3,
    "client_address": "2001:db8::1",
    "request_id": "0123456789abcdef",
    "action": "users.change",
    "subject_kind": "user",
    "subject_id": "12",
    "user_id": 12,
    "outcome": "accepted",
    "problem": None,
    "before": {"quota_bytes": None, "display_name": "Änn ☃ 𝄞"},
    "after": {"b": [1, 2.5, 1e30, True, {"z": "", "a": "\u0000\\"}], "a": 2**60},
}
CHAINED_AT = datetime(2026, 11, 24, 1, 2, 4, tzinfo=UTC)
HASH = "8d5c0fa67af77a6a6d6795c8270f0426c5e8907529651fb61db624158e903ffa"


def service_settings(test_database: TestDatabase, scratch: Path, **more: Any) -> ServiceSettings:
    url = SecretStr(test_database.url("service"))
    return ServiceSettings(database_url=url, wake_directory=scratch, **more)


@pytest_asyncio.fixture
async def service(test_database: TestDatabase) -> AsyncIterator[Database]:
    database = Database(test_database.url("service"))
    yield database
    await database.close()


@pytest_asyncio.fixture
async def owner(test_database: TestDatabase) -> AsyncIterator[Database]:
    """Somebody with all rights, who changes what should not be."""
    database = Database(test_database.url("owner"))
    yield database
    await database.close()


@pytest.fixture
def chain(service: Database, test_database: TestDatabase, scratch: Path) -> Chain:
    return Chain(service, service_settings(test_database, scratch))


async def add(database: Database, *ids: int, **values: Any) -> None:
    async with database.write.begin() as connection:
        await connection.execute(
            insert(audit_events), [{**EVENT, "request_id": f"r{i}", **values, "id": i} for i in ids]
        )


async def links(database: Database) -> list[Any]:
    async with database.read.connect() as connection:
        return list(await connection.execute(select(audit_chain).order_by(audit_chain.c.sequence)))


async def verify(database: Database, *heads: Head, now: datetime = CHAINED_AT) -> list[str]:
    found: list[str] = []
    async with database.read.connect() as connection:
        await verify_chain(connection, heads, now, found.append)
    return found


async def test_both_databases_and_all_releases_hash_alike(chain: Chain, database: Database) -> None:
    """The encoding is a promise: heads that were kept years ago must still fit."""
    assert link_hash(1, FIRST.hash, CHAINED_AT, EVENT) == HASH
    async with database.write.begin() as connection:
        await connection.execute(insert(audit_events), EVENT)
    assert await chain.extend(CHAINED_AT) == 1
    [link] = await links(database)
    assert tuple(link) == (1, 7, FIRST.hash, HASH, CHAINED_AT)
    assert await verify(database, Head(1, HASH)) == []


async def test_every_column_counts(database: Database) -> None:
    assert {column.name for column in audit_events.c} == set(EVENT)
    whole = link_hash(1, FIRST.hash, CHAINED_AT, EVENT)
    for name, value in EVENT.items():
        other = {**EVENT, name: "x" if value is None else None}
        assert link_hash(1, FIRST.hash, CHAINED_AT, other) != whole, name
    assert link_hash(2, FIRST.hash, CHAINED_AT, EVENT) != whole
    assert link_hash(1, "1" * 64, CHAINED_AT, EVENT) != whole
    assert link_hash(1, FIRST.hash, EVENT["at"], EVENT) != whole  # type: ignore[arg-type]


async def test_each_event_gets_one_link(chain: Chain, database: Database) -> None:
    assert await chain.extend(CHAINED_AT) == 0
    await add(database, *range(1, 2 * BATCH + 3))
    assert await chain.extend(CHAINED_AT) == 2 * BATCH + 2
    assert await chain.extend(CHAINED_AT) == 0
    assert [(link.sequence, link.event_id) for link in await links(database)] == [
        (n, n) for n in range(1, 2 * BATCH + 3)
    ]
    assert await verify(database) == []


async def test_what_commits_late_is_not_lost(chain: Chain, database: Database) -> None:
    await add(database, 1, 2, 4, 6)
    await chain.extend(CHAINED_AT)
    await add(database, 3)
    await add(database, 5)
    assert await chain.extend(CHAINED_AT) == 2
    assert [link.event_id for link in await links(database)] == [1, 2, 4, 6, 3, 5]
    assert await verify(database) == []


async def test_what_commits_hours_later_is_found_too(chain: Chain, database: Database) -> None:
    await add(database, 10, NEAR + 20)
    await chain.extend(CHAINED_AT)
    await add(database, 11)
    later = CHAINED_AT + LOOK_AT_ALL
    assert await chain.extend(later - timedelta(seconds=1)) == 0
    assert len(await verify(database, now=EVENT["at"] + LATE)) == 0  # type: ignore[operator]
    assert await chain.extend(later) == 1
    assert await verify(database, now=later) == []


async def test_a_transaction_that_is_open_holds_nothing_up(chain: Chain, database: Database) -> None:
    if database.dialect == "sqlite":  # one writer: nothing commits out of order
        await add(database, 1)
        assert await chain.extend(CHAINED_AT) == 1
        return
    async with database.write.connect() as slow, slow.begin():
        await slow.execute(insert(audit_events), {**EVENT, "id": 1})
        await add(database, 2)
        assert await chain.extend(CHAINED_AT) == 1
    assert await chain.extend(CHAINED_AT) == 1
    assert [link.event_id for link in await links(database)] == [2, 1]
    assert await verify(database) == []


async def test_two_service_processes_by_accident(
    chain: Chain, database: Database, test_database: TestDatabase, scratch: Path
) -> None:
    other = Database(test_database.url("service"))
    twin = Chain(other, service_settings(test_database, scratch))
    shared = 0
    for start in range(1, 400, 20):
        await add(database, *range(start, start + 20))
        added = await asyncio.gather(chain.extend(CHAINED_AT), twin.extend(CHAINED_AT))
        shared += 0 not in added or sum(added) < 20
    await chain.extend(CHAINED_AT)
    await other.close()
    made = await links(database)
    assert [link.sequence for link in made] == list(range(1, 401))
    assert {link.event_id for link in made} == set(range(1, 401))
    assert await verify(database) == []


async def test_who_comes_second_looks_again(
    chain: Chain, database: Database, monkeypatch: pytest.MonkeyPatch, test_database: TestDatabase, scratch: Path
) -> None:
    """Between reading and writing another process has added the very links."""
    await add(database, 1, 2)
    find = chaining.unlinked_events

    async def find_and_lose(*args: Any) -> Any:
        found = await find(*args)
        monkeypatch.setattr(chaining, "unlinked_events", find)
        other = Database(test_database.url("service"))
        await Chain(other, service_settings(test_database, scratch)).extend(CHAINED_AT)
        await other.close()
        return found

    monkeypatch.setattr(chaining, "unlinked_events", find_and_lose)
    assert await chain.extend(CHAINED_AT) == 0
    await add(database, 3)
    assert await chain.extend(CHAINED_AT) == 1
    assert [link.event_id for link in await links(database)] == [1, 2, 3]


async def test_the_service_process_does_it(
    database: Database, service: Database, test_database: TestDatabase, scratch: Path, clock: Clock
) -> None:
    await add(database, 1)
    create_link_key(scratch / "link.key")
    parts = Parts(service, service_settings(test_database, scratch), load_link_key(scratch / "link.key"), clock)
    await parts.round(asyncio.Event())
    assert [link.event_id for link in await links(database)] == [1]


CHANGED = "the event or its link was changed"
UNLINKED = (
    "have no link though the oldest is of 2026-11-24T01:02:03.000040Z: "
    "the service process does not run, or they were put in just now"
)

# What somebody with all rights on the database does to five events, and what is said of it.
ATTACKS = {
    "edit": ("UPDATE audit_events SET action = 'users.read' WHERE id = 3", [f"link 3, event 3: {CHANGED}"]),
    "edit of a moment": (
        "UPDATE audit_events SET at = '2026-11-24 01:02:03.000041' WHERE id = 3",
        [f"link 3, event 3: {CHANGED}"],
    ),
    "edit of JSON": ("""UPDATE audit_events SET after = '{"a": 1}' WHERE id = 3""", [f"link 3, event 3: {CHANGED}"]),
    "deletion": ("DELETE FROM audit_events WHERE id = 3", ["link 3, event 3: the event was deleted"]),
    "deletion with its link": (
        "DELETE FROM audit_events WHERE id = 3; DELETE FROM audit_chain WHERE event_id = 3",
        ["link 4, event 4: the links 3 to 3 before it are missing"],
    ),
    "deletion, links moved up": (
        """DELETE FROM audit_events WHERE id = 3; DELETE FROM audit_chain WHERE sequence = 3;
        UPDATE audit_chain SET sequence = 3 WHERE sequence = 4; UPDATE audit_chain SET sequence = 4 WHERE sequence = 5""",
        [
            "link 3, event 4: it does not follow from the link before it",
            f"link 3, event 4: {CHANGED}",
            f"link 4, event 5: {CHANGED}",
        ],
    ),
    "deletion of the beginning": (
        "DELETE FROM audit_events WHERE id < 3; DELETE FROM audit_chain WHERE sequence < 3",
        ["link 3, event 3: the links 1 to 2 before it are missing"],
    ),
    "swap of events": (
        """UPDATE audit_events SET id = 99 WHERE id = 2; UPDATE audit_events SET id = 2 WHERE id = 4;
        UPDATE audit_events SET id = 4 WHERE id = 99""",
        [f"link 2, event 2: {CHANGED}", f"link 4, event 4: {CHANGED}"],
    ),
    "swap of links": (
        """UPDATE audit_chain SET event_id = 99 WHERE sequence = 2; UPDATE audit_chain SET event_id = 2 WHERE sequence = 4;
        UPDATE audit_chain SET event_id = 4 WHERE sequence = 2""",
        [f"link 2, event 4: {CHANGED}", f"link 4, event 2: {CHANGED}"],
    ),
    "edit of a hash": (
        "UPDATE audit_chain SET hash = REPLACE(hash, SUBSTR(hash, 1, 4), 'xxxx') WHERE sequence = 3",
        [f"link 3, event 3: {CHANGED}", "link 4, event 4: it does not follow from the link before it"],
    ),
    "edit of the time of a link": (
        "UPDATE audit_chain SET chained_at = '2026-11-24 01:02:05' WHERE sequence = 5",
        [f"link 5, event 5: {CHANGED}"],
    ),
    "all links gone": ("DELETE FROM audit_chain", [f"5 events, the first is 1, {UNLINKED}"]),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_attack_is_found_and_named(attack: str, chain: Chain, owner: Database) -> None:
    await add(owner, 1, 2, 3, 4, 5)
    await chain.extend(CHAINED_AT)
    later = CHAINED_AT + 2 * LATE
    assert await verify(owner, now=later) == []
    statements, said = ATTACKS[attack]
    async with owner.write.begin() as connection:
        for statement in statements.split(";"):
            await connection.execute(text(statement.replace(":", r"\:")))
    assert await verify(owner, now=later) == said


async def test_an_event_put_in_with_a_link_of_its_own(chain: Chain, owner: Database) -> None:
    """Whoever puts it in the middle must renumber; whoever computes all anew is found by a kept head."""
    await add(owner, 1, 2, 3)
    await chain.extend(CHAINED_AT)
    kept = await chain.database.reading(read_head)
    async with owner.write.begin() as connection:
        await connection.execute(text("DELETE FROM audit_chain"))
        await connection.execute(text("DELETE FROM audit_events WHERE id = 2"))
    chain.looked_at_all = None
    await chain.extend(CHAINED_AT)
    await add(owner, 4)
    await chain.extend(CHAINED_AT)
    assert await verify(owner) == [], "it is whole in itself"
    assert await verify(owner, kept) == [f"link 3: its hash is not {kept.hash}, which was kept elsewhere"]


@pytest.mark.parametrize("event_id", [3, 900])
async def test_an_event_put_into_the_past(chain: Chain, owner: Database, event_id: int) -> None:
    """It gets a link like any other, but late: no transaction of ours lasts hours."""
    await add(owner, 1, 2, 4)
    await chain.extend(CHAINED_AT)
    next_day = EVENT["at"] + timedelta(days=1)  # type: ignore[operator]
    await add(owner, 800, at=next_day)
    await chain.extend(next_day)
    await add(owner, event_id)
    [said] = await verify(owner, now=next_day)
    assert said.startswith(f"1 events, the first is {event_id}, have no link")
    await chain.extend(next_day + LOOK_AT_ALL)
    [said] = await verify(owner, now=next_day)
    assert said.startswith(
        f"link 5, event {event_id}: it is dated 2026-11-24T01:02:03.000040Z, but was put in after events of"
    )


async def test_a_service_that_was_away_for_days_raises_no_alarm(chain: Chain, database: Database) -> None:
    for day in range(5):
        await add(database, day + 1, at=EVENT["at"] + timedelta(days=day))  # type: ignore[operator]
    await add(database, 6, at=EVENT["at"] + timedelta(days=400))  # type: ignore[operator]  # one host's clock was wrong
    now = EVENT["at"] + timedelta(days=6)  # type: ignore[operator]
    await chain.extend(now)
    await add(database, 7, at=now)
    await chain.extend(now)
    assert await verify(database, now=now) == []


async def test_a_cut_off_end_is_found_by_a_kept_head(chain: Chain, owner: Database) -> None:
    heads = []
    for number in range(1, 6):
        await add(owner, number)
        await chain.extend(CHAINED_AT)
        heads.append(await chain.database.reading(read_head))
    assert await verify(owner, *heads) == []
    async with owner.write.begin() as connection:
        await connection.execute(text("DELETE FROM audit_chain WHERE sequence > 3"))
        await connection.execute(text("DELETE FROM audit_events WHERE id > 3"))
    assert await verify(owner) == [], "without a head nobody can tell"
    cut = "the chain ends with link 3, but link {} was kept elsewhere: its end is cut off"
    assert await verify(owner, *heads) == [cut.format(4)]
    assert await verify(owner, heads[4]) == [cut.format(5)]
    await add(owner, 4, 5, action="users.read")
    await chain.extend(CHAINED_AT)
    assert len(await verify(owner, *heads)) == 2, "nor does another end fit"
    backwards = [heads[4], heads[2], heads[3]]  # two files put together
    assert [said[:7] for said in await verify(owner, *backwards)] == ["link 5:", "link 4:"]


async def test_more_than_a_page_is_verified(chain: Chain, owner: Database) -> None:
    await add(owner, *range(1, 2101))
    await chain.extend(CHAINED_AT)
    async with owner.write.begin() as connection:
        await connection.execute(text("UPDATE audit_events SET action = 'x' WHERE id IN (1, 1000, 1001, 2100)"))
    assert [said.split(":")[0] for said in await verify(owner)] == [
        f"link {n}, event {n}" for n in (1, 1000, 1001, 2100)
    ]


@pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)  # MariaDB takes no such thing
@pytest.mark.parametrize("change", ["after = '{'", "at = 'yesterday'"])
async def test_what_is_no_row_of_ours_is_said(chain: Chain, owner: Database, change: str) -> None:
    await add(owner, 1)
    await chain.extend(CHAINED_AT)
    async with owner.write.begin() as connection:
        await connection.execute(text(f"UPDATE audit_events SET {change}"))
    [said] = await verify(owner)
    assert said.startswith("the links 1 and following: the trail holds what we never write")


async def test_the_head_is_kept_in_a_file(
    service: Database, database: Database, test_database: TestDatabase, scratch: Path
) -> None:
    file = scratch / "heads"
    chain = Chain(service, service_settings(test_database, scratch, audit_head_file=file))
    await chain.extend(CHAINED_AT)
    assert not file.exists(), "there is none yet"
    await add(database, 1)
    await chain.extend(CHAINED_AT)
    first = head_line(await service.reading(read_head), CHAINED_AT)
    assert file.read_text() == f"{first}\n"
    assert first.startswith("2026-11-24T01:02:04.000000Z 1 ")
    await add(database, 2)
    await chain.extend(CHAINED_AT + timedelta(seconds=59))
    assert file.read_text() == f"{first}\n", "once a minute is enough"
    await chain.extend(CHAINED_AT + timedelta(seconds=60))
    await chain.extend(CHAINED_AT + timedelta(seconds=180))
    assert [parse_head(line).sequence for line in file.read_text().splitlines()] == [1, 2]
    assert parse_head(str(parse_head(first))) == parse_head(first)


async def test_a_file_that_cannot_be_written_stops_nothing(
    service: Database, database: Database, test_database: TestDatabase, scratch: Path
) -> None:
    file = scratch / "away/heads"
    chain = Chain(service, service_settings(test_database, scratch, audit_head_file=file))
    await add(database, 1)
    assert await chain.extend(CHAINED_AT) == 1
    file.parent.mkdir()
    await chain.extend(CHAINED_AT + timedelta(seconds=60))
    assert parse_head(file.read_text()).sequence == 1


@pytest.mark.parametrize("kind", ["path", "udp"])
async def test_the_head_goes_to_syslog(
    kind: str, service: Database, database: Database, test_database: TestDatabase, scratch: Path
) -> None:
    family = socket.AF_UNIX if kind == "path" else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as log:
        log.bind(str(scratch / "log") if kind == "path" else ("127.0.0.1", 0))
        log.settimeout(5)
        place = str(scratch / "log") if kind == "path" else "127.0.0.1:{1}".format(*log.getsockname())
        chain = Chain(service, service_settings(test_database, scratch, audit_head_syslog=place))
        await add(database, 1)
        await chain.extend(CHAINED_AT)
        said = log.recv(1000).decode()
    line = head_line(await service.reading(read_head), CHAINED_AT)
    assert said == f"<85>cacert-mail: audit head {line}"


@pytest.mark.parametrize("place", ["", "log.example.org", "log.example.org:syslog"])
async def test_a_syslog_that_is_none(place: str, test_database: TestDatabase, scratch: Path) -> None:
    with pytest.raises(ValidationError):
        service_settings(test_database, scratch, audit_head_syslog=place)


@pytest.mark.parametrize("line", ["", "1", "1:" + "g" * 64, "-1:" + "0" * 64, "1:" + "0" * 63, "x y z"])
async def test_what_is_no_head(line: str) -> None:
    with pytest.raises(ValueError, match="not a head"):
        parse_head(line)
