"""Aliases on the real mail stack: from the row to mail that arrives, without a reload."""

import asyncio
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.config import WorkerSettings
from tests.mail.conftest import Site, emptied, run_directory, site
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB

pytestmark = pytest.mark.asyncio
__all__ = ["emptied", "run_directory", "site"]


@pytest.fixture
def worker_settings(emptied: MailStack, mariadb: MariaDB, run_directory: Path) -> WorkerSettings:
    return WorkerSettings(
        database_url=SecretStr(mariadb.url("worker")),
        mail_host=HOST,
        host_root=emptied.host_root,
        lock_file=run_directory / "worker.lock",
        wake_directory=run_directory,
        postfix_config=emptied.postfix_config,
        postfix_recipients=emptied.recipients_map,
        postfix_local_aliases=emptied.local_aliases_map,
        postfix_virtual_aliases=emptied.virtual_aliases_map,
        aliases_directory=emptied.file.aliases_dir,
        dovecot_config=emptied.dovecot_config,
        uid_first=emptied.file.uid_first,
        uid_last=emptied.file.uid_last,
    )


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        (f"info@{PRIMARY_DOMAIN}", "receive_only"),
        (f"pr@{PRIMARY_DOMAIN}", "send_as"),
        ("info@other.test", "receive_only"),
        ("pr@other.test", "send_as"),
    ],
)
async def test_mail_to_an_alias_arrives_as_soon_as_it_is_ready(site: Site, address: str, kind: str) -> None:
    await site.create()
    home = site.mail.homes / "alice"
    assert await asyncio.to_thread(site.mail.send, address) == 550
    made = await site.post("/v1/aliases", address=address, kind=kind, destinations=[f"alice@{PRIMARY_DOMAIN}"])
    assert await asyncio.to_thread(site.mail.send, address) == 250
    assert len(await asyncio.to_thread(site.mail.wait_for_mail, home)) == 1
    gone = await site.client.delete(f"/v1/aliases/{made['id']}", headers={"Prefer": "wait=20"}, timeout=30)
    assert gone.json()["ready"], gone.text
    assert await asyncio.to_thread(site.mail.send, address) == 550


async def test_the_sweep_agrees_with_what_postfix_answers(site: Site) -> None:
    await site.create()
    for number, (domain, kind) in enumerate(
        [(PRIMARY_DOMAIN, "receive_only"), (PRIMARY_DOMAIN, "send_as"), ("other.test", "send_as")]
    ):
        to = [f"alice@{PRIMARY_DOMAIN}"] + ([f"a0@{PRIMARY_DOMAIN}"] if number else [])
        await site.post("/v1/aliases", address=f"a{number}@{domain}", kind=kind, destinations=to)
    report = await site.worker.sweep()
    assert (report.aliases, report.differ, report.left) == (3, 0, 0), report.lines
