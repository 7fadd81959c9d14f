"""The figures, each taken on a running system. What they mean stands in `__main__.py`."""

import asyncio
import base64
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from bench.load import Load, Measured
from bench.system import PASSWORD_HASH, Api, System

PAGE = 100
ROUNDS = 3


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Seconds are those of one load."""

    few: int = 1_000
    many: int = 100_000
    seconds: float = 2.0
    hashing: float = 5.0
    at_once: int = 600
    one_by_one: int = 100
    aliases: int = 15
    burst: int = 10_000
    messages: int = 60
    lookups: int = 40
    resets: int = 2_000
    confirms: int = 25
    rotations: int = 20


QUICK = Sizes(
    few=300,
    many=3_000,
    seconds=0.5,
    hashing=2.0,
    at_once=100,
    one_by_one=20,
    aliases=3,
    burst=500,
    messages=10,
    lookups=10,
    resets=300,
    confirms=5,
    rotations=3,
)


@dataclass(frozen=True)
class Http:
    """The medians of some rounds."""

    rate: float
    share: float
    """Of the base of the same round: what the machine does meanwhile falls out of it."""
    cpu: float
    """Microseconds of the API's CPU for each request."""
    database_cpu: float
    load: float
    """Of one core, for the process that makes the load."""


def measure_http(system: System, names: Collection[str], sizes: Sizes) -> dict[str, Http]:
    """Rounds of `hello` and then each of the names, so that whoever else uses the machine disturbs all alike."""
    taken: dict[str, list[tuple[Measured, float]]] = defaultdict(list)
    database = system.database_pid
    with system.api("bench.hello") as bare, system.api() as api:
        for _ in range(ROUNDS):
            hello = [bare.request("GET", "/hello")]
            base = Load(bare.port, hello, sizes.seconds, pids={"api": bare.pid, "database": database}).run().only(200)
            taken["hello"].append((base, 1.0))
            for name in names:
                load = _load(name, system, api, sizes.seconds, database)
                measured = load.run().only({"post": 202, "not-modified": 304}.get(name, 200))
                taken[name].append((measured, measured.rate / base.rate))
                if name == "post":
                    system.shrink()
    return {name: _median(rounds) for name, rounds in taken.items()}


def _median(rounds: list[tuple[Measured, float]]) -> Http:
    middle = statistics.median
    return Http(
        rate=middle(measured.rate for measured, _ in rounds),
        share=middle(share for _, share in rounds),
        cpu=middle(measured.cpu_each("api") for measured, _ in rounds),
        database_cpu=middle(measured.cpu_each("database") for measured, _ in rounds),
        load=middle(measured.cpu["load"] / measured.seconds for measured, _ in rounds),
    )


def _load(name: str, system: System, api: Api, seconds: float, database: int) -> Load:
    number = random.Random(1)
    if name == "get":
        addresses = [system.address(number.randint(1, system.accounts)) for _ in range(5000)]
        requests = [api.request("GET", f"/v1/users/{address}") for address in addresses]
    elif name == "list":
        starts = [number.randint(0, system.accounts - PAGE - 1) for _ in range(1000)]
        requests = [api.request("GET", f"/v1/users?limit={PAGE}&cursor={_cursor(start)}") for start in starts]
    elif name == "identities":
        addresses = [system.address(number.randint(1, system.accounts)) for _ in range(20_000)]
        requests = [api.request("GET", f"/v1/webmail/{address}/identities") for address in addresses]
    elif name == "not-modified":
        paths = [f"/v1/webmail/{system.address(each)}/identities" for each in range(1, 201)]
        requests = [api.request("GET", path, **{"If-None-Match": api.tag(path)}) for path in paths]
    else:
        requests = [api.request("POST", "/v1/users", new_user(system)) for _ in range(int(seconds * 5000))]
    return Load(api.port, requests, seconds, once=name == "post", pids={"api": api.pid, "database": database})


def new_user(system: System, **password: str) -> dict[str, str]:
    address = system.new_address()
    return {
        "address": address,
        "display_name": "Some New Person",
        "contact_address": "some.new.person@example.net",
        "external_id": f"new-{address}",
        **(password or {"password_hash": PASSWORD_HASH}),
    }


def _cursor(number: int) -> str:
    return base64.urlsafe_b64encode(str(number).encode()).decode().rstrip("=")


def measure_argon2(system: System, sizes: Sizes) -> tuple[float, float]:
    """Creations a second by password, and hashes a second without HTTP, before and after."""
    before = _hash_rate(sizes.hashing / 2)
    with system.api() as api:
        bodies = [new_user(system, password="seven green lanterns over the harbour") for _ in range(2000)]
        requests = [api.request("POST", "/v1/users", body) for body in bodies]
        created = Load(api.port, requests, sizes.hashing, once=True, warm_up=1).run().only(202)
    system.shrink()
    return created.rate, (before + _hash_rate(sizes.hashing / 2)) / 2


def _hash_rate(seconds: float) -> float:
    command = [sys.executable, "-m", "bench.hashes", str(seconds)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure_worker(system: System, sizes: Sizes) -> float:
    """Mailboxes a second, from the commit of so many creations at once to the last one's end."""
    asyncio.run(system.create_at_once(sizes.at_once))
    system.wait_for_jobs(seconds=120)
    ended = f"SELECT state, COUNT(*), MAX(TIMESTAMPDIFF(MICROSECOND, '{system.committed_at:%F %T.%f}', finished_at))"
    rows = system.mariadb.sql(f"{ended} FROM jobs WHERE subject_id > {system.accounts} GROUP BY state", "owner")
    system.shrink()
    ((state, count, microseconds),) = rows
    if (state, int(count)) != ("done", sizes.at_once):
        raise RuntimeError(f"{count} jobs ended as {state}")
    return sizes.at_once / int(microseconds) * 1e6


@dataclass(frozen=True)
class Ready:
    """Medians, in milliseconds."""

    answer: float
    """From sending the request to its answer, which comes when the account is ready."""
    job: float
    """From the job's insert to its end, by the timestamps of its row."""


def measure_ready(system: System, sizes: Sizes) -> Ready:
    with system.api() as api:
        bodies = [new_user(system) for _ in range(sizes.one_by_one)]
        requests = [api.request("POST", "/v1/users", body, Prefer="wait=10") for body in bodies]
        first = api.request("GET", f"/v1/users/{system.address(1)}")
        Load(api.port, [first], 0.2, connections=1).run()  # it then has a connection to the database
        load = Load(api.port, requests, 300, connections=1, once=True, warm_up=0)
        answers = load.run().only(201).latencies
    took = "SELECT TIMESTAMPDIFF(MICROSECOND, created_at, finished_at) FROM jobs"
    rows = system.mariadb.sql(f"{took} WHERE subject_id > {system.accounts}", "owner")
    system.shrink()
    jobs = [int(microseconds) for (microseconds,) in rows]
    return Ready(statistics.median(answers) * 1e3, statistics.median(jobs) / 1e3)
