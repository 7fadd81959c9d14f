"""The configuration as code, on a running mail host: compared, checked, installed, proved; by hand and by `mailhost.sync`."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy import select

from app.config import WorkerSettings
from app.db import Database, utc_now
from app.errors import SrsNeeded
from app.models.domains import DomainKind
from app.models.jobs import applied
from app.queue.contracts import MAILHOST_SYNC, THE_HOST
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import change_host, create_host
from app.workers.host import mailhost
from app.workers.host.handlers.mailhost import sync_mailhost
from app.workers.host.handlers.users import GiveUp, Host, TryAgain
from app.workers.host.loop import Worker, opened
from app.workers.host.sweep import sweep
from tests.conftest import ACTOR
from tests.stack.accounts import NOW
from tests.stack.certificates import make_certificates
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack, write_host_file
from tests.stack.mariadb import MariaDB
from tests.stack.processes import run
from tests.workers.host.machine import environment

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def stack(mariadb: MariaDB) -> Iterator[MailStack]:
    """One of our own: what is changed here is the configuration itself."""
    stack = MailStack()
    stack.start(mariadb)
    yield stack
    stack.close()


@pytest.fixture
def settings(stack: MailStack, mariadb: MariaDB) -> WorkerSettings:
    return WorkerSettings(
        database_url=SecretStr(mariadb.url("worker")),
        mail_host=HOST,
        host_root=stack.host_root,
        lock_file=stack.directory / "worker.lock",
        wake_directory=stack.directory,
        postfix_config=stack.postfix_config,
        postfix_recipients=stack.recipients_map,
        postfix_local_aliases=stack.local_aliases_map,
        postfix_virtual_aliases=stack.virtual_aliases_map,
        aliases_directory=stack.aliases,
        dovecot_config=stack.dovecot_config,
        host_file=write_host_file(stack),
    )


@pytest_asyncio.fixture
async def api(mariadb: MariaDB, stack: MailStack) -> AsyncIterator[Database]:
    """The host in the database, with the ports that the stack has."""
    mariadb.empty()
    database = Database(mariadb.url("api"))
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
        await create_host(change, HOST)
    await patch(database, **stack.settings.model_dump(mode="json"))
    yield database
    await database.close()


async def patch(api: Database, **settings: Any) -> None:
    async with api.write.begin() as connection:
        await change_host(Change(connection, ACTOR, utc_now()), HOST, {"settings": settings})


@pytest_asyncio.fixture
async def host(settings: WorkerSettings, api: Database) -> AsyncIterator[Host]:
    async with opened(settings) as host:
        for _ in range(3):
            with suppress(TryAgain):  # Postfix waits for seconds while a file is new; the worker tries again too.
                await sync_mailhost(host, THE_HOST)
                break
        yield host


def command(settings: WorkerSettings, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    given = environment(settings, HOST_FILE=str(settings.host_file), LOG_LEVEL="error")
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", "mailhost", *arguments],
        env=given,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def size_limit(stack: MailStack) -> int:
    with stack.smtp() as client:
        return int(client.esmtp_features["size"])


def certificate(port: int) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain) as secured:
        shown = secured.getpeercert(True)
        assert shown
        return shown


async def test_differences_are_said_in_words_and_mended(host: Host, settings: WorkerSettings, stack: MailStack) -> None:
    clean = await asyncio.to_thread(command, settings, "check")
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "Every file is as it should be.\n", "")
    main, master, recipients = (stack.postfix_config / name for name in ("main.cf", "master.cf", "recipients.cf"))
    right = main.read_text()
    main.write_text(right.replace("smtpd_helo_required = yes", "smtpd_helo_required = no"))
    master.unlink()
    recipients.write_text(recipients.read_text() + "# mine\n")
    stack.dovecot_config.chmod(0o666)
    local = stack.dovecot_config.with_name("local.conf")
    kept_local = local.read_text()
    local.write_text(f"{kept_local}# mine\n")  # without its anvil a reload crashes Dovecot 2.3.19
    dirty = await asyncio.to_thread(command, settings, "check")
    assert (dirty.returncode, dirty.stderr) == (1, "")
    assert dirty.stdout.splitlines() == [
        f"{main} has 'smtpd_helo_required = no', lacks 'smtpd_helo_required = yes'",
        f"{master} is missing",
        f"{recipients} differs",
        f"{stack.dovecot_config} is 0666 root:root, not 0644 root:root",
    ]
    done = await asyncio.to_thread(command, settings, "install")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{main} was written." in done.stdout
    assert local.read_text() == f"{kept_local}# mine\n", "the administrator's own"
    local.write_text(kept_local)
    assert main.read_text() == right
    assert (await asyncio.to_thread(command, settings, "check")).returncode == 0
    kept = max((stack.file.state_dir / "before").iterdir())
    assert "smtpd_helo_required = no" in (kept / str(main)[1:]).read_text()
    assert "# mine" in (kept / str(recipients)[1:]).read_text()
    assert {path.stat().st_mode & 0o077 for path in kept.rglob("*")} == {0}


async def test_no_secret_is_said(host: Host, settings: WorkerSettings, stack: MailStack) -> None:
    for path in (stack.postfix_config / "senders.cf", stack.dovecot_config.with_name("dovecot-sql.conf.ext")):
        path.write_text(f"password = hunter2hunter2\n{path.read_text()}")
    said = ""
    for arguments in (["check"], ["install"], ["check"]):
        done = await asyncio.to_thread(command, settings, *arguments)
        said += done.stdout + done.stderr
    assert "hunter2hunter2" not in said
    for secret in (stack.file.postfix_password, stack.file.dovecot_password):
        assert secret.get_secret_value() not in said


async def test_rendered_into_a_directory(settings: WorkerSettings, api: Database, stack: MailStack) -> None:
    out = stack.directory / "out"
    done = await asyncio.to_thread(command, settings, "render", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    inner = out / str(stack.postfix_config)[1:]
    assert "mydomain = cacert.test" in (inner / "main.cf").read_text()
    assert (inner / "recipients.cf").stat().st_mode & 0o777 == 0o640


async def test_a_changed_setting_reaches_the_programs(host: Host, api: Database, stack: MailStack) -> None:
    assert size_limit(stack) == stack.settings.message_size_limit
    await patch(api, message_size_limit=1_000_000, pop3_enabled=False)
    outcome = await sync_mailhost(host, THE_HOST)
    assert (outcome.stands, {proof["result"] for proof in outcome.proofs.values()}) == (True, {"ok"})
    assert set(outcome.proofs) == {"files", "postfix", "dovecot", "certificate"}
    assert size_limit(stack) == 1_000_000
    with pytest.raises(ConnectionRefusedError):
        certificate(stack.settings.pop3s_port)
    before = {path: path.stat().st_mtime_ns for path in stack.postfix_config.iterdir()}
    again = await sync_mailhost(host, THE_HOST)
    assert again.result["changed"] == []
    assert {path: path.stat().st_mtime_ns for path in stack.postfix_config.iterdir()} == before
    await patch(api, message_size_limit=None, pop3_enabled=None)
    await sync_mailhost(host, THE_HOST)
    assert certificate(stack.settings.pop3s_port)


async def test_what_a_checker_refuses_is_not_installed(host: Host, api: Database, stack: MailStack) -> None:
    before = {path: path.read_text() for path in stack.postfix_config.iterdir() if path.is_file()}
    write_host_file(stack, postfix_password=SecretStr("wrong"))
    with pytest.raises(GiveUp, match=r"The query of .*cf fails: .*Access denied") as refused:
        await sync_mailhost(host, THE_HOST)
    assert "wrong" not in str(refused.value)
    assert {path: path.read_text() for path in stack.postfix_config.iterdir() if path.is_file()} == before
    assert not (stack.file.state_dir / "check").exists()
    write_host_file(stack)
    await sync_mailhost(host, THE_HOST)


async def test_cut_off_before_the_programs_were_told(
    host: Host, api: Database, stack: MailStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    await patch(api, message_size_limit=2_000_000)

    async def die(wanted: Any) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mailhost, "reload", die)
        with pytest.raises(KeyboardInterrupt):
            await sync_mailhost(host, THE_HOST)
    assert size_limit(stack) == stack.settings.message_size_limit
    outcome = await sync_mailhost(host, THE_HOST)
    assert outcome.result["changed"] == []
    assert size_limit(stack) == 2_000_000


async def test_a_renewed_certificate_is_shown(host: Host, stack: MailStack) -> None:
    old = certificate(stack.settings.imaps_port)
    make_certificates(stack.directory, names=[stack.file.hostname, "localhost"])
    outcome = await sync_mailhost(host, THE_HOST)
    assert outcome.proofs["certificate"]["result"] == "ok"
    for port in (stack.settings.imaps_port, stack.settings.submissions_port):
        assert certificate(port) != old
    new = certificate(stack.settings.imaps_port)
    good = stack.file.tls_certificate.read_bytes()
    stack.file.tls_certificate.write_bytes(good[: len(good) // 2])
    with pytest.raises(GiveUp, match="are not a PEM certificate and its key"):
        await sync_mailhost(host, THE_HOST)
    assert certificate(stack.settings.imaps_port) == new
    stack.file.tls_certificate.write_bytes(good)
    await sync_mailhost(host, THE_HOST)


async def test_a_program_that_does_not_run_is_said(host: Host, api: Database, stack: MailStack) -> None:
    stack.stop(stack.rspamd)
    await patch(api, message_size_limit=3_000_000)
    with pytest.raises(TryAgain, match="rspamd could not be told"):
        await sync_mailhost(host, THE_HOST)
    stack.start_rspamd()
    await asyncio.to_thread(stack.wait_for_rspamd)
    assert (await sync_mailhost(host, THE_HOST)).stands
    assert size_limit(stack) == 3_000_000


async def test_srs_by_a_setting(host: Host, api: Database, mariadb: MariaDB, stack: MailStack) -> None:
    """Postfix asks postsrsd when that answers as Postfix will ask it, and not before: mail would have to wait."""
    main = stack.postfix_config / "main.cf"
    before = main.read_text()
    await patch(api, srs=True)
    with pytest.raises(GiveUp, match=r"postsrsd does not do SRS: port .* systemd does not run here.*restart postsrsd"):
        await sync_mailhost(host, THE_HOST)
    assert main.read_text() == before
    assert stack.send(f"nobody@{PRIMARY_DOMAIN}") == 550, "an answer, and not 451"
    await asyncio.to_thread(stack.start_postsrsd)
    for _ in range(3):
        with suppress(TryAgain):  # Postfix waits for seconds while a file is new
            outcome = await sync_mailhost(host, THE_HOST)
            break
    assert outcome.proofs["srs"]["result"] == "ok"
    assert "srs_forward" in main.read_text()
    assert stack.send(f"nobody@{PRIMARY_DOMAIN}") == 550
    mariadb.sql(
        "INSERT aliases (id, address, local_part, domain_id, kind, note, version, created_at, updated_at)"
        f" SELECT 1, 'pr@{PRIMARY_DOMAIN}', 'pr', id, 'send_as', '', 1, {NOW}, {NOW} FROM domains;"
        "INSERT alias_destinations (alias_id, position, address) VALUES (1, 0, 'friend@example.net')",
        "owner",
    )
    assert stack.send(f"pr@{PRIMARY_DOMAIN}", sender="s@example.org") == 250
    queue = run(["postqueue", "-c", stack.postfix_config, "-j"])
    assert '"sender": "SRS0=' in queue
    run(["postsuper", "-c", stack.postfix_config, "-d", "ALL"])

    stack.stop(stack.postsrsd)
    with pytest.raises(GiveUp, match="postsrsd does not do SRS"):
        await sync_mailhost(host, THE_HOST)
    await asyncio.to_thread(stack.start_postsrsd)
    assert (await sync_mailhost(host, THE_HOST)).result["changed"] == []
    with pytest.raises(SrsNeeded):
        await patch(api, srs=False)
    mariadb.sql("DELETE FROM alias_destinations", "owner")
    await patch(api, srs=False)
    assert set((await sync_mailhost(host, THE_HOST)).proofs) == {"files", "postfix", "dovecot", "certificate"}
    assert "srs_forward" not in main.read_text()
    stack.stop(stack.postsrsd)


async def test_postsrsd_under_systemd(
    host: Host, api: Database, stack: MailStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its own words say that it does not run."""
    monkeypatch.setattr(mailhost, "_has_systemd", lambda: True)
    await patch(api, srs=True)
    with pytest.raises(GiveUp, match=r"systemctl restart postsrsd says: \S.*apt-get install postsrsd"):
        await sync_mailhost(host, THE_HOST)
    await patch(api, srs=None)
    await sync_mailhost(host, THE_HOST)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([b"500 no\n"], "answers 500 no"),
        ([b""], "answers nothing"),
        ([b"200 sender@elsewhere.invalid\n"], "makes sender@elsewhere.invalid of sender@elsewhere.invalid"),
        ([b"200 SRS0=a=b=elsewhere.invalid=sender@other.test\n"], "makes SRS0"),
        ([b"200 SRS0=a=b=elsewhere.invalid=sender@cacert.test\n", b"500 Hash\n"], "answers 500 Hash"),
        (
            [b"200 SRS0=a=b=elsewhere.invalid=sender@cacert.test\n", b"200 x@example.net\n"],
            "makes x@example.net of SRS0",
        ),
        ([b"200 SRS0=a=b=elsewhere.invalid=sender@cacert.test\n", b"200 sender@elsewhere.invalid\n"], ""),
    ],
)
async def test_what_is_no_srs(stack: MailStack, answers: list[bytes], says: str) -> None:
    """Somebody else on the ports, or a postsrsd with other settings."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(answers[len(asked) - 1])
        writer.close()
        await writer.wait_closed()

    settings = stack.settings
    async with (
        await asyncio.start_server(serve, "127.0.0.1", settings.srs_forward_port),
        await asyncio.start_server(serve, "127.0.0.1", settings.srs_reverse_port),
    ):
        wanted = mailhost.Wanted(1, settings, stack.file, PRIMARY_DOMAIN)
        proof = await mailhost.prove_srs(wanted)
    assert proof["result"] == ("failed" if says else "ok")
    assert says in proof["detail"]
    assert asked[0] == b"get sender@elsewhere.invalid\n"


async def test_hostile_settings(host: Host, api: Database, mariadb: MariaDB, stack: MailStack) -> None:
    before = (stack.postfix_config / "main.cf").read_text()
    for settings in ('{"smtp_port": "25 mynetworks"}', '{"homes": "/etc"}', "[]", '{"smtp_port": 0}'):
        mariadb.sql(f"UPDATE hosts SET settings = '{settings}'", "owner")
        with pytest.raises(GiveUp, match="cannot be"):
            await sync_mailhost(host, THE_HOST)
    assert (stack.postfix_config / "main.cf").read_text() == before


@pytest.mark.parametrize("harm", ["mode", "owner", "toml", "key", "other host", "missing", "unset"])
async def test_a_host_file_that_cannot_be_used(
    settings: WorkerSettings, api: Database, stack: MailStack, harm: str
) -> None:
    path = write_host_file(stack)
    if harm == "mode":
        path.chmod(0o644)
    elif harm == "owner":
        os.chown(path, 4711, 4711)
    elif harm == "toml":
        path.write_text(path.read_text() + "= what\n")
    elif harm == "key":
        path.write_text(path.read_text() + "colour = 'hunter2hunter2'\n")
    elif harm == "other host":
        write_host_file(stack, host="elsewhere")
    elif harm == "missing":
        path.unlink()
    elif harm == "unset":
        settings = settings.model_copy(update={"host_file": None})
        async with opened(settings) as host:
            outcome = await sync_mailhost(host, THE_HOST)
        assert outcome.proofs == {"files": {"result": "not configured", "detail": None}}
        return
    done = await asyncio.to_thread(command, settings, "check")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "hunter2hunter2" not in done.stderr
    if harm in ("mode", "owner"):
        path.unlink()


async def test_the_sweep_mends_it_too(
    host: Host, settings: WorkerSettings, api: Database, stack: MailStack, mariadb: MariaDB
) -> None:
    main = stack.postfix_config / "main.cf"
    right = main.read_text()
    main.write_text(right.replace("smtpd_helo_required = yes", "smtpd_helo_required = no"))
    worker = Worker(host, settings)
    await worker.sweep()  # makes the alias file
    assert (await worker.sweep()).lines == [], "what a job is about is the job's business"
    assert main.read_text() != right
    mariadb.sql("UPDATE jobs SET state = 'done'", "owner")
    started = "INSERT host_status (host, heartbeat_at, started_at, `release`)"
    mariadb.sql(f"{started} VALUES ('{HOST}', {NOW}, {NOW}, '0')", "owner")
    said = f"mailhost: {main} has 'smtpd_helo_required = no', lacks 'smtpd_helo_required = yes'"
    dry = await sweep(host, worker.lane, dry_run=True)
    assert (dry.lines, dry.differ, dry.left) == ([said], 1, 1)
    assert main.read_text() != right
    report = await worker.sweep()
    assert (report.lines, report.differ, report.repaired, report.left) == ([f"{said}: repaired"], 1, 1, 0)
    assert main.read_text() == right
    assert mariadb.sql("SELECT JSON_VALUE(sweep, '$.lines[0]') FROM host_status", "owner") == [[f"{said}: repaired"]]
    assert (await worker.sweep()).lines == []
    async with api.read.connect() as connection:
        row = (await connection.execute(select(applied).where(applied.c.kind == MAILHOST_SYNC))).one()
    assert (row.stands, row.subject_id) == (True, THE_HOST)
    assert {proof["result"] for proof in row.proofs.values()} == {"ok"}
    stack.dovecot_config.unlink()
    write_host_file(stack, postfix_password=SecretStr("wrong"))
    report = await worker.sweep()
    assert (report.differ, report.repaired, report.left) == (1, 0, 1)
    assert report.lines[0].startswith("mailhost: The query of ")
    write_host_file(stack)
    assert (await worker.sweep()).repaired == 1
