"""`make run`'s command: what it prints works when it is pasted, and Ctrl-C leaves nothing behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stack.mariadb import OWNER, MariaDB
from tests.stack.processes import free_ports

ROOT = Path(__file__).parents[2]


@contextmanager
def running(at: Path, port: int, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The process, and the file to which it prints."""
    printed = at / "printed.txt"
    with printed.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli.main", "run"],
            cwd=at,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "HOME": str(at),
                "PORT": str(port),
                **environment,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        deadline = time.monotonic() + 40
        while "Ctrl-C stops everything" not in printed.read_text():
            assert process.poll() is None, printed.read_text()
            assert time.monotonic() < deadline, printed.read_text()
            time.sleep(0.02)
        yield process, printed
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0


def paste(at: Path, lines: list[str]) -> list[str]:
    """What each line printed, all typed into one shell."""
    script = "\n".join(f"{line}; echo; echo ----" for line in lines)
    done = subprocess.run(["bash", "-c", script], cwd=at, capture_output=True, text=True, timeout=60, check=True)
    return [part.strip() for part in done.stdout.split("----")]


def children_of(at: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and (entry / "cwd").resolve() == at
                and b"app.cli.main" in (entry / "cmdline").read_bytes()
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_the_three_lines_work_and_a_second_run_keeps_the_data(scratch: Path) -> None:
    [port] = free_ports(1)
    with running(scratch, port) as (process, printed):
        text = printed.read_text()
        lines = re.findall(r"^  (\. var/.*|curl .*)$", text, re.MULTILINE)
        assert len(lines) == 3
        secret_file = scratch / "var/first-administrator.env"
        assert secret_file.stat().st_mode & 0o777 == 0o600
        assert secret_file.read_text().splitlines() == re.findall(r"^  (CLIENT_\w+=\S+)$", text, re.MULTILINE)
        assert f"http://127.0.0.1:{port}/docs" in text
        _, created, shown, _ = paste(scratch, lines)
        assert json.loads(created)["ready"] is True, created
        assert json.loads(shown) == json.loads(created)
        maildir = re.search(r"Maildir then lies in (\S+)\.", text)
        assert maildir is not None
        assert (scratch / maildir.group(1) / "new").is_dir()
        assert {path.stat().st_mode & 0o077 for path in (scratch / "var").glob("cacert-mail.db*")} == {0}
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) == 0
        stop(process)
        assert children_of(scratch) == []
    with running(scratch, port) as (process, printed):
        assert "CLIENT_SECRET=" not in printed.read_text(), "a secret is shown once"
        _, again, _ = paste(scratch, [lines[0], lines[2]])
        assert json.loads(again)["id"] == json.loads(created)["id"]
        assert json.loads(again)["ready"] is True
        stop(process)


def test_the_same_on_mariadb(scratch: Path, mariadb: MariaDB) -> None:
    mariadb.sql(f"DROP DATABASE IF EXISTS trial; CREATE DATABASE trial; GRANT ALL ON trial.* TO {OWNER}@'%'")
    [port] = free_ports(1)
    try:
        url = mariadb.url(OWNER).rpartition("/")[0] + "/trial"
        with running(scratch, port, DATABASE_URL=url) as (process, printed):
            lines = re.findall(r"^  (\. var/.*|curl .*)$", printed.read_text(), re.MULTILINE)
            _, created, _, _ = paste(scratch, lines)
            assert json.loads(created)["ready"] is True, created
            stop(process)
        assert not list((scratch / "var").glob("*.db"))
        assert not (scratch / "var/host").exists(), (
            "another database numbers its accounts anew: their homes are elsewhere"
        )
        assert mariadb.sql("SELECT address FROM trial.users") == [["alice@cacert.org"]]
    finally:
        mariadb.sql("DROP DATABASE trial")


def test_mail_lands_in_the_outbox_and_its_link_is_printed_here_alone(scratch: Path) -> None:
    [port] = free_ports(1)
    with running(scratch, port, LOG_LEVEL="debug") as (process, printed):
        [line] = re.findall(r"^  (\. var/.*)$", printed.read_text(), re.MULTILINE)
        curl = f"curl -s -u $CLIENT_ID:$CLIENT_SECRET -H 'Content-Type: application/json' http://127.0.0.1:{port}/v1"
        body = {"address": "carol@cacert.org", "contact_address": "carol@example.net", "invite": True}
        _, made, _ = paste(scratch, [line, f"{curl}/users -H 'Prefer: wait=10' -d '{json.dumps(body)}'"])
        assert json.loads(made)["has_password"] is False, made
        deadline = time.monotonic() + 15
        while not (
            found := re.findall(r"^  (http://127\.0\.0\.1:\d+/reset)#(\S+)$", printed.read_text(), re.MULTILINE)
        ):
            assert time.monotonic() < deadline, printed.read_text()
            time.sleep(0.05)
        [(page, token)] = found
        assert page == f"http://127.0.0.1:{port}/reset"
        [file] = (scratch / "var/outbox").iterdir()
        assert (file.name, file.stat().st_mode & 0o777) == ("1.eml", 0o600)
        assert (
            f"Mail to carol@example.net: Your new mailbox carol@cacert.org ({file.relative_to(scratch)})"
            in printed.read_text()
        )
        assert printed.read_text().count(token) == 1
        body = {"token": token, "password": "seven green lanterns over the harbour"}
        _, confirmed, _ = paste(
            scratch, [line, f"{curl}/password-resets/confirm -H 'Prefer: wait=10' -d '{json.dumps(body)}'"]
        )
        assert json.loads(confirmed)["ready"] is True, confirmed
        stop(process)
    with running(scratch, port) as (process, printed):
        while len(list((scratch / "var/outbox").iterdir())) < 2:  # the notice that the password was changed
            time.sleep(0.05)
        assert token not in printed.read_text(), "what was printed by an earlier run is not printed again"
        stop(process)


def test_a_taken_port_is_named(scratch: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "app.cli.main", "run"],
            cwd=scratch,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in done.stderr
    assert children_of(scratch) == []


def test_nothing_is_left_when_it_is_killed(scratch: Path) -> None:
    [port] = free_ports(1)
    with running(scratch, port) as (process, _):
        assert len(children_of(scratch)) == 4
        process.kill()
        process.wait()
        deadline = time.monotonic() + 15
        while children_of(scratch):
            assert time.monotonic() < deadline
            time.sleep(0.05)
