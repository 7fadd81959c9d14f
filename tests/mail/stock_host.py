"""A mail host with Debian's own paths and ports, from an empty /etc to mail: run by `test_stock_paths.py` in namespaces.

Nothing that it writes, mounts or starts is left when it ends, and nothing of it can be seen outside. It prints what
happened, as JSON.
"""

import imaplib
import json
import os
import poplib
import shutil
import smtplib
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.stack.certificates import make_certificates

ROOT = Path(__file__).parents[2]
PASSWORD = "four words for a test"
given = json.load(sys.stdin)
SOCKET = given["socket"]
found: dict[str, Any] = {}


def run(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options)


def must(*argv: str, **options: Any) -> str:
    done = run(*argv, **options)
    if done.returncode:
        raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def url(user: str) -> str:
    return f"mysql+asyncmy://{user}:{given['passwords'][user]}@localhost/cacertusers?unix_socket={SOCKET}"


def environment(user: str) -> dict[str, str]:
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": url(user),
        "MAIL_HOST": "mail",
        "HOST_FILE": "/etc/cacert-mail/host.toml",
        "POSTFIX_CONFIG": "/etc/postfix",
        "DOVECOT_CONFIG": "/etc/dovecot/dovecot.conf",
        "WAKE_DIRECTORY": "/run/cacert-mail",
        "LOG_LEVEL": "warning",
        "KEY_DIRECTORY": "/etc/cacert-mail/keys",
        "LINK_KEY_FILE": "/etc/cacert-mail/keys/link.key",
    }


def ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "app.cli.main", *arguments]


def start(name: str, argv: list[str], **options: Any) -> None:
    with Path(f"/var/log/{name}.out").open("ab") as output:
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **options
        )


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "".join(path.read_text(errors="replace")[-2000:] for path in Path("/var/log").glob("*.out"))
            raise TimeoutError(f"{what}\n{logs}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def ask(method: str, path: str, body: Any = None) -> dict[str, Any]:
    credentials = b64encode(":".join(given["credentials"]).encode()).decode()
    headers = {"Authorization": f"Basic {credentials}", "Prefer": "wait=20", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:8825{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=40) as answer:  # noqa: S310  our own API
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def prepare() -> None:
    """An empty host: what Debian's packages make, and no configuration of ours."""
    must("ip", "link", "set", "lo", "up")
    must("mount", "--make-rprivate", "/")
    # The checkout and Python may lie below what is covered now, so they are laid over it again.
    needed = {str(path): os.open(path, os.O_PATH) for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix))}
    for path in ("/home", "/var/spool/postfix", "/var/log", "/run", "/tmp"):
        must("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", path)
    for lower in ("/etc", "/var/lib"):
        upper, work = (Path(f"/tmp{lower}/{name}") for name in ("upper", "work"))
        upper.mkdir(parents=True)
        work.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        must("mount", "-t", "overlay", "-o", options, "overlay", lower)
    for path, fd in needed.items():
        if not Path(path).exists():
            Path(path).mkdir(parents=True)
            must("mount", "--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{fd}", path)
    shutil.rmtree("/var/lib/postfix")
    for path in ("/var/lib/postfix", "/var/lib/cacert-mail"):
        Path(path).mkdir()
    shutil.chown("/var/lib/postfix", "postfix")
    for path, owner in (
        ("/run/rspamd", "_rspamd"),
        ("/var/log/rspamd", "_rspamd"),
        ("/var/lib/cacert-mail/returns", None),
    ):
        Path(path).mkdir()
        if owner:
            shutil.chown(path, owner, owner)
    os.chown("/var/lib/cacert-mail/returns", 990, 990)
    for path in ("/etc/cacert-mail", "/run/cacert-mail"):
        Path(path).mkdir(mode=0o755)


def write_host_file() -> None:
    make_certificates(Path("/etc/cacert-mail"), names=["mail.cacert.test", "localhost"])
    values = {
        "host": "mail",
        "hostname": "mail.cacert.test",
        "tls_certificate": "/etc/cacert-mail/cert.pem",
        "tls_key": "/etc/cacert-mail/key.pem",
        "database_socket": SOCKET,
        "postfix_password": given["passwords"]["postfix"],
        "dovecot_password": given["passwords"]["dovecot"],
        "mail_log": "/var/log/mail.log",
        "dovecot_log": "/var/log/dovecot.log",
    }
    path = Path("/etc/cacert-mail/host.toml")
    path.touch(mode=0o600)
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
    path.write_text("".join(lines) + "dns = false\nreturns_uid = 990\n")


def serve() -> None:
    first = run(*ours("mailhost", "install"), env=environment("worker"))
    found["first install"] = (first.returncode, first.stdout, first.stderr)
    start("worker", ours("worker"), env=environment("worker"))
    until(Path("/etc/cacert-mail/aliases/aliases.lmdb").exists, "the worker makes the alias file")
    start("policy", ours("policy"), env=environment("policy"))
    start("rspamd", ["/usr/bin/rspamd", "-f", "-u", "_rspamd", "-g", "_rspamd", "-c", "/etc/rspamd/rspamd.conf"])
    start("dovecot", ["/usr/sbin/dovecot", "-F"])
    must("postfix", "start")
    must(*ours("keys", "create"), env=environment("api"))
    start("api", ours("api"), env=environment("api"))
    for port in (25, 465, 587, 143, 993, 995, 8825, 10031, 10032):
        until(lambda port=port: listens(port), f"somebody listens on {port}")  # type: ignore[misc]  # a default argument
    until(Path("/run/rspamd/milter.sock").exists, "rspamd listens")
    second = run(*ours("mailhost", "install"), env=environment("worker"))
    found["second install"] = (second.returncode, second.stdout, second.stderr)
    check = run(*ours("mailhost", "check"), env=environment("worker"))
    found["check"] = (check.returncode, check.stdout, check.stderr)


def messages(home: str) -> int:
    return len([*Path(home).glob("Maildir/new/*"), *Path(home).glob("Maildir/cur/*")])


def letter(sender: str, to: str) -> bytes:
    return f"From: {sender}\r\nTo: {to}\r\nSubject: hello\r\n\r\ntext\r\n".encode()


def use() -> None:
    for name in ("alice", "bob"):
        user = ask("POST", "/v1/users", {"address": f"{name}@cacert.test", "password": PASSWORD})
        found[name] = {key: user.get(key) for key in ("ready", "home", "uid", "proofs", "detail")}
    for body in (
        {"address": "postmaster@cacert.test", "kind": "receive_only", "destinations": ["alice@cacert.test"]},
        {
            "address": "pr@cacert.test",
            "kind": "send_as",
            "destinations": ["bob@cacert.test"],
            "designated": ["alice@cacert.test"],
        },
    ):
        alias = ask("POST", "/v1/aliases", body)
        found[body["address"]] = {key: alias.get(key) for key in ("ready", "proofs", "detail")}  # type: ignore[index]
    for to in ("alice", "postmaster", "pr", "nobody-here"):
        with smtplib.SMTP("127.0.0.1", 25, "client.test") as client:
            client.ehlo()
            client.mail("s@example.net")
            code, _ = client.rcpt(f"{to}@cacert.test")
            found[f"to {to}"] = code if code != 250 else client.data(letter("s@example.net", to))[0]
    until(lambda: messages("/home/alice") == 2 and messages("/home/bob") == 1, "mail arrives")
    tls = ssl.create_default_context(cafile="/etc/cacert-mail/ca.pem")
    with imaplib.IMAP4_SSL("localhost", 993, ssl_context=tls) as imap:
        imap.login("alice@cacert.test", PASSWORD)
        found["imaps"] = imap.select()[1][0].decode()  # type: ignore[union-attr]
    with imaplib.IMAP4("localhost", 143) as imap:
        imap.starttls(tls)
        imap.login("alice", PASSWORD)
        found["imap"] = imap.select()[1][0].decode()  # type: ignore[union-attr]
    pop = poplib.POP3_SSL("localhost", 995, context=tls)
    pop.user("bob@cacert.test")
    pop.pass_(PASSWORD)
    found["pop3s"] = pop.stat()[0]
    pop.quit()
    for port, kind in ((587, smtplib.SMTP), (465, smtplib.SMTP_SSL)):
        options = {"context": tls} if kind is smtplib.SMTP_SSL else {}
        with kind("localhost", port, "client.test", **options) as client:  # type: ignore[operator]
            if port == 587:
                client.starttls(context=tls)
            client.login("alice@cacert.test", PASSWORD)
            for envelope, sender in (
                ("alice@cacert.test", "alice@cacert.test"),
                ("pr@cacert.test", "PR <pr@cacert.test>"),
                ("bob@cacert.test", "bob@cacert.test"),
                ("alice@cacert.test", "bob@cacert.test"),
            ):
                client.rset()
                code, _ = client.mail(envelope)
                if code == 250:
                    code, _ = client.rcpt("bob@cacert.test")
                if code == 250:
                    code, _ = client.data(letter(sender, "bob@cacert.test"))
                found[f"{port} {envelope} {sender}"] = code
    until(lambda: messages("/home/bob") == 5, "what was sent arrives")


try:
    prepare()
    write_host_file()
    serve()
    use()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
    found["logs"] = {
        str(path): path.read_text(errors="replace")[-1500:]
        for path in (*Path("/var/log").glob("*.*"), *Path("/var/log/rspamd").glob("*"))
        if path.is_file()
    }
json.dump(found, sys.stdout)
