"""The story of an account, end to end, with every process that production has: the website makes it and invites its owner, who
sets a password by the mailed link, reads and sends; then somebody of the role `limited` has a reset mailed, and what the old
password had is over.
"""

import asyncio
import imaplib
import re
import smtplib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config import WorkerSettings
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from tests.conftest import ACTOR
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, free_ports, wait_until
from tests.stack.sink import Sink

ALICE, CONTACT = f"alice@{PRIMARY_DOMAIN}", "alice@elsewhere.test"
FIRST, SECOND = "seven green lanterns over the harbour", "eight blue herons by the weir"
WAIT = {"Prefer": "wait=20"}


@dataclass
class Story:
    mail: MailStack
    sink: Sink
    url: str
    website: httpx.Client
    limited: httpx.Client
    auditor: httpx.Client
    visitor: httpx.Client
    read: int = 0

    def letter(self) -> tuple[str, str]:
        """The next one that arrives elsewhere: its subject and text."""
        assert wait_until(lambda: len(self.sink.messages()) > self.read), self.mail.mail_log.read_text()[-2000:]
        message = self.sink.messages()[self.read]
        self.read += 1
        assert message["X-Rcpt-Args"].startswith(f"<{CONTACT}>")
        text = message.get_body(("plain",))
        assert text is not None
        return message["Subject"], text.get_content()

    def token(self) -> str:
        """Out of the link in the next letter."""
        _, text = self.letter()
        (token,) = re.findall(rf"^{re.escape(self.url)}/reset#([\w-]+)\s*$", text, re.MULTILINE)
        return str(token)

    def confirm(self, token: str, password: str, *revoke: str) -> httpx.Response:
        body = {"token": token, "password": password, "revoke": revoke}
        return self.visitor.post("/v1/password-resets/confirm", json=body, headers=WAIT)

    def opens(self, password: str) -> bool:
        try:
            self.mail.imap(ALICE, password).logout()
        except imaplib.IMAP4.error:
            return False
        return True


def checked(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert answer.status_code in statuses, answer.text
    return dict(answer.json())


async def _fill(database_url: str) -> dict[Role, tuple[str, str]]:
    database = Database(database_url)
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
        await create_host(change, HOST)
        made = {}
        for role in (Role.WEBSITE, Role.LIMITED, Role.AUDITOR):
            client_id, secret = (await create_principal(change, role.value, role))[:2]
            made[role] = (client_id, secret)
    await database.close()
    return made


@pytest.fixture
def story(
    emptied: MailStack, mariadb: MariaDB, worker_settings: WorkerSettings, run_directory: Path, key_directory: Path
) -> Iterator[Story]:
    processes = Processes()
    clients: list[httpx.Client] = []
    try:
        principals = asyncio.run(_fill(mariadb.url("api")))
        sink = Sink(processes, emptied.relay_port)
        sink.start()
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        settings = {
            "KEY_DIRECTORY": str(key_directory),
            "LINK_KEY_FILE": str(key_directory / "link.key"),
            "PUBLIC_URL": url,
            "ISSUER": url,
            "PORT": str(port),
            "SMTP_PORT": str(emptied.settings.service_port),
            "WAKE_DIRECTORY": str(run_directory),
            "POLL_SECONDS": "0.2",
        }
        for name, value in worker_settings.model_dump(exclude={"database_url", "durable"}, exclude_none=True).items():
            settings.setdefault(name.upper(), str(value))
        for name in ("worker", "service", "api"):
            command = [sys.executable, "-m", "app.cli.main", name]
            process = processes.start(command, **settings, DATABASE_URL=mariadb.url(name))
        processes.wait_for(process, port, processes.directory / "python.out")

        def client(role: Role | None = None) -> httpx.Client:
            auth = None if role is None else principals[role]
            clients.append(httpx.Client(base_url=url, auth=auth, timeout=30, trust_env=False))
            return clients[-1]

        story = Story(emptied, sink, url, client(Role.WEBSITE), client(Role.LIMITED), client(Role.AUDITOR), client())
        yield story
        log = (processes.directory / "python.out").read_text()
        for secret in (FIRST, SECOND, *(secret for _, secret in principals.values())):
            assert secret not in log
        assert "Traceback" not in log, log[-4000:]
    finally:
        for each in clients:
            each.close()
        processes.close()


def test_from_the_invitation_to_the_reset_that_ends_every_old_access(story: Story) -> None:
    # The website makes the account; nobody knows a password, so nothing opens it.
    new = {"address": ALICE, "display_name": "Alice", "contact_address": CONTACT, "invite": True}
    user = checked(story.website.post("/v1/users", json=new, headers=WAIT), 201)
    assert (user["ready"], user["has_password"]) == (True, False)
    assert not story.opens(FIRST)

    # Its owner reads the invitation elsewhere, opens the page, and chooses a password. A weak one is named as such.
    invitation = story.token()
    assert story.visitor.get("/reset").status_code == 200
    weak = checked(story.confirm(invitation, "password"), 422)
    assert weak["type"] == "/problems/bad-password"
    chosen = checked(story.confirm(invitation, FIRST), 200)
    assert (chosen["address"], chosen["ready"]) == (ALICE, True)
    assert story.opens(FIRST)
    assert story.confirm(invitation, SECOND).status_code == 410, "the link has been used"
    assert CONTACT not in story.letter()[1], "the notice that it was"

    # The owner reads and sends. Signed in at the website, they make a password for their telephone.
    token = checked(story.website.post(f"/v1/users/{ALICE}/owner-tokens"), 201)["access_token"]
    telephone = checked(
        story.visitor.post(
            f"/v1/users/{ALICE}/app-passwords",
            json={"name": "Telephone", "protocols": ["imap"]},
            headers={"Authorization": f"Bearer {token}"},
        ),
        201,
    )["password"]
    assert story.opens(telephone)
    imap = story.mail.imap(ALICE, FIRST)
    imap.select("INBOX")
    smtp = story.mail.submission(ALICE, FIRST)
    assert smtp.mail(ALICE)[0] == 250
    smtp.rset()

    # Somebody who may reset passwords, and nothing else, has a link mailed.
    assert story.limited.get(f"/v1/users/{ALICE}").status_code == 403
    asked = {"user": ALICE, "reason": "Called us; the laptop was stolen", "deliver": "mail"}
    reset = checked(story.limited.post("/v1/password-resets", json=asked), 202)
    assert CONTACT not in str(reset), "masked"
    assert reset["link"] is None
    token = story.token()
    assert token not in str(reset)
    assert story.opens(FIRST), "asking for it changes nothing"

    # Using it ends all that the old password had opened, and the old password itself.
    ended = checked(story.confirm(token, SECOND, "app_passwords"), 200)
    assert (ended["ready"], ended["proofs"]["sessions"]["result"]) == (True, "ok")
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        imap.noop()
    imap.shutdown()
    with pytest.raises(smtplib.SMTPException):
        smtp.sendmail(ALICE, [CONTACT], f"From: {ALICE}\r\n\r\nx\r\n")
    smtp.close()
    assert not story.opens(FIRST)
    assert not story.opens(telephone)
    assert story.opens(SECOND)
    assert story.confirm(token, FIRST).status_code == 410
    with story.mail.submission(ALICE, SECOND) as again:
        again.sendmail(ALICE, [CONTACT], f"From: {ALICE}\r\nTo: {CONTACT}\r\nSubject: I am back\r\n\r\nx\r\n")
    subjects = {story.letter()[0], story.letter()[0]}
    assert "I am back" in subjects
    assert checked(story.limited.get(f"/v1/password-resets/{reset['id']}"), 200)["state"] == "used"

    # Who did what is on record, without a word of a secret.
    answer = story.auditor.get("/v1/audit-events", params={"user_id": user["id"], "limit": 500})
    events = checked(answer, 200)["items"]
    actions = [event["action"] for event in events]
    assert {"users.create", "users.reset-password"} <= set(actions), actions
    for secret in (FIRST, SECOND, telephone, token, invitation):
        assert secret not in answer.text
