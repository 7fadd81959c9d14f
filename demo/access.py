"""What opens a mailbox, and how each of it ends: guesses, app passwords, a reset by the help desk, a lock, and who did it."""

import email
import os
import re
import smtplib
import subprocess
import sys
from email.message import EmailMessage
from email.policy import default
from typing import Any

import httpx

from demo.site import ALICE, BOB, NEW_PASSWORD, PASSWORD, Ask, Demo, closed, expect, refused
from tests.stack.processes import wait_until

THIEF = "127.0.0.66"


def access(demo: Demo, client: httpx.Client, ask: Ask) -> None:
    guesses(demo, client)
    app_password = telephone(demo, client)
    reset(demo, client, ask, app_password)
    lock(demo, ask)
    audit(demo, client)


def guesses(demo: Demo, client: httpx.Client) -> None:
    for number in range(4):
        expect(refused(demo, f"wrong {number}", source=THIEF), "a wrong password opens it")
    expect(refused(demo, PASSWORD, source=THIEF), "guessing goes on")
    expect(not refused(demo, PASSWORD), "the owner is locked out")
    demo.line("guessed: after four wrong passwords that address gets nothing more, the owner is not touched")
    for lockout in client.get("/v1/lockouts", params={"login": ALICE}).json()["items"]:
        client.delete(f"/v1/lockouts/{lockout['id']}").raise_for_status()
    expect(not refused(demo, PASSWORD, source=THIEF), "the lockout was not lifted")
    demo.line("           lifted by an administrator")


def telephone(demo: Demo, client: httpx.Client) -> str:
    body = {"name": "Telephone", "protocols": ["imap"]}
    made = client.post(f"/v1/users/{ALICE}/app-passwords", json=body)
    made.raise_for_status()
    password = str(made.json()["password"])
    expect(not refused(demo, password), "the app password does not open the mailbox")
    try:
        demo.mail.submission(ALICE, password).close()
    except smtplib.SMTPAuthenticationError:
        demo.line("app password: made for the telephone, opens IMAP, and is refused for sending")
        return password
    raise RuntimeError("an app password for IMAP may send")


def reset(demo: Demo, client: httpx.Client, ask: Ask, app_password: str) -> None:
    ask("PATCH", f"/v1/users/{ALICE}", {"contact_address": BOB})
    made = client.post("/v1/principals", json={"role": "limited", "name": "Help desk"})
    made.raise_for_status()
    helper = httpx.BasicAuth(made.json()["id"], made.json()["secret"])
    expect(client.get(f"/v1/users/{ALICE}", auth=helper).status_code == 403, "the help desk reads accounts")
    imap, smtp = demo.mail.imap(ALICE, PASSWORD), demo.mail.submission(ALICE, PASSWORD)
    asked = {"user": ALICE, "reason": "Called us, the laptop is gone", "deliver": "mail"}
    answer = client.post("/v1/password-resets", json=asked, auth=helper)
    answer.raise_for_status()
    demo.line(f"reset: the help desk may do only this; a link goes to {answer.json()['contact_address']}")
    token = re.findall(rf"{re.escape(demo.url)}/reset#(\S+)", letter_to_bob(demo, "/reset#"))[0]
    demo.line("           it was mailed, and read in that mailbox")
    body = {"token": token, "password": NEW_PASSWORD, "revoke": ["app_passwords"]}
    ended = client.post("/v1/password-resets/confirm", json=body, auth=None)
    ended.raise_for_status()
    expect(ended.json()["ready"], f"access was not ended: {ended.text}")
    demo.line(f"confirmed: {ended.json()['proofs']['sessions']['detail']}")
    expect(closed(imap), "the IMAP session goes on")
    code, words = smtp.mail(ALICE)
    smtp.close()
    expect(code == 421, f"the SMTP session goes on: {code}")
    print(f"            the open SMTP session: {code} {words.decode()}")
    expect(refused(demo, PASSWORD), "the old password works")
    expect(refused(demo, app_password), "the app password works")
    expect(not refused(demo, NEW_PASSWORD), "the new password does not work")
    demo.line("           the old password and the app password are refused, the new one opens it")
    expect(client.post("/v1/password-resets/confirm", json=body, auth=None).status_code == 410, "the link works twice")


def lock(demo: Demo, ask: Ask) -> None:
    locked = ask("POST", f"/v1/users/{ALICE}/lock", {"reason": "Sends spam"})
    proofs = {name: proof["detail"] for name, proof in locked["proofs"].items() if name in ("sessions", "queue")}
    demo.line(f"locked: {'; '.join(proofs.values())}")
    ask("POST", f"/v1/users/{ALICE}/unlock")
    expect(not refused(demo, NEW_PASSWORD), "the login is refused after it was unlocked")
    demo.line("unlocked: the login works again")


def audit(demo: Demo, client: httpx.Client) -> None:
    expect(wait_until(lambda: "0 events wait" in verify(demo)[1]), f"events are not chained: {verify(demo)[1]}")
    code, words = verify(demo)
    expect(code == 0, words)
    demo.line(f"audit: {words.splitlines()[0].partition(';')[0]}, as they were written")
    accepted = {"action": "users.reset-password", "outcome": "accepted"}
    [event] = client.get("/v1/audit-events", params=accepted).json()["items"]
    demo.mariadb.sql(f"UPDATE audit_events SET client_address = '192.0.2.1' WHERE id = {event['id']}", "owner")
    code, words = verify(demo)
    expect(code == 1, "nobody notices that an event was changed")
    demo.line(f"           somebody with the database's own rights changes one: {words.splitlines()[0]}")


def verify(demo: Demo) -> tuple[int, str]:
    command = [sys.executable, "-m", "app.cli.main", "audit", "verify"]
    environment = {**os.environ, "DATABASE_URL": demo.mariadb.url("api")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def letter_to_bob(demo: Demo, holding: str) -> str:
    """The text of the first message that holds this, once it is there."""
    found: list[str] = []

    def arrived() -> bool:
        imap = demo.mail.imap(BOB, PASSWORD)
        imap.select("INBOX", readonly=True)
        for number in imap.search(None, "ALL")[1][0].split():
            part: Any = imap.fetch(number, "(RFC822)")[1]
            message: EmailMessage = email.message_from_bytes(part[0][1], policy=default)
            body = message.get_body(("plain",))
            text = "" if body is None else body.get_content()
            found.extend([text] if holding in text else [])
        imap.logout()
        return bool(found)

    expect(wait_until(arrived), "the mail did not arrive")
    return found[0]
