"""What the audit trail costs a write: the API with and without its INSERT, in turns, so that both meet the same machine."""

import statistics
from dataclasses import dataclass

from bench.load import Load, Measured
from bench.measures import new_user
from bench.system import Api, System

ROUNDS = 9


@dataclass(frozen=True)
class Cost:
    """Of POST /v1/users, the medians of all rounds."""

    share: float
    """Of the time that a request takes, in percent."""
    cpu: float
    """Microseconds of the API's CPU for each request."""


def measure_audit(system: System, seconds: float) -> Cost:
    shares, cpu = [], []
    with system.api() as audited, system.api("bench.unaudited") as bare:
        for number in range(ROUNDS):
            turn = [audited, bare] if number % 2 else [bare, audited]
            taken = {api.port: _post(system, api, seconds) for api in turn}
            with_it, without = taken[audited.port], taken[bare.port]
            shares.append(100 * (1 - with_it.rate / without.rate))
            cpu.append(with_it.cpu_each("api") - without.cpu_each("api"))
    return Cost(statistics.median(shares), statistics.median(cpu))


def _post(system: System, api: Api, seconds: float) -> Measured:
    requests = [api.request("POST", "/v1/users", new_user(system)) for _ in range(int(seconds * 5000))]
    measured = Load(api.port, requests, seconds, once=True, pids={"api": api.pid}).run().only(202)
    system.shrink()
    return measured
