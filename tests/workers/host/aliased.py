"""A mail host whose Postfix is there but not running: real postalias and postmap, and aliases as the API writes them."""

import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Row, insert, select, text, update

from app.config import WorkerSettings
from app.db import Database
from app.models.aliases import AliasKind, alias_destinations, aliases
from app.models.domains import domains
from app.models.jobs import JobState, applied, jobs
from app.queue.claim import claim
from app.queue.contracts import ALIASES_LANE, ALIASES_SYNC, JobKind
from app.queue.enqueue import enqueue
from app.workers.host import pace
from app.workers.host.commands import Commands
from app.workers.host.loop import Worker
from tests.conftest import HOST, PRIMARY
from tests.workers.host.machine import Machine

OUTSIDE = "someone@else.example"
RECEIVE_ONLY, SEND_AS = AliasKind.RECEIVE_ONLY, AliasKind.SEND_AS


class Aliased:
    """`machine` with aliases. Its maps of views are files that `publish` writes from the very views."""

    def __init__(self, machine: Machine, settings: WorkerSettings, base: Path) -> None:
        self.machine = machine
        self.settings = settings
        self.directory = machine.host.aliases_directory
        self.base = base
        self.worker = Worker(machine.host, settings)

    async def add(
        self,
        name: str,
        *to: int | str,
        kind: AliasKind = RECEIVE_ONLY,
        domain: str = PRIMARY,
        hosts: tuple[str, ...] = (HOST,),
    ) -> int:
        """`to`: ids of users, or addresses elsewhere."""
        now = self.machine.clock()
        async with self.machine.api.write.begin() as connection:
            domain_id = (await connection.execute(select(domains.c.id).where(domains.c.name == domain))).scalar_one()
            made = await connection.execute(
                insert(aliases).values(
                    address=f"{name}@{domain}",
                    local_part=name,
                    domain_id=domain_id,
                    kind=kind.value,
                    note="",
                    version=1,
                    created_at=now,
                    updated_at=now,
                )
            )
            assert made.inserted_primary_key
            alias_id = int(made.inserted_primary_key[0])
            await self._lead(connection, alias_id, to)
            await self._ask(connection, alias_id, 1, hosts)
        return alias_id

    async def add_many(self, count: int, prefix: str = "n", *, to: str = OUTSIDE, start: int = 0) -> None:
        """All in one transaction, each with its job."""
        now = self.machine.clock()
        names = [f"{prefix}{number}" for number in range(start, start + count)]
        async with self.machine.api.write.begin() as connection:
            domain_id = (await connection.execute(select(domains.c.id).where(domains.c.name == PRIMARY))).scalar_one()
            row = {"domain_id": domain_id, "kind": RECEIVE_ONLY.value, "note": "", "version": 1}
            row |= {"created_at": now, "updated_at": now}
            values = [row | {"address": f"{name}@{PRIMARY}", "local_part": name} for name in names]
            await connection.execute(insert(aliases), values)
            query = select(aliases.c.id).where(aliases.c.local_part.in_(names))
            ids = list((await connection.execute(query)).scalars())
            targets = [
                {"alias_id": i, "position": 0, "user_id": None, "target_alias_id": None, "address": to} for i in ids
            ]
            await connection.execute(insert(alias_destinations), targets)
            job = {"host": HOST, "lane": ALIASES_LANE, "kind": ALIASES_SYNC, "version": 1, "request_id": "r"}
            job |= {"run_at": now, "created_at": now}
            await connection.execute(insert(jobs), [job | {"subject_id": alias_id} for alias_id in ids])

    async def change(self, alias_id: int, *to: int | str, delete: bool = False) -> None:
        async with self.machine.api.write.begin() as connection:
            values: dict[str, Any] = {"version": aliases.c.version + 1}
            if delete:
                values["deleted_at"] = self.machine.clock()
            await connection.execute(update(aliases).where(aliases.c.id == alias_id).values(**values))
            await connection.execute(alias_destinations.delete().where(alias_destinations.c.alias_id == alias_id))
            await self._lead(connection, alias_id, to)
            query = select(aliases.c.version).where(aliases.c.id == alias_id)
            version = (await connection.execute(query)).scalar_one()
            await self._ask(connection, alias_id, version, (HOST,))

    async def delete(self, alias_id: int) -> None:
        await self.change(alias_id, delete=True)

    async def _lead(self, connection: Any, alias_id: int, to: tuple[int | str, ...]) -> None:
        for position, target in enumerate(to):
            where = {"user_id": target} if isinstance(target, int) else {"address": target}
            await connection.execute(insert(alias_destinations).values(alias_id=alias_id, position=position, **where))

    async def _ask(self, connection: Any, alias_id: int, version: int, hosts: tuple[str, ...]) -> None:
        for host in hosts:
            await enqueue(
                connection,
                JobKind.ALIASES_SYNC,
                host=host,
                lane=ALIASES_LANE,
                subject_id=alias_id,
                version=version,
                request_id="request",
                now=self.machine.clock(),
            )

    async def publish(self) -> None:
        """What the views say now, where postmap reads it."""
        owner = Database(self.machine.test_database.url("owner"))
        for view, key in (("postfix_local_aliases", "local_part"), ("postfix_virtual_aliases", "address")):
            found: dict[str, list[str]] = {}
            async with owner.read.connect() as connection:
                for name, to in await connection.execute(text(f"SELECT {key}, destination FROM {view}")):
                    found.setdefault(name, []).append(to)
            lines = [f"{name} {','.join(to)}\n" for name, to in found.items()]
            (self.base / view).write_text("".join(lines))
            os.utime(self.base / view, (0, 0))
        await owner.close()

    async def run(self, *, publish: bool = True) -> int:
        """One round of the worker, to its end; how many jobs it claimed."""
        if publish:
            await self.publish()
        host = self.machine.host
        claims = await claim(host.database, HOST, host.clock(), limit=8, kinds=[ALIASES_SYNC])
        for taken in claims:
            await self.worker.work(taken)
        return len(claims)

    async def states(self) -> list[JobState]:
        return [JobState(job.state) for job in await self.machine.jobs() if job.kind == ALIASES_SYNC]

    async def applied(self, alias_id: int, host: str = HOST) -> Row[Any] | None:
        query = select(applied).where(
            applied.c.host == host, applied.c.kind == ALIASES_SYNC, applied.c.subject_id == alias_id
        )
        async with self.machine.api.read.connect() as connection:
            return (await connection.execute(query)).one_or_none()

    async def proof(self, alias_id: int) -> tuple[int, str, str]:
        """The version that is applied, and the proof."""
        row = await self.applied(alias_id)
        assert row is not None
        return row.version, row.proofs["postfix"]["result"], row.proofs["postfix"]["detail"]

    def answers(self) -> dict[str, str]:
        """All that Postfix finds in the map of the alias file."""
        return dump(self.base / "postfix", self.directory / "aliases")

    def text(self) -> str:
        return (self.directory / "aliases").read_text()


def dump(config: Path, file: Path) -> dict[str, str]:
    argv = ["postalias", "-c", config, "-s", f"lmdb:{file}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    lines = [line.split(":\t", 1) for line in done.stdout.splitlines()]
    return {name: value for name, value in lines if not name.startswith(("@", "YP_"))}


def make_postfix(base: Path) -> Path:
    """A configuration directory with which postalias and postmap run; Postfix itself need not."""
    config = base / "postfix"
    config.mkdir()
    (config / "main.cf").write_text("compatibility_level = 3.6\ndefault_database_type = lmdb\n")
    (config / "master.cf").touch()
    for file in config.iterdir():
        os.utime(file, (0, 0))  # Postfix waits for a second before it reads a file that was changed just now.
    return config


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SHORTEST", 0.0)
    monkeypatch.setattr(pace, "LONGEST", 0.0)


@pytest_asyncio.fixture
async def aliased(
    machine: Machine, worker_settings: WorkerSettings, scratch: Path, no_pause: None
) -> AsyncIterator[Aliased]:
    config = make_postfix(scratch)
    maps = {name: f"texthash:{scratch}/{name}" for name in ("recipients", "postfix_local_aliases")}
    (scratch / "recipients").touch()
    virtual = f"texthash:{scratch}/postfix_virtual_aliases"
    settings = worker_settings.model_copy(
        update={
            "postfix_config": config,
            "postfix_recipients": maps["recipients"],
            "postfix_local_aliases": maps["postfix_local_aliases"],
            "postfix_virtual_aliases": virtual,
            "aliases_directory": scratch / "aliases",
        }
    )
    commands = Commands(config, maps["recipients"], None, maps["postfix_local_aliases"], virtual)
    machine.host = replace(machine.host, commands=commands, aliases_directory=scratch / "aliases")
    yield Aliased(machine, settings, scratch)
