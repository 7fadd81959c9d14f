"""`dkim.sync` with a real rspamd: run twice, killed at every step, on a full disk, given hostile rows; and the sweep."""

import errno
import grp
import os
import re
import shutil
import stat
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from sqlalchemy import Row, insert, select, text, update

from app.addresses import DomainName, Selector
from app.config import WorkerSettings
from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.rspamd import milter_socket, render_rspamd
from app.models.dkim_keys import Algorithm, DkimState, dkim_keys
from app.models.domains import domains
from app.models.jobs import JobState, applied
from app.queue.claim import claim
from app.queue.contracts import DKIM_LANE, DKIM_SYNC, JobKind
from app.queue.enqueue import enqueue
from app.workers.host import dkim_files, fs
from app.workers.host.dkim_files import KeyUnusable, begin_table, make_key, read_table, write_table
from app.workers.host.handlers.dkim import sync_dkim_key
from app.workers.host.handlers.users import GiveUp, TryAgain
from app.workers.host.loop import Worker
from app.workers.host.milter import ask_signers
from app.workers.host.sweep import Report, _dkim
from tests.conftest import HOST, PRIMARY
from tests.mailconfig.test_hosts import MINIMAL
from tests.stack.processes import Processes
from tests.workers.host.machine import VIRTUAL, Machine, add_virtual_domain, machine, root, worker_settings
from tests.workers.host.test_fs import Killed, killed_before
from tests.workers.host.test_loop import only_sqlite

pytestmark = pytest.mark.asyncio
__all__ = ["machine", "root", "worker_settings"]

ED, RSA = Algorithm.ED25519, Algorithm.RSA_2048
ACTIVE, GENERATING, PUBLISHED = DkimState.ACTIVE, DkimState.GENERATING, DkimState.PUBLISHED
REMOVED, RETIRING = DkimState.REMOVED, DkimState.RETIRING
DONE, DEAD, READY = JobState.DONE, JobState.DEAD, JobState.READY


@dataclass
class Rspamd:
    """With the configuration that a host gets; no mail but the worker's own question reaches it."""

    file: HostFile
    processes: Processes

    def start(self) -> None:
        main = self.file.rspamd_config_dir / "rspamd.conf"
        self.process = self.processes.start(["/usr/bin/rspamd", "-f", "-u", "_rspamd", "-g", "_rspamd", "-c", main])
        self.processes.wait_for(self.process, milter_socket(self.file), self.file.rspamd_log)

    def stop(self) -> None:
        self.processes.stop(self.process)


@pytest.fixture(scope="module")
def rspamd() -> Iterator[Rspamd]:
    processes = Processes()
    base = processes.directory
    for name in ("run", "state", "log"):
        (base / name).mkdir()
        shutil.chown(base / name, "_rspamd", "_rspamd")
    (base / "rspamd").mkdir()
    values = {"rspamd_config_dir": base / "rspamd", "rspamd_run_dir": base / "run", "rspamd_state_dir": base / "state"}
    values |= {"rspamd_log": base / "log/rspamd.log", "dkim_dir": base / "dkim"}
    file = HostFile(**{**MINIMAL, **values, "host": HOST, "dns": False})
    for name, made in render_rspamd(HostSettings(), file).items():
        (file.rspamd_config_dir / name).write_text(made.text)
    rspamd = Rspamd(file, processes)
    rspamd.start()
    yield rspamd
    processes.close()


class Signed:
    """`machine` with DKIM keys, as the API and the service process would write their rows."""

    def __init__(self, machine: Machine, settings: WorkerSettings, rspamd: Rspamd) -> None:
        self.machine = machine
        self.rspamd = rspamd
        self.directory = rspamd.file.dkim_dir
        self.worker = Worker(machine.host, settings)

    async def add(
        self,
        selector: str,
        state: DkimState = GENERATING,
        algorithm: Algorithm = ED,
        *,
        domain: str = PRIMARY,
        host: str = HOST,
        public_key: str | None = None,
    ) -> int:
        now = self.machine.clock()
        async with self.machine.api.write.begin() as connection:
            domain_id = (await connection.execute(select(domains.c.id).where(domains.c.name == domain))).scalar_one()
            values = {"domain_id": domain_id, "host": host, "selector": selector, "algorithm": algorithm.value}
            values |= {"state": state.value, "activate": True, "version": 1, "created_at": now, "updated_at": now}
            made = await connection.execute(insert(dkim_keys).values(**values, public_key=public_key))
            assert made.inserted_primary_key
            key_id = int(made.inserted_primary_key[0])
            await self._ask(connection, key_id, 1)
        return key_id

    async def bring(self, key_id: int, state: DkimState, **values: Any) -> None:
        """To another state, as the service process does."""
        async with self.machine.api.write.begin() as connection:
            change = update(dkim_keys).where(dkim_keys.c.id == key_id)
            await connection.execute(change.values(state=state.value, version=dkim_keys.c.version + 1, **values))
            query = select(dkim_keys.c.version).where(dkim_keys.c.id == key_id)
            await self._ask(connection, key_id, (await connection.execute(query)).scalar_one())

    async def made(self, selector: str, state: DkimState = ACTIVE, **values: Any) -> int:
        """A key that the host has made, and whose public half is known."""
        key_id = await self.add(selector, **values)
        await self.run()
        assert (await self.ends())[-1] == (DONE, None)
        await self.bring(key_id, state, public_key=(await self.of(key_id)).result["public_key"])
        await self.run()
        return key_id

    async def _ask(self, connection: Any, key_id: int, version: int) -> None:
        await enqueue(
            connection,
            JobKind.DKIM_SYNC,
            host=HOST,
            lane=DKIM_LANE,
            subject_id=key_id,
            version=version,
            request_id="request",
            now=self.machine.clock(),
        )

    async def run(self) -> None:
        """The worker's rounds until nothing is due."""
        host = self.machine.host
        while claims := await claim(host.database, HOST, host.clock(), limit=8, kinds=[DKIM_SYNC]):
            for taken in claims:
                await self.worker.work(taken)

    async def ends(self) -> list[tuple[JobState, str | None]]:
        return [(JobState(job.state), job.error) for job in await self.machine.jobs() if job.kind == DKIM_SYNC]

    async def of(self, key_id: int) -> Row[Any]:
        query = select(applied).where(applied.c.kind == DKIM_SYNC, applied.c.subject_id == key_id)
        async with self.machine.api.read.connect() as connection:
            return (await connection.execute(query)).one()

    def path(self, selector: str, domain: str = PRIMARY) -> Path:
        return self.directory / f"{selector}._domainkey.{domain}"

    async def signers(self, domain: str = PRIMARY) -> set[str]:
        return set(await ask_signers(milter_socket(self.rspamd.file), DomainName(domain)))

    async def sweep(self, *, dry_run: bool = False) -> Report:
        report = Report()
        await _dkim(self.machine.host, report, dry_run=dry_run)
        return report


@pytest_asyncio.fixture
async def signed(
    machine: Machine, worker_settings: WorkerSettings, rspamd: Rspamd, scratch: Path
) -> AsyncIterator[Signed]:
    path = scratch / "host.toml"
    given = {name: getattr(rspamd.file, name) for name in HostFile.model_fields if name.startswith(("rspamd", "dkim"))}
    values = {**MINIMAL, "host": HOST, **given}
    path.touch(mode=0o600)
    path.write_text("dns = false\n" + "".join(f'{name} = "{value}"\n' for name, value in values.items()))
    machine.host = replace(machine.host, host_file=path)
    shutil.rmtree(rspamd.file.dkim_dir, ignore_errors=True)
    begin_table(rspamd.file.dkim_dir)
    yield Signed(machine, worker_settings, rspamd)


# What it makes


@pytest.mark.parametrize("algorithm", [ED, RSA, Algorithm.RSA_3072])
async def test_only_the_public_half_comes_back(signed: Signed, algorithm: Algorithm) -> None:
    key_id = await signed.add("sel", algorithm=algorithm)
    await signed.run()
    row = await signed.of(key_id)
    assert (row.version, row.stands, list(row.result)) == (1, True, ["public_key"])
    assert {name: proof["result"] for name, proof in row.proofs.items()} == {"key": "ok", "signing": "ok"}
    octets = b64decode(row.result["public_key"], validate=True)
    if algorithm is ED:
        assert len(octets) == 32
    else:
        public = load_der_public_key(octets)
        assert isinstance(public, RSAPublicKey)
        assert public.key_size == int(algorithm.removeprefix("rsa-"))
    gid = grp.getgrnam("_rspamd").gr_gid
    for path, mode in ((signed.directory, 0o750), (signed.path("sel"), 0o640), (signed.directory / "keys.json", 0o640)):
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 0, gid)
    assert await signed.signers() == set()


async def test_the_life_of_a_key(signed: Signed) -> None:
    key_id = await signed.add("sel")
    await signed.run()
    public, private = (await signed.of(key_id)).result["public_key"], signed.path("sel").read_bytes()
    for state in (DkimState.UNPUBLISHED, PUBLISHED, ACTIVE, RETIRING, DkimState.REVOKED):
        await signed.bring(key_id, state, public_key=public)
        await signed.run()
        row = await signed.of(key_id)
        assert (row.result, row.stands) == ({"public_key": public}, True)
        says = "rspamd signs with it" if state is ACTIVE else "rspamd does not sign with it"
        assert row.proofs["signing"] == {"result": "ok", "detail": says}
        assert await signed.signers() == ({"sel"} if state is ACTIVE else set())
        assert signed.path("sel").read_bytes() == private
    await signed.bring(key_id, REMOVED)
    await signed.run()
    row = await signed.of(key_id)
    assert (row.version, row.stands, row.result) == (7, False, {})
    assert not signed.path("sel").exists()
    assert {state for state, _ in await signed.ends()} == {DONE}


async def test_all_active_keys_sign_at_once_and_no_secret_is_written_anywhere(signed: Signed) -> None:
    await add_virtual_domain(signed.machine)
    ids = [await signed.made(f"s{n}", algorithm=algorithm) for n, algorithm in enumerate((ED, RSA, ED))]
    await signed.made("there", domain=VIRTUAL)
    assert await signed.signers() == {"s0", "s1", "s2"}
    assert await signed.signers(VIRTUAL) == {"there"}
    assert await signed.signers("elsewhere.test") == set()
    private = [path.read_text() for path in signed.directory.iterdir() if path.name != "keys.json"]
    assert len(private) == len(ids) + 1
    async with signed.machine.api.read.connect() as connection:
        for name in ("applied", "jobs", "dkim_keys", "audit_events"):
            rows = repr((await connection.execute(text(f"SELECT * FROM {name}"))).all())
            assert not any(secret in rows or secret.split("\n")[1:2][0:1] == [rows] for secret in private)
            assert "PRIVATE" not in rows


async def test_twice_is_as_once(signed: Signed) -> None:
    key_id = await signed.made("sel")
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in signed.directory.iterdir()}
    outcomes = [await sync_dkim_key(signed.machine.host, key_id) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in signed.directory.iterdir()} == before


async def test_another_hosts_key_is_none_of_ours(signed: Signed) -> None:
    other = await signed.add("sel", ACTIVE, host="second")
    await signed.run()
    assert await signed.ends() == [(DEAD, f"There is no DKIM key {other} of this host.")]
    assert [path.name for path in signed.directory.iterdir()] == ["keys.json"]


async def test_without_a_host_file(signed: Signed) -> None:
    signed.machine.host.host_file = None
    key_id = await signed.add("sel")
    await signed.run()
    row = await signed.of(key_id)
    nothing = {"result": "not configured", "detail": None}
    assert (row.version, row.result, row.proofs) == (1, {}, {"key": nothing, "signing": nothing})


# What goes wrong


async def test_a_key_is_never_made_twice(signed: Signed) -> None:
    key_id = await signed.made("sel")
    other = await signed.made("other")
    signed.path("sel").unlink()
    await signed.bring(key_id, ACTIVE)
    await signed.run()
    state, error = (await signed.ends())[-1]
    assert (state, error) == (
        DEAD,
        f"{signed.path('sel')} is gone, and no key is made twice under one selector: put it back, or rotate.",
    )
    row = await signed.of(key_id)
    assert (row.version, row.proofs["key"]) == (2, {"result": "failed", "detail": error})
    assert not signed.path("sel").exists()
    # The other key goes on alone.
    assert await signed.signers() == {"other"}
    assert (await signed.of(other)).proofs["key"]["result"] == "ok"


async def test_mail_waits_when_the_last_key_is_gone(signed: Signed) -> None:
    key_id = await signed.made("sel")
    signed.path("sel").unlink()
    await signed.bring(key_id, ACTIVE)
    await signed.run()
    assert read_table(signed.directory).domains == {PRIMARY: ["sel"]}
    with pytest.raises(fs.HostError, match=r"451 4\.7\.1"):
        await signed.signers()


@pytest.mark.parametrize("how", ["mode", "owner", "group", "algorithm", "nonsense", "link", "directory", "other"])
async def test_a_file_that_is_not_what_it_must_be(signed: Signed, how: str) -> None:
    key_id = await signed.made("sel", PUBLISHED)
    path = signed.path("sel")
    if how == "mode":
        path.chmod(0o644)
    elif how == "owner":
        os.chown(path, 1000, -1)
    elif how == "group":
        os.chown(path, -1, 1000)
    elif how in ("algorithm", "other"):
        make_key(signed.directory, DomainName(PRIMARY), Selector("more"), RSA if how == "algorithm" else ED)
        path.write_bytes(signed.path("more").read_bytes())
    elif how == "nonsense":
        path.write_bytes(b"s3cr3t")
    else:
        path.rename(signed.directory / "away")
        path.symlink_to(signed.directory / "away") if how == "link" else path.mkdir()
    before = path.lstat()
    await signed.bring(key_id, ACTIVE)
    await signed.run()
    state, error = (await signed.ends())[-1]
    assert state is DEAD
    assert str(path) in str(error)
    assert "s3cr3t" not in str(error)
    after = path.lstat()
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns"):
        assert getattr(after, name) == getattr(before, name), name
    assert (await signed.of(key_id)).proofs["key"] == {"result": "failed", "detail": error}


async def test_adopted_key_must_be_the_one_of_the_row(signed: Signed) -> None:
    public = make_key(signed.directory, DomainName(PRIMARY), Selector("mail"), RSA)
    good = await signed.add("mail", DkimState.UNPUBLISHED, RSA, public_key=public)
    missing = await signed.add("gone", DkimState.UNPUBLISHED, RSA, public_key=public)
    make_key(signed.directory, DomainName(PRIMARY), Selector("other"), RSA)
    await signed.add("other", DkimState.UNPUBLISHED, RSA, public_key=public)
    await signed.run()
    assert (await signed.of(good)).result == {"public_key": public}
    assert [state for state, _ in await signed.ends()] == [DONE, DEAD, DEAD]
    assert not signed.path("gone").exists()
    assert (await signed.of(missing)).stands is False


async def test_rspamd_is_away(signed: Signed) -> None:
    key_id = await signed.made("sel", PUBLISHED)
    signed.rspamd.stop()
    try:
        await signed.bring(key_id, ACTIVE)
        await signed.run()
        state, error = (await signed.ends())[-1]
        assert (state, str(error).startswith("rspamd, ")) == (READY, True)
        assert (await signed.of(key_id)).version == 2
    finally:
        signed.rspamd.start()
    signed.machine.clock.forward(minutes=6)
    await signed.run()
    assert (await signed.of(key_id)).proofs["signing"]["detail"] == "rspamd signs with it"


async def test_rspamd_that_does_not_sign_is_no_proof(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    key_id = await signed.made("sel", PUBLISHED)
    monkeypatch.setattr("app.workers.host.handlers.dkim.write_table", lambda *args, **options: None)
    await signed.bring(key_id, ACTIVE)
    with pytest.raises(TryAgain, match=f"rspamd does not sign with sel for {PRIMARY}"):
        await sync_dkim_key(signed.machine.host, key_id)


async def test_an_older_list_never_replaces_a_newer(signed: Signed) -> None:
    key_id = await signed.made("sel")
    write_table(signed.directory, 99, {PRIMARY: ["sel"]})
    await signed.bring(key_id, RETIRING)
    with pytest.raises(TryAgain, match="is of version 99, and the database is at 3"):
        await sync_dkim_key(signed.machine.host, key_id)
    assert await signed.signers() == {"sel"}


@only_sqlite
@pytest.mark.parametrize("state", [GENERATING, ACTIVE, REMOVED])
async def test_killed_at_every_step(signed: Signed, state: DkimState) -> None:
    """At no step is there another private half than before, nor a list that rspamd cannot use; and the next run ends it."""
    for step in range(1, 1000):
        selector = f"k{step}"
        key_id = await (signed.add(selector) if state is GENERATING else signed.made(selector, PUBLISHED))
        if state is not GENERATING:
            await signed.bring(key_id, state)
        before = signed.path(selector).read_bytes() if state is not GENERATING else None
        killed = True
        try:
            with killed_before(step):
                await sync_dkim_key(signed.machine.host, key_id)
                killed = False
        except Killed:
            pass
        assert read_table(signed.directory).domains is not None
        if before and signed.path(selector).exists():
            assert signed.path(selector).read_bytes() == before
        await signed.signers()
        await signed.run()
        row = await signed.of(key_id)
        assert {proof["result"] for proof in row.proofs.values()} == {"ok"}
        assert signed.path(selector).exists() is (state is not REMOVED)
        assert (selector in await signed.signers()) is (state is ACTIVE)
        names = {path.name for path in signed.directory.iterdir()}
        assert all(re.fullmatch(r"k\d+\._domainkey\..*|keys\.json|\..*", name) for name in names)
        if state is ACTIVE:
            await signed.bring(key_id, RETIRING)
            await signed.run()
        if not killed:
            assert step > 5
            return
    pytest.fail("it has no end")


@only_sqlite
@pytest.mark.parametrize("state", [GENERATING, ACTIVE])
async def test_full_disk(signed: Signed, state: DkimState, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await signed.made("old")
    key_id = await (signed.add("new") if state is GENERATING else signed.made("new", PUBLISHED))
    if state is ACTIVE:
        await signed.bring(key_id, ACTIVE)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(dkim_files, "write_file", full)
        patch.setattr(dkim_files, "write_new_file", full)
        with pytest.raises(TryAgain, match="No space left on device"):
            await sync_dkim_key(signed.machine.host, key_id)
        assert await signed.signers() == {"old"}
    await signed.run()
    assert (await signed.of(key_id)).proofs["key"]["result"] == "ok"
    assert (await signed.of(old)).proofs["key"]["result"] == "ok"


HOSTILE = {
    "path": "selector = '../../../tmp/x'",
    "slash": "selector = 'a/b'",
    "newline": "selector = 'a\nb'",
    "quote": "selector = 'a\",\"b'",
    "dots": "selector = '..'",
    "upper case": "selector = 'Bad'",
    "empty": "selector = ''",
    "algorithm": "algorithm = 'rsa-512'",
    "state": "state = 'busy'",
    "version": "version = -1",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_row_harms_nobody_else(signed: Signed, name: str) -> None:
    good = await signed.made("good")
    bad = await signed.add("bad", ACTIVE)
    await signed.machine.as_owner(f"UPDATE dkim_keys SET {HOSTILE[name]} WHERE id = {bad}")
    await signed.bring(good, ACTIVE)
    before = {path.name for path in signed.directory.iterdir()}
    with pytest.raises(GiveUp, match=f"DKIM key {bad}"):
        await sync_dkim_key(signed.machine.host, bad)
    await signed.run()
    assert await signed.signers() == {"good"}
    assert {path.name for path in signed.directory.iterdir()} == before


@pytest.mark.parametrize("domain", ["../x.test", "a/b.test", "x", "a.test\n"])
async def test_a_hostile_domain(signed: Signed, domain: str) -> None:
    await add_virtual_domain(signed.machine)
    bad = await signed.add("bad", domain=VIRTUAL)
    await signed.machine.as_owner(f"UPDATE domains SET name = '{domain}' WHERE name = '{VIRTUAL}'")
    with pytest.raises(GiveUp, match=f"DKIM key {bad}"):
        await sync_dkim_key(signed.machine.host, bad)


async def test_a_row_that_turns_bad_leaves_no_mail_unsigned(signed: Signed) -> None:
    """Its domain's mail goes on being signed as before, until somebody has looked."""
    bad = await signed.made("sel")
    await signed.machine.as_owner(f"UPDATE dkim_keys SET state = 'nonsense' WHERE id = {bad}")
    await signed.made("other", PUBLISHED)
    assert await signed.signers() == {"sel"}


# The sweep


async def test_sweep_finds_and_repairs(signed: Signed) -> None:
    first, second = await signed.made("one"), await signed.made("two")
    assert (await signed.sweep()).differ == 0
    write_table(signed.directory, 1, {PRIMARY: ["one"]})
    report = await signed.sweep(dry_run=True)
    assert (report.differ, report.repaired, report.left) == (2, 0, 2)
    assert await signed.signers() == {"one"}
    report = await signed.sweep()
    assert (report.left, report.repaired) == (0, report.differ)
    assert await signed.signers() == {"one", "two"}
    signed.path("one").unlink()
    report = await signed.sweep()
    assert any(f"DKIM key {first}: {signed.path('one')} is gone" in line for line in report.lines)
    assert report.left >= 1
    assert await signed.signers() == {"two"}
    assert (await signed.of(second)).proofs["key"]["result"] == "ok"


async def test_sweep_without_any_key_makes_the_list(signed: Signed) -> None:
    (signed.directory / "keys.json").unlink()
    report = await signed.sweep()
    assert (report.differ, report.repaired) == (1, 1)
    assert read_table(signed.directory).domains == {}


async def test_the_first_list_is_made_once(signed: Signed) -> None:
    await signed.made("sel")
    (signed.directory / "keys.json").unlink()
    begin_table(signed.directory)
    assert not (signed.directory / "keys.json").exists()


# Adoption


async def test_adopted_file(signed: Signed, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HOST_FILE": str(signed.machine.host.host_file),
        "DATABASE_URL": "sqlite+aiosqlite:///x",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WAKE_DIRECTORY", str(scratch))
    domain, selector = DomainName(PRIMARY), Selector("mail")
    public = make_key(signed.directory, DomainName("a.test"), selector, RSA)
    old = scratch / "old.pem"
    old.write_bytes(signed.path("mail", "a.test").read_bytes())
    for _ in range(2):
        dkim_files.adopt_dkim_key(old, domain, selector)
    assert dkim_files.read_public_half(signed.directory, domain, selector, RSA) == public
    make_key(signed.directory, DomainName("b.test"), selector, RSA)
    old.write_bytes(signed.path("mail", "b.test").read_bytes())
    with pytest.raises(KeyUnusable, match="is another key"):
        dkim_files.adopt_dkim_key(old, domain, selector)
    old.write_text("s3cr3t")
    with pytest.raises(KeyUnusable, match="is no private key in PEM without a password") as refused:
        dkim_files.adopt_dkim_key(old, domain, selector)
    assert "s3cr3t" not in str(refused.value)
