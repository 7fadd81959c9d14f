"""`make demo`: one account's life, told line by line, with everything real. Root.

A private MariaDB, Postfix and Dovecot, and our three processes as on a mail host, each under its own database user.
Nothing outside two new directories in /dev/shm is touched, and nothing is left. It stays up until Ctrl-C; ONCE=1 ends it.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from demo.access import access
from demo.site import ALICE, BOB, NEW_PASSWORD, PASSWORD, SUCCESSOR_PASSWORD, Ask, Demo, closed, expect, refused
from tests.stack import missing_packages
from tests.stack.mail import PRIMARY_DOMAIN
from tests.stack.processes import wait_until
from tests.stack.traffic import traffic

POSTMASTER, PR = f"postmaster@{PRIMARY_DOMAIN}", f"pr@{PRIMARY_DOMAIN}"


def tell(demo: Demo) -> None:
    """The story. Each line is checked; the first that is not true ends it with an error."""
    with httpx.Client(
        base_url=demo.url, auth=demo.credentials, headers={"Prefer": "wait=20"}, timeout=30, trust_env=False
    ) as client:

        def ask(method: str, path: str, body: dict[str, Any] | None = None, *, wait: bool = True) -> dict[str, Any]:
            answer = client.request(method, path, json=body, headers={} if wait else {"Prefer": "wait=0"})
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            expect(found["ready"] or not wait, f"{method} {path}: not ready: {found}")
            return found

        demo.line("MariaDB, Postfix, Dovecot, rspamd, API, worker, service and policy are up")
        new = {"address": ALICE, "display_name": "Alice", "password": PASSWORD}
        first = ask("POST", "/v1/users", new, wait=False)
        demo.line(f"created: {ALICE} is account {first['id']}, version {first['version']}")
        first = ask("GET", f"/v1/users/{ALICE}")
        demo.line(f"ready: uid {first['uid']}, home {first['home']}")
        for name, proof in first["proofs"].items():
            print(f"            {name}: {proof['result']}, {proof['detail']}")
        home = Path(first["home"])
        expect(demo.mail.send(ALICE, "Welcome", "Hello Alice.\n") == 250, "the message was not taken")
        demo.line("sent: a message by SMTP, taken with 250")
        expect(subjects(demo, PASSWORD, 1) == ["Welcome"], "the message is not there")
        demo.line("read: the message over IMAPS")
        aliases_and_senders(demo, ask, home)
        access(demo, client, ask)
        signatures(demo, client)
        session = demo.mail.imap(ALICE, NEW_PASSWORD)
        ask("PATCH", f"/v1/users/{ALICE}", {"state": "suspended", "suspended_reason": "Lost the phone"})
        expect(closed(session), "the open session goes on")
        expect(refused(demo, NEW_PASSWORD), "the login still works")
        demo.line("suspended: the open session is gone, the login refused")
        expect(demo.mail.send(ALICE, "While away", "Hello again.\n") == 250, "mail is not taken")
        demo.mail.wait_for_mail(home, 3)
        demo.line("           mail still arrives")
        ask("PATCH", f"/v1/users/{ALICE}", {"state": "active"})
        expect(not refused(demo, NEW_PASSWORD), "the login is still refused")
        demo.line("resumed: the login works again")
        ask("DELETE", f"/v1/users/{ALICE}")
        expect(demo.mail.send(ALICE, "Too late", "Hello?\n") == 550, "mail is still taken")
        demo.line("deleted: mail is refused with 550, the mailbox is archived")
        ask("POST", f"/v1/users/{first['id']}/restore")
        expect(subjects(demo, NEW_PASSWORD, 3) == ["Welcome", "Help", "While away"], "the old mail is not there")
        demo.line("restored: the old mail is there")
        ask("DELETE", f"/v1/users/{ALICE}")
        other = {**new, "display_name": "Another Alice", "password": SUCCESSOR_PASSWORD, "reuse_address": True}
        second = ask("POST", "/v1/users", other)
        expect(second["uid"] != first["uid"], "the uid was given out twice")
        expect(subjects(demo, SUCCESSOR_PASSWORD, 0) == [], "the predecessor's mail is there")
        expect(refused(demo, NEW_PASSWORD), "the predecessor's password works")
        demo.line(f"taken by someone else: an empty box, uid {second['uid']}, the old password refused")


def aliases_and_senders(demo: Demo, ask: Ask, home: Path) -> None:
    bob = Path(ask("POST", "/v1/users", {"address": BOB, "password": PASSWORD})["home"])
    ask("POST", "/v1/aliases", {"address": POSTMASTER, "kind": "receive_only", "destinations": [ALICE]})
    expect(demo.mail.send(POSTMASTER, "Help", "Nothing works.\n") == 250, "the alias does not receive")
    demo.mail.wait_for_mail(home, 2)
    demo.line(f"alias: {POSTMASTER} leads to alice, and nobody sends as it")
    ask("POST", "/v1/aliases", {"address": PR, "kind": "send_as", "destinations": [BOB], "designated": [ALICE]})
    expect(demo.mail.send(PR, "Interview?", "Please.\n") == 250, "the alias does not receive")
    demo.mail.wait_for_mail(bob, 1)
    demo.line(f"alias: {PR} leads to bob, and alice is designated to send as it")
    expect(submitted(demo, ALICE, PR, PR)[0] == 250, "the designated cannot send")
    demo.mail.wait_for_mail(bob, 2)
    demo.line("sender: alice sends as pr, taken with 250")
    code, words = submitted(demo, BOB, PR, PR)
    expect(code == 553, f"bob can send as pr: {code} {words}")
    demo.line("sender: bob only receives its mail, and is refused with 553")
    code, words = submitted(demo, ALICE, ALICE, BOB)
    expect(500 <= code < 600, f"a forged From is taken: {code} {words}")
    demo.line(f"forged: alice with bob in From is refused with {code}")
    print(f"            {words}")


def signatures(demo: Demo, client: httpx.Client) -> None:
    """Two keys, the second of them while mail goes out."""
    client.patch(f"/v1/domains/{PRIMARY_DOMAIN}", json={"settings": {"publisher": "main"}}).raise_for_status()
    keys = f"/v1/domains/{PRIMARY_DOMAIN}/dkim-keys"

    def rotated() -> list[str]:
        """Until the new key is proved; all states."""
        began = client.post(f"{keys}/rotate")
        began.raise_for_status()

        def is_proved() -> bool:
            [new, *_] = sorted(client.get(keys).json()["items"], key=lambda key: key["id"], reverse=True)
            return bool(new["proved_at"])

        expect(wait_until(is_proved, seconds=20), f"the key does not sign: {client.get(keys).text}")
        return [key["state"] for key in client.get(keys).json()["items"]]

    expect(rotated() == ["active"], "there are other keys")
    demo.line(
        "DKIM: a key was made on the host, its record is at the name server, mail is signed, a probe has verified"
    )
    with traffic(demo.mail, demo.elsewhere, demo.names, (ALICE, NEW_PASSWORD)) as mail:
        expect(sorted(rotated()) == ["active", "retiring"], "the old key did not retire")
    demo.line("rotated: the new key signs and is proved, the old one retires")
    expect(len(mail.judged) > 10 and not mail.wrong, f"unsigned or not verified: {mail.wrong}")
    print("            each message that alice sent meanwhile was signed, and verified when it arrived elsewhere")


def submitted(demo: Demo, login: str, envelope: str, header: str) -> tuple[int, str]:
    """Hands over a message to bob on port 587: the first refusal, or 250."""
    with demo.mail.submission(login, PASSWORD) as client:
        for code, words in (client.mail(envelope), client.rcpt(BOB)):
            if code != 250:
                return code, words.decode()
        code, words = client.data(f"From: <{header}>\r\nTo: <{BOB}>\r\nSubject: demo\r\n\r\ntext\r\n".encode())
        return code, words.decode()


def subjects(demo: Demo, password: str, count: int) -> list[str]:
    imap = demo.mail.imap(ALICE, password)
    try:
        deadline = time.monotonic() + 10
        while int((imap.select("INBOX")[1][0] or b"0").decode()) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        found = []
        for number in imap.search(None, "ALL")[1][0].split():
            part: Any = imap.fetch(number, "(BODY[HEADER.FIELDS (SUBJECT)])")[1]
            found.append(part[0][1].decode().partition(":")[2].strip())
        return found
    finally:
        imap.logout()


def stay(demo: Demo) -> None:
    ports = demo.mail.settings
    client_id, secret = demo.credentials
    print(
        f"\nIt stays up until Ctrl-C.\n"
        f"  API      {demo.url}/docs   client id {client_id}, secret {secret}\n"
        f"  SMTP     127.0.0.1:{ports.smtp_port}   submission 127.0.0.1:{ports.submission_port} and {ports.submissions_port}\n"
        f"  IMAPS    127.0.0.1:{ports.imaps_port}   POP3S 127.0.0.1:{ports.pop3s_port}   (CA: {demo.mail.ca_file})\n"
        f"  login    {ALICE}, password: {SUCCESSOR_PASSWORD}\n"
        f"  homes    {demo.mail.homes}",
        flush=True,
    )
    signal.pause()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    if missing := missing_packages():
        print(f"The demo needs these Debian packages: {' '.join(missing)}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    demo = Demo()
    try:
        demo.start()
        tell(demo)
        if os.environ.get("ONCE") != "1":
            stay(demo)
    except KeyboardInterrupt:
        pass
    except (RuntimeError, httpx.HTTPError) as error:
        print(f"That went wrong: {error}", file=sys.stderr)
        return 1
    finally:
        demo.close()
    print("Everything was stopped and removed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
