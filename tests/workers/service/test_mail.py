"""Notices are sent to a real mail server, once, and nothing of them is told to anybody else."""

import asyncio
import json
import signal
from collections import Counter
from datetime import timedelta
from email.message import EmailMessage
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from app.models.domains import domains
from app.models.jobs import JobState, jobs
from app.models.notices import NoticeKind, notices
from app.models.users import users
from app.workers.service import mail
from tests.workers.host.machine import until
from tests.workers.service.post import CONTACT, Post, link_key_file, post, sink, sinks

__all__ = ["link_key_file", "post", "sink", "sinks"]
pytestmark = pytest.mark.asyncio

STEPS = ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", ".", "QUIT"]


def text_of(message: EmailMessage, kind: str = "plain") -> str:
    part = message.get_body((kind,))
    assert part is not None
    return str(part.get_content())


async def send(post: Post) -> None:
    await post.parts.round(asyncio.Event())


async def test_a_reset_carries_its_link_and_no_row_or_log_does(post: Post, capfd: pytest.CaptureFixture[str]) -> None:
    notice_id = await post.notice(reason="lost it")
    await send(post)
    [message] = post.sink.messages()
    assert message["X-Rcpt-Args"] == f"<{CONTACT}>"
    assert message["X-Mail-Args"].startswith(f"<returns+{notice_id}.")
    assert message["X-Mail-Args"].endswith("@cacert.test>")
    assert (message["From"].addresses[0].addr_spec, message["To"]) == ("accounts@cacert.test", f"Ann <{CONTACT}>")
    assert message["Auto-Submitted"] == "auto-generated"
    link = await post.link(notice_id)
    assert f"\n{link}\n" in text_of(message)
    assert text_of(message, "html").count(f'href="{link}"') == 1
    for text in (text_of(message), text_of(message, "html")):
        assert "ann@cacert.test" in text
        assert "An administrator asked on" in text
        assert "lost it" in text
    row, job = await post.row(notice_id), await post.job(notice_id)
    assert (row.sent_at, row.bounced_at, job.state, job.error) == (post.clock.now, None, JobState.DONE, None)
    assert post.parts.settings.link("x") not in f"{row}{job}"
    assert link.partition("#")[2] not in f"{row}{job}{''.join(capfd.readouterr())}"


@pytest.mark.parametrize("kind", list(NoticeKind))
async def test_each_kind_says_what_happened_and_only_two_have_a_link(post: Post, kind: NoticeKind) -> None:
    notice_id = await post.notice(kind, reason="lost it")
    if kind is NoticeKind.LOCKED:
        await post.as_owner(update(users).values(suspended_reason="stolen it"))
    await send(post)
    [message] = post.sink.messages()
    text = text_of(message)
    assert "ann@cacert.test" in message["Subject"]
    assert "ann@cacert.test" in text
    links = kind in (NoticeKind.RESET, NoticeKind.INVITATION)
    assert ("/reset#" in text, "/reset#" in text_of(message, "html")) == (links, links)
    assert "UTC" in text
    assert ("lost it" in text) == (kind in (NoticeKind.RESET, NoticeKind.RESET_SHOWN))
    assert ("postmaster@cacert.test" in text) == (kind is not NoticeKind.INVITATION)
    assert ("stolen it" in text) == (kind is NoticeKind.LOCKED)
    assert "{" not in text
    assert (await post.row(notice_id)).sent_at is not None


@pytest.mark.parametrize(
    ("name", "greeting"),
    [
        ("Änn Ünder", "Hello Änn Ünder,"),
        ("Ann\r\nBcc: victim@example.net", "Hello,"),
        ("Win at https://evil.example/", "Hello,"),
        ("visit evil.example now", "Hello,"),
        ("<b>Ann</b>", "Hello,"),
        ("Ann \u202egnp.exe", "Hello,"),
        ("", "Hello,"),
        ("x" * 61, "Hello,"),
        ("O’Hara-Smith Jr.", "Hello O’Hara-Smith Jr.,"),
    ],
)
async def test_a_hostile_name_or_reason_is_only_text(post: Post, name: str, greeting: str) -> None:
    async with post.api.write.begin() as connection:
        await connection.execute(update(users).values(display_name=name))
    await post.notice(reason=f"{name}\r\n\r\n<script>alert(1)</script> see https://evil.example/x or evil.example")
    await send(post)
    [message] = post.sink.messages()
    assert text_of(message).startswith(f"{greeting}\n")
    assert set(message.keys()) <= {
        *("X-Client-Addr", "X-Client-Proto", "X-Helo-Args", "X-Mail-Args", "X-Rcpt-Args", "Received"),
        *("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type"),
    }
    assert message["To"].addresses[0].addr_spec == CONTACT
    html = text_of(message, "html")
    assert "<script>" not in html
    assert "<b>" not in html
    for text in (text_of(message), html):
        assert "evil.example" not in text
        assert "\u202e" not in text
    assert max(map(len, message.as_bytes().splitlines())) < 998


async def test_nobody_to_write_to(post: Post) -> None:
    notice_id = await post.notice(recipient=None)
    await send(post)
    assert post.sink.messages() == []
    job = await post.job(notice_id)
    assert (job.state, job.error) == (JobState.DONE, "there is nobody to send it to")


@pytest.mark.parametrize("what", ["expired", "used_at", "cancelled_at"])
async def test_a_link_that_is_no_longer_good_is_not_sent(post: Post, what: str) -> None:
    notice_id = await post.notice()
    if what == "expired":
        post.clock.forward(minutes=30)
    else:
        await post.change_reset(notice_id, **{what: post.clock.now})
    await send(post)
    assert post.sink.messages() == []
    job, row = await post.job(notice_id), await post.row(notice_id)
    assert (job.state, job.error, row.sent_at) == (JobState.DONE, "its link is not valid any more", None)


async def test_what_passes_is_tried_again_and_what_does_not_is_not(post: Post) -> None:
    for option, said in (
        ("-r RCPT", "450 4.3.0 Error: command failed"),
        ("-r .", "450 4.3.0 Error: command failed"),
        ("-f MAIL", "500 5.3.0 Error: command failed"),
        ("-q DATA", "the mail server does not answer"),
    ):
        notice_id = await post.notice()
        post.sink.start(*option.split(maxsplit=1))
        await send(post)
        job = await post.job(notice_id)
        assert (job.state, job.attempts) == (JobState.READY, 1), option
        assert job.error.startswith(said), option
        assert job.run_at <= post.clock.now + timedelta(seconds=1)
    post.sink.stop()
    post.clock.forward(minutes=5)
    await send(post)
    assert (await post.job(notice_id)).error == "the mail server cannot be reached: Connection refused"
    post.sink.start()
    post.clock.forward(minutes=5)
    await send(post)
    assert len({message["Message-ID"] for message in post.sink.messages()}) == 4
    assert (await post.job(notice_id)).state == JobState.DONE

    for option in ("RCPT", "."):
        notice_id = await post.notice()
        post.sink.start("-f", option, "-B", f"554 5.7.1 <{CONTACT}>: no {await post.link(notice_id)} here")
        await send(post)
        job, row = await post.job(notice_id), await post.row(notice_id)
        assert (job.state, job.error) == (JobState.DEAD, "refused: 554 5.7.1 …: no … here")
        assert (row.bounced_at, row.bounce, row.sent_at) == (post.clock.now, "554 5.7.1 …: no … here", None)


async def test_it_is_tried_for_a_day_but_not_for_ever(post: Post) -> None:
    notice_id = await post.notice(NoticeKind.LOCKED)
    post.sink.stop()
    await post.as_owner(update(jobs).values(attempts=mail.ATTEMPTS - 2))
    for state in (JobState.READY, JobState.DEAD):
        post.clock.forward(minutes=5)
        await send(post)
        assert (await post.job(notice_id)).state == state
    assert (await post.job(notice_id)).error.endswith(f"(gave up after {mail.ATTEMPTS} attempts)")


async def test_a_row_that_no_request_makes_holds_up_no_other(post: Post) -> None:
    hostile = [await post.notice() for _ in range(3)]
    for notice_id, recipient in zip(hostile, ("a@b\r\nRCPT TO:<c@d.test>", "no address", ""), strict=True):
        await post.as_owner(update(notices).where(notices.c.id == notice_id).values(recipient=recipient))
    good = await post.notice()
    await send(post)
    assert (await post.row(good)).sent_at is not None
    assert len(post.sink.messages()) == 1
    for notice_id in hostile:
        job = await post.job(notice_id)
        assert (job.state, job.error) == (JobState.DEAD, "no letter can be made of it: BadAddress")


async def test_one_that_was_sent_is_not_sent_by_another_job(post: Post) -> None:
    notice_id = await post.notice()
    await send(post)
    row = (await post.job(notice_id))._asdict()
    again = {
        name: row[name]
        for name in ("host", "lane", "kind", "subject_id", "version", "request_id", "run_at", "created_at")
    }
    async with post.api.write.begin() as connection:
        await connection.execute(insert(jobs), again)
    await send(post)
    assert len(post.sink.messages()) == 1
    assert (await post.job(notice_id)).error == "it was sent already"


async def test_without_a_primary_domain_it_waits(post: Post) -> None:
    notice_id = await post.notice()
    await post.as_owner(update(domains).values(kind="virtual", primary_slot=None))
    await send(post)
    assert (await post.job(notice_id)).error == "there is no primary domain"


async def test_the_outbox_gets_a_file_that_only_we_can_read(post: Post) -> None:
    outbox = post.settings.wake_directory / "outbox"
    notice_id = await post.notice()
    post.sink.stop()
    with post.process(OUTBOX=str(outbox)):

        async def written() -> bool:
            return (await post.row(notice_id)).sent_at is not None

        await until(written)
    [file] = outbox.iterdir()
    assert file.name == f"{notice_id}.eml"
    assert (await post.link(notice_id)).encode() in file.read_bytes().replace(b"=\r\n", b"")
    assert outbox.stat().st_mode & 0o077 == 0


async def attempts(post: Post) -> int:
    async with post.api.read.connect() as connection:
        return sum((await connection.execute(select(jobs.c.attempts).where(jobs.c.host == "-"))).scalars())


async def test_killed_at_every_step_it_loses_nothing_and_repeats_one_at_most(post: Post) -> None:
    """The process is real, and so is SIGKILL. The mail server takes ten seconds for the step at which it happens."""
    ids = [await post.notice() for _ in STEPS]
    for step in STEPS:
        post.sink.start("-W", f"{step}:10")
        before, tried = len(post.sink.messages()), await attempts(post)

        async def claimed(tried: int = tried) -> bool:
            return await attempts(post) > tried

        with post.process() as process:
            await until(claimed, seconds=20)
            # By now it is at that step, or has been there.
            await asyncio.sleep(0.3)
            process.kill()
            await asyncio.to_thread(process.wait)
        post.sink.start()
        assert len(post.sink.messages()) - before <= (2 if step == "QUIT" else 1), step

    async def all_sent() -> bool:
        return all([(await post.row(notice_id)).sent_at is not None for notice_id in ids])

    with post.process() as process:
        await until(all_sent, seconds=30)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
    found: dict[str, list[tuple[str, str, str]]] = {}
    for message in post.sink.messages():
        if message.get_body(("html",)) is None:
            continue  # cut off: this server never had it
        seen = (message["X-Mail-Args"], str(message["Content-Type"]), text_of(message) + text_of(message, "html"))
        found.setdefault(message["Message-ID"], []).append(seen)
    assert len(found) == len(ids)
    repeated = Counter(len(copies) for copies in found.values())
    assert sum(len(copies) - 1 for copies in found.values()) <= len(STEPS), repeated
    assert max(repeated) > 1, "a kill after the mail server had it must have repeated one"
    for copies in found.values():
        assert len(set(copies)) == 1, "a repeated mail carries the same link"
    texts = "".join(copies[0][2] for copies in found.values())
    for notice_id in ids:
        assert (await post.link(notice_id)) in texts
        assert (await post.job(notice_id)).state == JobState.DONE


async def test_nothing_of_it_is_in_the_log(post: Post) -> None:
    good, refused, broken = await post.notice(), await post.notice(), await post.notice()
    links = [await post.link(each) for each in (good, refused, broken)]
    await post.as_owner(update(notices).where(notices.c.id == broken).values(recipient="x y@secret.test"))

    async def ended() -> bool:
        return all([(await post.job(each)).state == JobState.DEAD for each in (good, refused, broken)])

    post.sink.start("-f", "RCPT", "-B", f"550 5.1.1 <{CONTACT}>: unknown, {links[1]}")
    with post.process(LOG_LEVEL="debug") as process:
        await until(ended, seconds=20)
        process.send_signal(signal.SIGTERM)
        said = (await asyncio.to_thread(process.communicate))[1]
    events: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines()]
    assert [event["state"] for event in events if event["event"] == "job"] == ["dead", "dead", "dead"]
    for secret in (CONTACT, "elsewhere.test", "secret.test", "/reset#", *(link.partition("#")[2] for link in links)):
        assert secret not in said
