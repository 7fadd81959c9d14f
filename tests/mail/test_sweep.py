"""Drift on a real mail host: found by `cacert-mail sweep --dry-run`, repaired by the sweep, and mail flows again."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.config import WorkerSettings
from app.models.views import VIEWS
from app.workers.host.sweep import Report
from tests.mail.conftest import Site
from tests.mail.test_accounts import arrived, send
from tests.stack.mail import PRIMARY_DOMAIN
from tests.workers.host.machine import sweep_command

pytestmark = pytest.mark.asyncio


def archive(site: Site, user: dict[str, Any]) -> Path:
    return site.mail.homes / ".archive" / str(user["id"])


async def dry(worker_settings: WorkerSettings) -> tuple[int, list[str]]:
    done = await asyncio.to_thread(sweep_command, worker_settings, "--dry-run")
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


async def quiet(site: Site) -> None:
    """The worker's own first sweep must not be in the way of what the test breaks."""
    for _ in range(1000):
        if site.mariadb.sql("SELECT swept_at IS NOT NULL FROM host_status", "owner") == [["1"]]:
            return
        await asyncio.sleep(0.01)
    pytest.fail("no first sweep")


async def test_drift_of_every_kind(site: Site, worker_settings: WorkerSettings) -> None:
    await quiet(site)
    names = ("fine", "home", "mode", "maildir", "row", "hidden", "dead", "uid", "back", "foreign")
    users = dict(zip(names, await asyncio.gather(*map(site.create, names)), strict=True))
    homes = {name: Path(user["home"]) for name, user in users.items()}
    assert await dry(worker_settings) == (0, ["10 accounts compared, 0 differed, 0 repaired, 0 left."])

    await site.ask("DELETE", f"/v1/users/back@{PRIMARY_DOMAIN}")
    archive(site, users["back"]).rename(homes["back"])
    shutil.rmtree(homes["home"])
    homes["mode"].chmod(0o755)
    shutil.rmtree(homes["maildir"] / "Maildir")
    os.chown(homes["foreign"], 4711, 4711)
    ids = {name: user["id"] for name, user in users.items()}
    site.mariadb.sql(f"DELETE FROM applied WHERE subject_id = {ids['row']}", "owner")
    site.mariadb.sql(f"UPDATE applied SET stands = 0 WHERE subject_id = {ids['hidden']}", "owner")
    site.mariadb.sql(f"UPDATE users SET version = 2 WHERE id = {ids['dead']}", "owner")
    site.mariadb.sql(f"UPDATE jobs SET state = 'dead' WHERE subject_id = {ids['dead']}", "owner")
    site.mariadb.sql(
        f"UPDATE applied SET result = JSON_SET(result, '$.uid', {users['fine']['uid']}, '$.gid', {users['fine']['uid']})"
        f" WHERE subject_id = {ids['uid']}",
        "owner",
    )
    await asyncio.to_thread(site.mail.doveadm, "auth", "cache", "flush")
    assert await send(site, f"row@{PRIMARY_DOMAIN}") == 550

    before = site.mariadb.sql("SELECT subject_id, revision FROM applied ORDER BY subject_id", "owner")
    status, lines = await dry(worker_settings)
    assert status == 1
    assert lines.pop() == "10 accounts compared, 9 differed, 0 repaired, 9 left."
    said = {int(line.split()[1].rstrip(":")): line.split(": ", 1)[1] for line in lines}
    uid = users["fine"]["uid"]
    assert said == {
        ids["home"]: f"maildir: {homes['home']}: home is missing.",
        ids["mode"]: said[ids["mode"]],
        ids["maildir"]: f"maildir: {homes['maildir']}: Maildir is missing.",
        ids["row"]: "version 0 is applied, 1 is wanted",
        ids["hidden"]: "it does not stand",
        ids["dead"]: "version 1 is applied, 2 is wanted",
        ids["uid"]: f"dovecot: it has uid {uid}, gid {uid} and home {homes['uid']} for the login",
        ids["back"]: "maildir: its home is in place",
        ids["foreign"]: said[ids["foreign"]],
    }
    assert "drwxr-xr-x" in said[ids["mode"]]
    assert "4711" in said[ids["foreign"]]
    assert site.mariadb.sql("SELECT subject_id, revision FROM applied ORDER BY subject_id", "owner") == before
    assert not homes["home"].exists()
    assert homes["back"].exists()

    report: Report = await site.worker.sweep()
    assert (report.differ, report.repaired, report.left) == (9, 8, 1)
    assert await dry(worker_settings) == (
        1,
        [f"user {ids['foreign']}: {said[ids['foreign']]}", "10 accounts compared, 1 differed, 0 repaired, 1 left."],
    )
    assert await send(site, f"back@{PRIMARY_DOMAIN}") == 550
    assert not homes["back"].exists()
    assert archive(site, users["back"]).exists()
    good = [name for name in names if name not in ("back", "foreign")]
    assert await asyncio.gather(*(send(site, f"{name}@{PRIMARY_DOMAIN}") for name in good)) == [250] * len(good)
    for name in good:
        await arrived(site, str(homes[name]))
        assert (await site.ask("GET", f"/v1/users/{name}@{PRIMARY_DOMAIN}"))["ready"]
    answer = await site.client.get(f"/v1/users/foreign@{PRIMARY_DOMAIN}")
    assert answer.json()["ready"] is False
    assert answer.json()["proofs"]["maildir"]["result"] == "failed"
    [[kept]] = site.mariadb.sql("SELECT sweep FROM host_status", "owner")
    assert '"repaired": 8' in kept


async def test_a_deleted_account_that_is_still_known(site: Site, worker_settings: WorkerSettings) -> None:
    """Views that somebody changed by hand. Whose address has a successor is nobody's mistake."""
    await quiet(site)
    user, other = await asyncio.gather(site.create("gone"), site.create("other"))
    for each in (user, other):
        await site.ask("DELETE", f"/v1/users/{each['id']}")
    await site.create("other", reuse_address=True)
    assert await dry(worker_settings) == (0, ["3 accounts compared, 0 differed, 0 repaired, 0 left."])
    uid, home = user["uid"], user["home"]
    gone = f"SELECT '{user['address']}' AS address, '{worker_settings.mail_host}' AS host"
    try:
        for view, more in (("postfix_recipients", ""), ("dovecot_users", f", {uid}, {uid}, '{home}', NULL, 'never'")):
            [definition] = [each.select("mariadb") for each in VIEWS if each.name == view]
            site.mariadb.sql(f"CREATE OR REPLACE VIEW {view} AS {definition} UNION ALL {gone}{more}", "owner")
        status, lines = await dry(worker_settings)
        assert status == 1
        assert lines == [
            f"user {user['id']}: postfix: its map still has the address; dovecot: it still knows the login",
            "3 accounts compared, 1 differed, 0 repaired, 1 left.",
        ]
        report = await site.worker.sweep()
        assert (report.differ, report.repaired, report.left) == (1, 0, 1)
    finally:
        for view in ("postfix_recipients", "dovecot_users"):
            [definition] = [each.select("mariadb") for each in VIEWS if each.name == view]
            site.mariadb.sql(f"CREATE OR REPLACE VIEW {view} AS {definition}", "owner")
    report = await site.worker.sweep()
    assert (report.differ, report.repaired) == (1, 1)
    assert (await site.worker.sweep()).differ == 0


async def test_postfix_away(site: Site, worker_settings: WorkerSettings) -> None:
    """What only Postfix could say is left; the homes are repaired all the same, and the command ends."""
    await quiet(site)
    user = await site.create()
    shutil.rmtree(Path(user["home"]) / "Maildir")
    broken = worker_settings.model_copy(update={"postfix_recipients": "lmdb:/nowhere"})
    status, lines = await dry(broken)
    assert status == 1
    assert lines[0].startswith("/usr/sbin/postmap ")
    assert lines[1:] == [
        f"user {user['id']}: maildir: {user['home']}: Maildir is missing.",
        "1 accounts compared, 1 differed, 0 repaired, 2 left.",
    ]
