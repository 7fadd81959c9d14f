"""What the service process forgets in time: old mail, its links, failures, and addresses of those who are gone."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from app.models.hosts import SERVICE_HOST
from app.models.jobs import JobState, jobs
from app.models.login_failures import login_failures
from app.models.notices import NoticeKind, notices
from app.models.password_resets import password_resets
from app.models.users import users
from app.queue.claim import claim
from app.queue.contracts import MAIL_SEND
from app.services.login_failures import KNOWN, KNOWN_LIFETIME
from app.workers.service.loop import TIDY, tidy
from tests.workers.service.post import CONTACT, Post, link_key_file, post, sink, sinks
from tests.workers.service.test_mail import send

__all__ = ["link_key_file", "post", "sink", "sinks"]
pytestmark = pytest.mark.asyncio
INSTANT = timedelta(microseconds=1)


async def ids(post: Post, table: Any) -> list[int]:
    async with post.api.read.connect() as connection:
        return list((await connection.execute(select(table.c.id).order_by(table.c.id))).scalars())


async def tidied(post: Post, **options: int) -> None:
    await tidy(post.parts.database, post.settings, post.clock.now, **options)


async def test_old_mail_and_its_links_go_and_young_ones_stay(post: Post) -> None:
    old = await post.notice()
    post.clock.forward(microseconds=1)
    young = await post.notice()
    kept = (await post.row(young)).reset_id
    await tidied(post)
    assert await ids(post, notices) == [old, young]
    post.clock.forward(days=post.settings.keep_notices_days)
    await tidied(post)
    assert await ids(post, notices) == [young]
    assert await ids(post, password_resets) == [kept]


async def test_a_link_stays_as_long_as_mail_about_it(post: Post) -> None:
    old = await post.notice()
    reset_id = (await post.row(old)).reset_id
    post.clock.forward(days=1)
    young = await post.notice(NoticeKind.LOCKED)
    await post.as_owner(update(notices).where(notices.c.id == young).values(reset_id=reset_id))
    post.clock.forward(days=post.settings.keep_notices_days - 1, microseconds=1)
    await tidied(post)
    assert (await ids(post, notices), await ids(post, password_resets)) == ([young], [reset_id])
    post.clock.forward(days=1)
    await tidied(post)
    assert (await ids(post, notices), await ids(post, password_resets)) == ([], [])


async def test_old_failures_go(post: Post) -> None:
    now = post.clock.now
    row = {"kind": "mail", "login": "ann@cacert.test", "network": "192.0.2.1/32", "attempts": 1, "first_at": now}
    async with post.api.write.begin() as connection:
        for guess, last_at in (("old", now - KNOWN_LIFETIME - INSTANT), (KNOWN, now - KNOWN_LIFETIME)):
            await connection.execute(insert(login_failures), {**row, "guess": guess, "last_at": last_at})
    await tidied(post)
    async with post.api.read.connect() as connection:
        assert list((await connection.execute(select(login_failures.c.guess))).scalars()) == [KNOWN]


async def test_in_batches(post: Post) -> None:
    for _ in range(5):
        await post.notice()
    post.clock.forward(days=31)
    for left in (3, 1, 0):
        await tidied(post, limit=2)
        assert len(await ids(post, notices)) == left


async def test_who_is_purged_is_forgotten(post: Post) -> None:
    gone = await post.notice()
    now = post.clock.now
    ended = {"state": "deleted", "state_before": "active", "deleted_at": now, "purge_at": now, "purged_at": now}
    await post.as_owner(update(users).where(users.c.id == post.user_id).values(ended))
    await post.account("bob")
    stays = await post.notice()
    await tidied(post)
    assert ((await post.row(gone)).recipient, (await post.row(stays)).recipient) == (None, CONTACT)
    await send(post)
    assert [message["X-Rcpt-Args"] for message in post.sink.messages()] == [f"<{CONTACT}>"]


async def test_what_a_process_left_behind_is_taken_back_at_the_start_and_then_by_its_lease(post: Post) -> None:
    await post.notice()
    [_] = await claim(post.parts.database, SERVICE_HOST, post.clock.now, limit=1, kinds=[MAIL_SEND])
    await send(post)
    assert len(post.sink.messages()) == 1

    await post.notice()
    [_] = await claim(post.parts.database, SERVICE_HOST, post.clock.now, limit=1, kinds=[MAIL_SEND])
    await send(post)
    assert len(post.sink.messages()) == 1, "another process may have it"
    post.clock.forward(seconds=TIDY.total_seconds() + 1)
    await send(post)
    assert len(post.sink.messages()) == 2
    async with post.api.read.connect() as connection:
        done = select(func.count()).where(jobs.c.kind == MAIL_SEND, jobs.c.state == JobState.DONE)
        assert (await connection.execute(done)).scalar() == 2
