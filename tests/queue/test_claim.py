"""The queue's promises, the same on both databases."""

import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, insert, select
from sqlalchemy.exc import DBAPIError

from app.db import Database
from app.models.jobs import JobState, applied, jobs
from app.queue import claim as queue
from app.queue.claim import LEASE, MAX_ATTEMPTS, MAX_BACKOFF, Claim, End, LeaseLost, Outcome, Waiting
from app.queue.contracts import JobKind
from app.queue.enqueue import enqueue
from tests.conftest import HOST, Clock, TestDatabase

asynchronous = pytest.mark.asyncio

KIND = JobKind.MAILBOX_SYNC.value
KINDS = [KIND]
DICE = random.Random(1)


@pytest_asyncio.fixture
async def service_database(test_database: TestDatabase) -> AsyncIterator[Database]:
    """As the user that prunes."""
    database = Database(test_database.url("service"))
    yield database
    await database.close()


class Queue:
    """One clock, two database users: the API adds, the worker takes."""

    def __init__(self, api: Database, worker: Database, clock: Clock) -> None:
        self.api = api
        self.worker = worker
        self.clock = clock

    async def add(
        self, lane: str = "ann@cacert.test", *, host: str = HOST, subject_id: int = 1, version: int = 1
    ) -> int:
        async with self.api.write.begin() as connection:
            return await enqueue(
                connection,
                JobKind.MAILBOX_SYNC,
                host=host,
                lane=lane,
                subject_id=subject_id,
                version=version,
                request_id="request",
                now=self.clock.now,
            )

    async def add_rows(self, *rows: dict[str, Any]) -> None:
        """Whatever the database takes from the API's user."""
        usual = {
            "host": HOST,
            "lane": "ann@cacert.test",
            "kind": KIND,
            "subject_id": 1,
            "version": 1,
            "request_id": "request",
            "run_at": self.clock.now,
            "created_at": self.clock.now,
        }
        async with self.api.write.begin() as connection:
            await connection.execute(insert(jobs), [usual | row for row in rows])

    async def claim(self, limit: int = 10, host: str = HOST) -> list[Claim]:
        return await queue.claim(self.worker, host, self.clock.now, limit=limit, kinds=KINDS)

    async def claim_one(self) -> Claim:
        (claim,) = await self.claim(limit=1)
        return claim

    async def finish(self, claim: Claim, version: int | None = None, **other: Any) -> None:
        outcome = Outcome(
            claim.version if version is None else version, other.get("stands", True), {"home": "ok"}, {"uid": 5000}
        )
        await queue.finish(self.worker, claim, outcome, self.clock.now)

    async def retry(self, claim: Claim, error: str = "not yet") -> JobState:
        return await queue.retry(self.worker, claim, error, self.clock.now, jitter=DICE)

    async def heartbeat(self, *claims: Claim) -> list[Claim]:
        return await queue.heartbeat(self.worker, claims, self.clock.now)

    async def take_back(self, *, all_running: bool = False) -> int:
        return await queue.take_back(self.worker, HOST, self.clock.now, all_running=all_running)

    async def take(self, row: Any) -> bool:
        """The compare-and-set alone, with a candidate that may be stale."""
        async with self.worker.read.connect() as connection:
            return await queue._take(connection, row, self.clock.now)

    async def job(self, job_id: int) -> Any:
        return (await self.rows(select(jobs).where(jobs.c.id == job_id)))[0]

    async def rows(self, query: Any) -> list[Any]:
        async with self.api.read.connect() as connection:
            return list((await connection.execute(query)).all())

    async def everything(self) -> tuple[list[Any], list[Any]]:
        return await self.rows(select(jobs).order_by(jobs.c.id)), await self.rows(select(applied))

    async def states(self) -> dict[int, str]:
        return {row.id: row.state for row in (await self.everything())[0]}


@pytest.fixture
def q(database: Database, worker_database: Database, clock: Clock) -> Queue:
    return Queue(database, worker_database, clock)


# Enqueue


@asynchronous
async def test_a_job_comes_and_goes_with_its_transaction(q: Queue) -> None:
    async def work() -> None:
        async with q.api.write.begin() as connection:
            await enqueue(
                connection,
                JobKind.MAILBOX_SYNC,
                host=HOST,
                lane="ann@cacert.test",
                subject_id=1,
                version=1,
                request_id="request",
                now=q.clock.now,
            )
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await work()
    assert await q.claim() == []
    job_id = await q.add()
    row = await q.job(job_id)
    assert (row.state, row.attempts, row.fence, row.run_at, row.created_at) == ("ready", 0, 0, q.clock.now, q.clock.now)
    assert (row.running_lane, row.lease_until, row.error, row.finished_at) == (None, None, None, None)


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
@asynchronous
async def test_neither_side_can_do_the_others_work(q: Queue) -> None:
    job_id = await q.add()
    row = await q.job(job_id)
    q.api, q.worker = q.worker, q.api
    with pytest.raises(DBAPIError, match="1142"):
        await q.add()
    for work in (q.take(row), q.finish(claim_of(row)), q.take_back()):
        with pytest.raises(DBAPIError, match=r"1142|1143"):
            await work


def claim_of(row: Any, fence: int = 1) -> Claim:
    return Claim(row.id, row.host, row.lane, row.kind, row.subject_id, row.version, row.request_id, 1, fence)


# Claim


@asynchronous
async def test_a_claim_counts_the_attempt_raises_the_fence_and_holds_the_lane(q: Queue) -> None:
    job_id = await q.add("ann@cacert.test", subject_id=7, version=3)
    (claim,) = await q.claim()
    assert claim == Claim(job_id, HOST, "ann@cacert.test", KIND, 7, 3, "request", attempts=1, fence=1)
    row = await q.job(job_id)
    assert (row.state, row.running_lane, row.attempts, row.fence) == ("running", "ann@cacert.test", 1, 1)
    assert row.lease_until == q.clock.now + LEASE
    assert await q.claim() == []


@asynchronous
async def test_only_what_is_due(q: Queue) -> None:
    await q.add_rows({"run_at": q.clock.now + timedelta(microseconds=1)})
    assert await q.claim() == []
    q.clock.forward(microseconds=1)
    assert len(await q.claim()) == 1


@asynchronous
async def test_only_the_own_host(q: Queue) -> None:
    there = await q.add(host="other")
    here = await q.add()
    assert [claim.id for claim in await q.claim()] == [here]
    # The same lane runs on both hosts at once: the lock is the host's own.
    assert [claim.id for claim in await q.claim(host="other")] == [there]


@asynchronous
async def test_only_the_kinds_that_are_asked_for(q: Queue) -> None:
    await q.add_rows({"kind": "a.b", "lane": "a"}, {"kind": "c.d", "lane": "c"}, {"lane": "m"})
    assert [claim.kind for claim in await q.claim()] == [KIND]
    found = await queue.claim(q.worker, HOST, q.clock.now, limit=10, kinds={"a.b", "c.d"})
    assert [claim.kind for claim in found] == ["a.b", "c.d"]
    await q.add(lane="n")
    assert await queue.claim(q.worker, HOST, q.clock.now, limit=10, kinds=[]) == []


@asynchronous
async def test_oldest_first_and_no_more_than_asked_for(q: Queue) -> None:
    ages = [3, 1, 4, 1, 5, 9, 2, 6]
    await q.add_rows(*({"lane": f"{n}", "run_at": q.clock.now - timedelta(seconds=age)} for n, age in enumerate(ages)))
    found = [await q.claim(limit=3), await q.claim(limit=0), await q.claim(limit=4), await q.claim(limit=3)]
    assert [[ages[int(claim.lane)] for claim in claims] for claims in found] == [[9, 6, 5], [], [4, 3, 2, 1], [1]]


@asynchronous
async def test_one_job_a_lane(q: Queue) -> None:
    first, second = await q.add("a"), await q.add("a")
    other = await q.add("b")
    claims = await q.claim()
    assert [claim.id for claim in claims] == [first, other]
    assert await q.claim() == []
    await q.finish(claims[0], version=0)
    assert [claim.id for claim in await q.claim()] == [second]


@asynchronous
async def test_a_full_lane_starves_nobody(q: Queue) -> None:
    await q.add_rows(*({"lane": "full", "subject_id": n} for n in range(10_000)))
    q.clock.forward(seconds=1)
    await q.add("other")
    assert sorted(claim.lane for claim in await q.claim()) == ["full", "other"]
    q.clock.forward(seconds=1)
    await q.add("third")
    assert [claim.lane for claim in await q.claim()] == ["third"]


@contextmanager
def statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """What is sent to the jobs, with parameters."""
    sent: list[tuple[str, Any]] = []

    def keep(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if "jobs" in statement:
            sent.append((statement, parameters))

    engines = (database.read.sync_engine, database.write.sync_engine)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", keep)
    yield sent
    for engine in engines:
        event.remove(engine, "before_cursor_execute", keep)


@asynchronous
async def test_many_full_lanes_fill_the_limit(q: Queue) -> None:
    lanes = [f"{n}" for n in range(5)]
    await q.add_rows(*({"lane": lane, "subject_id": n} for lane in lanes for n in range(queue.CANDIDATES + 1)))
    with statements(q.worker) as sent:
        assert [claim.lane for claim in await q.claim(limit=4)] == lanes[:4]
    assert sum(statement.startswith("UPDATE") for statement, _ in sent) == 4  # no lane is tried in vain


@asynchronous
async def test_hostile_rows_harm_nobody(q: Queue) -> None:
    await q.add_rows(
        *({"kind": kind, "lane": f"{n}"} for n, kind in enumerate(["", "x" * 32, "MAILBOX.SYNC", f"{KIND} ", "'; --"])),
        {"lane": "x" * 254, "subject_id": -(2**63), "version": -(2**31), "request_id": "\n\x1b[2J"},
        {"lane": ""},
        {"lane": "' OR 1=1 --"},
    )
    claims = await q.claim()
    assert [claim.lane for claim in claims] == ["x" * 254, "", "' OR 1=1 --"]
    assert claims[0].subject_id == -(2**63)
    assert await q.heartbeat(*claims) == []
    assert await q.retry(claims[0], "x" * 5000) == "ready"
    await q.finish(claims[1])
    await queue.give_up(q.worker, claims[2], "no", q.clock.now)
    q.clock.forward(days=365)
    assert [claim.lane for claim in await q.claim()] == ["x" * 254]
    assert sorted((await q.states()).values()) == ["dead", "done", *["ready"] * 5, "running"]


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
@asynchronous
async def test_a_day_that_never_was_stops_nobody(q: Queue) -> None:
    """Whoever holds the API's password also chooses the connection's SQL mode."""
    async with q.api.read.connect() as connection:
        await connection.exec_driver_sql("SET sql_mode = ''")
        await connection.exec_driver_sql(
            "INSERT INTO jobs (host, lane, kind, subject_id, version, request_id, run_at, created_at)"
            " VALUES (%s, 'a', %s, 1, 1, 'r', '0000-00-00', '2026-02-31')",
            (HOST, KIND),
        )
        await connection.invalidate()
    await q.add("b")
    assert [claim.lane for claim in await q.claim()] == ["a", "b"]


# The compare-and-set, with candidates that are stale


@asynchronous
async def test_two_with_the_same_candidates_never_share_a_lane(q: Queue) -> None:
    candidates = [await q.job(await q.add("a", subject_id=n)) for n in range(3)]
    assert [await q.take(row) for row in candidates] == [True, False, False]
    assert [await q.take(row) for row in candidates] == [False, False, False]
    rows, _ = await q.everything()
    assert [(row.state, row.fence, row.attempts) for row in rows] == [
        ("running", 1, 1),
        ("ready", 0, 0),
        ("ready", 0, 0),
    ]


@asynchronous
async def test_a_candidate_that_ended_meanwhile_is_not_taken(q: Queue) -> None:
    candidate = await q.job(await q.add("a", version=1))
    await q.add_rows({"lane": "b", "version": 2, "run_at": q.clock.now - timedelta(1)})
    await q.finish(await q.claim_one())
    assert (await q.job(candidate.id)).state == "superseded"
    assert not await q.take(candidate)
    assert (await q.job(candidate.id)).state == "superseded"


@asynchronous
async def test_a_candidate_that_was_tried_meanwhile_is_not_taken(q: Queue) -> None:
    """Else two claims would have one fence."""
    candidate = await q.job(await q.add())
    await q.retry(await q.claim_one())
    assert not await q.take(candidate)
    row = await q.job(candidate.id)
    assert (row.state, row.attempts, row.fence) == ("ready", 1, 1)


# Finish


@asynchronous
async def test_finish_ends_the_job_and_says_what_was_made_true(q: Queue) -> None:
    job_id = await q.add(subject_id=7, version=2)
    claim = await q.claim_one()
    q.clock.forward(seconds=1)
    outcome = Outcome(3, True, {"maildir": "ok", "dovecot": "not configured"}, {"uid": 5007, "name": "Åse"})
    await queue.finish(q.worker, claim, outcome, q.clock.now)
    row = await q.job(job_id)
    assert (row.state, row.finished_at, row.error) == ("done", q.clock.now, None)
    assert (row.running_lane, row.lease_until) == (None, None)
    _, made_true = await q.everything()
    assert [tuple(row) for row in made_true] == [
        (HOST, KIND, 7, 3, True, 1, outcome.proofs, outcome.result, q.clock.now),
    ]


async def _retried(q: Queue, claim: Claim) -> None:
    await q.retry(claim)


async def _finished(q: Queue, claim: Claim) -> None:
    await q.finish(claim)


async def _given_up(q: Queue, claim: Claim) -> None:
    await queue.give_up(q.worker, claim, "no", q.clock.now)


async def _taken_back(q: Queue, claim: Claim) -> None:
    await q.take_back(all_running=True)


async def _claimed_by_another(q: Queue, claim: Claim) -> None:
    await q.take_back(all_running=True)
    await q.claim_one()


ENDS = (_retried, _finished, _given_up)


@pytest.mark.parametrize("late", ENDS)
@pytest.mark.parametrize("loss", [*ENDS, _taken_back, _claimed_by_another])
@asynchronous
async def test_whoever_lost_the_lease_writes_nothing(q: Queue, loss: Any, late: Any) -> None:
    await q.add()
    await q.add("other")  # the same subject: would be superseded
    claim = await q.claim_one()
    await loss(q, claim)
    before = await q.everything()
    q.clock.forward(seconds=1)
    with pytest.raises(LeaseLost):
        await late(q, claim)
    assert await q.heartbeat(claim) == [claim]
    assert await q.everything() == before


@asynchronous
async def test_a_finish_touches_no_other_running_job(q: Queue) -> None:
    await q.add("a", subject_id=1)
    await q.add("b", subject_id=2)
    first, second = await q.claim()
    await q.finish(first)
    assert await q.heartbeat(second) == []
    await q.finish(second)


@asynchronous
async def test_applied_never_falls_and_its_revision_rises(q: Queue) -> None:
    # (version, stands) of the outcome, and (version, stands, revision) after it
    steps = [
        ((3, True), (3, True, 1)),
        ((2, False), (3, True, 1)),
        ((3, False), (3, False, 2)),
        ((4, True), (4, True, 3)),
    ]
    for (version, stands), expected in steps:
        await q.add()
        q.clock.forward(seconds=1)
        written_at = q.clock.now
        await q.finish(await q.claim_one(), version, stands=stands)
        _, ((*_, seen_version, seen_stands, revision, _, _, applied_at),) = await q.everything()
        assert (seen_version, seen_stands, revision) == expected
        assert (applied_at == written_at) == (version >= seen_version)
    assert set((await q.states()).values()) == {"done"}


@asynchronous
async def test_applied_is_kept_for_each_host_kind_and_subject(q: Queue) -> None:
    await q.add_rows({}, {"lane": "b", "subject_id": 2}, {"lane": "c", "kind": "other.sync"}, {"host": "other"})
    here = await queue.claim(q.worker, HOST, q.clock.now, limit=10, kinds=[KIND, "other.sync"])
    for claim in [*here, *await q.claim(host="other")]:
        await q.finish(claim)
    _, made_true = await q.everything()
    assert {(row.host, row.kind, row.subject_id, row.revision) for row in made_true} == {
        (HOST, KIND, 1, 1),
        (HOST, KIND, 2, 1),
        (HOST, "other.sync", 1, 1),
        ("other", KIND, 1, 1),
    }


@asynchronous
async def test_older_waiting_jobs_of_the_same_subject_are_superseded(q: Queue) -> None:
    await q.add_rows(
        {"version": 2},  # 1: finished below, having read version 3
        {"version": 1},  # 2: older
        {"version": 3},  # 3: the same version
        {"version": 3, "lane": "late", "run_at": q.clock.now + timedelta(days=1)},  # 4: waits in another lane
        {"version": 4},  # 5: newer
        {"version": 1, "host": "other"},  # 6: and those of others
        {"version": 1, "kind": "other.sync"},  # 7
        {"version": 1, "subject_id": 2},  # 8
        {"version": 1, "lane": "running", "run_at": q.clock.now - timedelta(seconds=1)},  # 9
        {"version": 1, "lane": "dead", "run_at": q.clock.now - timedelta(seconds=2)},  # 10
    )
    dead, running, claim = await q.claim(limit=3)
    await queue.give_up(q.worker, dead, "no", q.clock.now)
    q.clock.forward(seconds=1)
    await q.finish(claim, version=3)
    rows, _ = await q.everything()
    states = [row.state for row in rows]
    assert states == ["done", *["superseded"] * 3, *["ready"] * 4, "running", "dead"]
    assert [row.finished_at for row in rows[1:4]] == [q.clock.now] * 3
    await q.finish(running)
    assert (claim.id, running.id, dead.id) == (1, 9, 10)


@contextmanager
def before_statement(database: Database, number: int, do: Any) -> Iterator[None]:
    """Calls `do` before the writing engine runs its statement of this number; BEGIN (on SQLite) is not counted."""
    seen = 0

    def count(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal seen
        seen += not statement.startswith("BEGIN")
        if seen == number:
            do()

    event.listen(database.write.sync_engine, "before_cursor_execute", count)
    try:
        yield
    finally:
        event.remove(database.write.sync_engine, "before_cursor_execute", count)


class Broken(Exception):
    pass


def break_off() -> None:
    raise Broken


@asynchronous
async def test_a_finish_that_breaks_off_leaves_nothing(q: Queue) -> None:
    await q.add()
    await q.add("other")
    claim = await q.claim_one()
    before = await q.everything()
    number = 1
    while True:
        try:
            with before_statement(q.worker, number, break_off):
                await q.finish(claim)
            break
        except Broken:
            assert await q.everything() == before, f"statement {number}"
        number += 1
    assert number == 5  # the job, `applied` (update, insert), the superseded
    assert list((await q.states()).values()) == ["done", "superseded"]


KILLED = """
import asyncio, os, signal, sys
from datetime import datetime
from sqlalchemy import event
from app.db import Database
from app.queue.claim import Outcome, claim, finish

async def work(url, host, now, kind):
    database = Database(url)
    (mine,) = await claim(database, host, now, limit=1, kinds=[kind])
    print(mine.fence, flush=True)

    @event.listens_for(database.write.sync_engine, "before_cursor_execute")
    def kill(connection, cursor, statement, *_):
        if "finished_at" in statement and "jobs.version" in statement:
            os.kill(os.getpid(), signal.SIGKILL)

    await finish(database, mine, Outcome(1, True, {}, {}), now)

url, host, now, kind = sys.stdin.read().split()
asyncio.run(work(url, host, datetime.fromisoformat(now), kind))
"""


@asynchronous
async def test_a_worker_that_is_killed_in_a_finish_leaves_a_job_to_take_back(
    q: Queue, test_database: TestDatabase
) -> None:
    """Before the last statement: the job is done, and `applied` written, in a transaction that nobody commits."""
    await q.add()
    await q.add("other")
    words = f"{test_database.url('worker')} {HOST} {q.clock.now.isoformat()} {KIND}"
    process = subprocess.run(  # noqa: ASYNC221  nothing else runs here
        [sys.executable, "-c", KILLED], input=words, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout) == (-signal.SIGKILL, "1\n"), process.stderr
    rows, made_true = await q.everything()
    assert ([row.state for row in rows], made_true) == (["running", "ready"], [])
    assert await q.take_back(all_running=True) == 1
    claim = await q.claim_one()
    assert (claim.attempts, claim.fence) == (2, 3)
    await q.finish(claim)


# Retry and give up


@asynchronous
async def test_a_retry_goes_back_with_a_pause(q: Queue) -> None:
    job_id = await q.add("a")
    second = await q.add("a")
    claim = await q.claim_one()
    assert await q.retry(claim, "Dovecot ist müde") == "ready"
    row = await q.job(job_id)
    assert (row.state, row.error, row.running_lane, row.lease_until) == ("ready", "Dovecot ist müde", None, None)
    assert (row.attempts, row.finished_at) == (1, None)
    assert q.clock.now < row.run_at <= q.clock.now + timedelta(seconds=1)
    assert [claim.id for claim in await q.claim()] == [second]  # the lane is free meanwhile


@asynchronous
async def test_a_job_dies_after_its_last_attempt(q: Queue) -> None:
    job_id = await q.add()
    states = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        claim = await q.claim_one()
        assert (claim.attempts, claim.fence) == (attempt, attempt)
        states.append(await q.retry(claim, "no answer"))
        q.clock.forward(seconds=MAX_BACKOFF.total_seconds())
    assert states == [*["ready"] * (MAX_ATTEMPTS - 1), "dead"]
    assert await q.claim() == []
    row = await q.job(job_id)
    assert (row.state, row.error) == ("dead", f"no answer (gave up after {MAX_ATTEMPTS} attempts)")
    assert row.finished_at is not None


@asynchronous
async def test_giving_up_is_final_and_blocks_no_newer_version(q: Queue) -> None:
    job_id = await q.add(version=1)
    await queue.give_up(q.worker, await q.claim_one(), "cannot be", q.clock.now)
    row = await q.job(job_id)
    assert (row.state, row.error, row.finished_at) == ("dead", "cannot be", q.clock.now)
    assert (row.running_lane, row.lease_until) == (None, None)
    assert (await q.everything())[1] == []
    newer = await q.add(version=2)
    claim = await q.claim_one()
    assert claim.id == newer
    await q.finish(claim)
    assert await q.states() == {job_id: "dead", newer: "done"}


@pytest.mark.parametrize("error", ["x" * 5000, "ü" * 5000, "\U0001f4ec" * 5000, "a\0b", "/home/\udcff\udc00"])
@asynchronous
async def test_any_error_can_be_written_down(q: Queue, error: str) -> None:
    """Messages name files, and a mailbox's owner names files."""
    job_id = await q.add()
    await q.retry(await q.claim_one(), error)
    q.clock.forward(seconds=1)
    written = (await q.job(job_id)).error
    assert written == error.encode(errors="backslashreplace").decode()[:1000]
    await queue.give_up(q.worker, await q.claim_one(), error, q.clock.now)
    assert (await q.job(job_id)).error == written


@given(attempts=st.integers(1, 40), seed=st.integers())
def test_backoff_is_anything_up_to_a_ceiling(attempts: int, seed: int) -> None:
    class Highest(random.Random):
        def random(self) -> float:
            return 1.0

    ceiling = queue.backoff(attempts, Highest())
    assert ceiling == min(MAX_BACKOFF, timedelta(seconds=2 ** (attempts - 1)))
    assert timedelta(0) <= queue.backoff(attempts, random.Random(seed)) <= ceiling <= timedelta(minutes=5)


def test_backoff_is_spread_evenly() -> None:
    dice = random.Random(1)
    quarters = [0] * 4
    for _ in range(4000):
        quarters[int(queue.backoff(3, dice) / timedelta(seconds=1))] += 1
    assert all(900 < count < 1100 for count in quarters)


# Leases


@asynchronous
async def test_a_heartbeat_renews_and_names_what_is_lost(q: Queue) -> None:
    for lane in "abcd":
        await q.add(lane, subject_id=ord(lane))
    a, b, c, d = await q.claim()
    q.clock.forward(seconds=50)
    await q.finish(b)
    await q.retry(c)
    assert await q.heartbeat(a, b, c) == [b, c]
    assert (await q.job(a.id)).lease_until == q.clock.now + LEASE
    assert (await q.job(d.id)).lease_until == q.clock.now + timedelta(seconds=10)
    assert await q.heartbeat() == []
    q.clock.forward(seconds=50)
    assert await q.take_back() == 1  # d, for which no heart beat
    assert await q.heartbeat(a, d) == [d]


@asynchronous
async def test_a_lease_ends_and_not_before(q: Queue) -> None:
    job_id = await q.add()
    claim = await q.claim_one()
    q.clock.forward(seconds=LEASE.total_seconds())
    assert await q.take_back() == 0
    q.clock.forward(microseconds=1)
    assert await q.take_back() == 1
    row = await q.job(job_id)
    assert (row.state, row.running_lane, row.lease_until, row.fence, row.run_at) == (
        "ready",
        None,
        None,
        2,
        q.clock.now,
    )
    again = await q.claim_one()
    assert (again.id, again.fence, again.attempts) == (job_id, 3, 2)
    with pytest.raises(LeaseLost):
        await q.finish(claim)
    await q.finish(again)


@asynchronous
async def test_at_the_start_all_running_jobs_of_this_host_come_back(q: Queue) -> None:
    for lane in "abc":
        await q.add(lane)
        await q.add(lane, host="other")
    (a, _) = await q.claim(limit=2)
    (there,) = await q.claim(limit=1, host="other")
    assert await q.take_back(all_running=True) == 2
    assert await q.heartbeat(there) == []
    assert await q.heartbeat(a) == [a]
    assert len(await q.claim()) == 3


@asynchronous
async def test_leases_of_other_hosts_are_theirs(q: Queue) -> None:
    await q.add(host="other")
    await q.claim(host="other")
    q.clock.forward(days=1)
    assert await q.take_back() == 0
    assert list((await q.states()).values()) == ["running"]


@asynchronous
async def test_a_job_that_kills_its_worker_dies(q: Queue) -> None:
    poison = await q.add()
    for _ in range(MAX_ATTEMPTS):
        await q.claim_one()
        assert await q.take_back(all_running=True) == 1
    assert await q.claim() == []
    row = await q.job(poison)
    assert (row.state, row.attempts, row.finished_at, row.running_lane) == ("dead", MAX_ATTEMPTS, q.clock.now, None)
    assert "the worker ended" in row.error
    await q.add()
    await q.finish(await q.claim_one())


# Prune


@asynchronous
async def test_only_old_and_ended_jobs_are_pruned_in_batches(q: Queue, service_database: Database) -> None:
    await q.add_rows(*({"lane": f"{n}", "subject_id": n} for n in range(9)))
    claims = await q.claim()
    start = q.clock.now
    for claim in claims[:6]:
        q.clock.forward(hours=1)
        await q.finish(claim)
    await q.retry(claims[6])
    await queue.give_up(q.worker, claims[7], "no", q.clock.now)

    async def prune(before: datetime, limit: int = 2) -> int:
        return await queue.prune(service_database, before, limit=limit)

    assert await prune(start + timedelta(hours=1)) == 0
    assert [await prune(start + timedelta(hours=6)) for _ in range(4)] == [2, 2, 1, 0]
    assert list(await q.states()) == [claim.id for claim in claims[5:]]
    assert await prune(q.clock.now + timedelta(days=1000), 500) == 2
    assert list((await q.states()).values()) == ["ready", "running"]
    assert len((await q.everything())[1]) == 6  # what is true stays written down


# Plans


@asynchronous
async def test_no_statement_of_the_worker_walks_through_all_jobs(q: Queue, test_database: TestDatabase) -> None:
    """On MariaDB a statement that walks through the table also locks it."""
    await q.add_rows(*({"lane": f"{n}", "subject_id": n} for n in range(3000)))
    claims = await q.claim(limit=8)
    with statements(q.worker) as sent:
        await q.claim(limit=1)
        await q.heartbeat(*claims)
        await q.finish(claims[0])
        await q.retry(claims[1])
        await q.take_back()
    assert len(sent) == 9
    sqlite = test_database.kind == "sqlite"
    async with q.worker.read.connect() as connection:
        for statement, parameters in sent:
            explain = f"EXPLAIN {'QUERY PLAN ' if sqlite else ''}{statement}"
            for step in (await connection.exec_driver_sql(explain, parameters)).mappings():
                walks = step["detail"] == "SCAN jobs" if sqlite else step["type"] in ("ALL", "index")
                assert not walks, (statement, dict(step))


# Many subjects, one lane


class Shared:
    """Jobs of many subjects in one lane, and ends for them."""

    def __init__(self, q: Queue) -> None:
        self.q = q

    async def add(self, subject_id: int, version: int = 1, **other: Any) -> int:
        before = {job.id for job in (await self.q.everything())[0]}
        await self.q.add_rows({"lane": "shared", "subject_id": subject_id, "version": version, **other})
        (new,) = {job.id for job in (await self.q.everything())[0]} - before
        return int(new)

    async def waiting(self) -> list[Waiting]:
        return await queue.waiting(self.q.worker, HOST, KIND)

    async def finish(self, claim: Claim, *ends: End) -> JobState:
        return await queue.finish_batch(self.q.worker, claim, ends, self.q.clock.now, jitter=DICE)


@pytest.fixture
def shared(q: Queue) -> Shared:
    return Shared(q)


def true_at(version: int, *, stands: bool = True) -> Outcome:
    return Outcome(version, stands, {"postfix": "ok"}, {})


@asynchronous
async def test_waiting_are_the_ready_ones_due_or_not(q: Queue, shared: Shared) -> None:
    await shared.add(1)
    claim = await q.claim_one()
    ids = [await shared.add(1, 2), await shared.add(2, run_at=q.clock.now + timedelta(days=1))]
    await shared.add(3, host="other")
    await shared.add(4, kind="other.kind")
    done = await shared.add(5)
    async with q.worker.write.begin() as connection:
        await connection.execute(jobs.update().where(jobs.c.id == done).values(state=JobState.DONE))
    assert [(job.id, job.subject_id, job.version, job.attempts) for job in await shared.waiting()] == [
        (ids[0], 1, 2, 0),
        (ids[1], 2, 1, 0),
    ]
    assert claim.id not in ids


@asynchronous
async def test_a_batch_ends_exactly_the_jobs_that_waited(q: Queue, shared: Shared) -> None:
    first = await shared.add(1)
    claim = await q.claim_one()
    old, new, other = await shared.add(1, 1), await shared.add(1, 2), await shared.add(2, 5)
    found = {job.id: job for job in await shared.waiting()}
    late, elsewhere = await shared.add(2, 5), await shared.add(2, 5, host="other")
    q.clock.forward(seconds=1)
    state = await shared.finish(
        claim, End(1, true_at(2), [found[old], found[new]]), End(2, true_at(5, stands=False), [found[other]])
    )
    assert state is JobState.DONE
    assert await q.states() == {
        first: "done",
        old: "superseded",
        new: "done",
        other: "done",
        late: "ready",
        elsewhere: "ready",
    }
    rows, made_true = await q.everything()
    assert {row.finished_at for row in rows if row.id in (first, old, new, other)} == {q.clock.now}
    assert [(row.subject_id, row.version, row.stands, row.revision, row.proofs) for row in made_true] == [
        (1, 2, True, 1, {"postfix": "ok"}),
        (2, 5, False, 1, {"postfix": "ok"}),
    ]
    assert [taken.id for taken in await q.claim()] == [late]


@asynchronous
async def test_a_waiting_job_that_ended_meanwhile_stays_as_it_is(q: Queue, shared: Shared) -> None:
    """One with a lane of its own: the API wrote it."""
    await shared.add(1)
    claim = await q.claim_one()
    ids = [await shared.add(number, lane=f"own {number}") for number in (2, 3)]
    found = {job.id: job for job in await shared.waiting()}
    for other in await q.claim():
        await queue.give_up(q.worker, other, "no", q.clock.now)
    before = [await q.job(job_id) for job_id in ids]
    await shared.finish(
        claim, End(1, true_at(1)), End(2, true_at(1), [found[ids[0]]]), End(3, None, [found[ids[1]]], "not yet")
    )
    assert [await q.job(job_id) for job_id in ids] == before


@asynchronous
async def test_a_batch_never_lowers_a_version(q: Queue, shared: Shared) -> None:
    await queue.record_all(q.worker, HOST, KIND, {1: true_at(7), 2: true_at(3)}, q.clock.now)
    before = (await q.everything())[1]
    await shared.add(1)
    claim = await q.claim_one()
    q.clock.forward(seconds=1)
    await shared.finish(claim, End(2, true_at(3, stands=False)), End(1, true_at(6, stands=False)))
    _, after = await q.everything()
    assert after[0] == before[0]
    assert (after[1].version, after[1].stands, after[1].revision, after[1].applied_at) == (3, False, 2, q.clock.now)


@asynchronous
async def test_what_failed_is_tried_again_or_dead(q: Queue, shared: Shared) -> None:
    first = await shared.add(1)
    claim = await q.claim_one()
    again, tired, final = await shared.add(2), await shared.add(3), await shared.add(4)
    async with q.worker.write.begin() as connection:
        tries = jobs.update().where(jobs.c.id == tired).values(attempts=MAX_ATTEMPTS - 1)
        await connection.execute(tries)
    found = {job.id: job for job in await shared.waiting()}
    state = await shared.finish(
        claim,
        End(1, None, (), "x" * 2000),
        End(2, None, [found[again]], "not yet"),
        End(3, None, [found[tired]], "not yet"),
        End(4, Outcome(0, False, {"postfix": "failed"}, {}), [found[final]], "never", final=True),
    )
    assert state is JobState.READY
    rows = {row.id: row for row in (await q.everything())[0]}
    assert [(rows[i].state, rows[i].attempts, rows[i].error) for i in (again, tired, final)] == [
        ("ready", 1, "not yet"),
        ("dead", MAX_ATTEMPTS, "not yet"),
        ("dead", 1, "never"),
    ]
    assert (rows[first].state, rows[first].running_lane, rows[first].error) == ("ready", None, "x" * 1000)
    assert q.clock.now <= rows[again].run_at <= q.clock.now + timedelta(seconds=1)
    assert [rows[i].finished_at for i in (again, tired, final)] == [None, q.clock.now, q.clock.now]
    _, made_true = await q.everything()
    assert [(row.subject_id, row.version, row.proofs) for row in made_true] == [(4, 0, {"postfix": "failed"})]


@asynchronous
async def test_the_claimed_job_can_be_dead(q: Queue, shared: Shared) -> None:
    first = await shared.add(1)
    claim = await q.claim_one()
    assert await shared.finish(claim, End(1, None, (), "There is no alias 1.", final=True)) is JobState.DEAD
    assert await q.states() == {first: "dead"}


@pytest.mark.parametrize("loss", [*ENDS, _taken_back, _claimed_by_another])
@pytest.mark.parametrize("many", [False, True])
@asynchronous
async def test_whoever_lost_the_lease_ends_no_batch(
    q: Queue, shared: Shared, loss: Any, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr(queue, "BATCH_STEP", 1)
    await shared.add(1)
    claim = await q.claim_one()
    await shared.add(2)
    (other,) = await shared.waiting()
    await loss(q, claim)
    before = await q.everything()
    with pytest.raises(LeaseLost):
        await shared.finish(claim, End(1, true_at(1)), End(2, true_at(1), [other]))
    assert await q.everything() == before


@asynchronous
async def test_a_large_batch_that_is_cut_off_ends_in_the_same_place(
    q: Queue, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BATCH_STEP", 2)
    for subject_id in range(1, 8):
        await shared.add(subject_id)
    claim = await q.claim_one()
    end_waiting = queue._end_waiting
    steps = 0

    async def cut_off(*args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError
        await end_waiting(*args)

    async def ends() -> list[End]:
        return [End(1, true_at(1)), *(End(job.subject_id, true_at(1), [job]) for job in await shared.waiting())]

    with monkeypatch.context() as patch:
        patch.setattr(queue, "_end_waiting", cut_off)
        with pytest.raises(RuntimeError):
            await shared.finish(claim, *await ends())
    rows, made_true = await q.everything()
    # What is said to be true and the jobs that asked for it go together.
    done = [row.subject_id for row in rows if row.state == JobState.DONE]
    assert done == sorted(row.subject_id for row in made_true) == [2, 3, 4, 5]
    assert (await q.job(claim.id)).state == JobState.RUNNING
    await q.take_back(all_running=True)
    claim = await q.claim_one()
    await shared.finish(claim, *await ends())
    rows, made_true = await q.everything()
    assert {row.state for row in rows} == {JobState.DONE}
    ended = sorted((row.subject_id, row.version, row.revision) for row in made_true)
    assert ended == [(n, 1, 1) for n in range(1, 8)]


@asynchronous
async def test_ten_thousand_ends_are_few_statements(q: Queue, shared: Shared) -> None:
    await q.add_rows(*({"lane": "shared", "subject_id": n} for n in range(1, 10_001)))
    claim = await q.claim_one()
    found = [End(job.subject_id, true_at(1), [job]) for job in await shared.waiting()]
    with statements(q.worker) as sent:
        await shared.finish(claim, *found, End(claim.subject_id, true_at(1)))
    assert len(sent) == 2 * 10_000 // queue.BATCH_STEP
    assert set((await q.states()).values()) == {"done"}
    assert len((await q.everything())[1]) == 10_000
