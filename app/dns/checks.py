"""Whether the name servers of a domain say what they should: one look, for the API's answer and for the service's table."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from app.config import DnsSettings
from app.dns.ask import Answer, DnsUnclear, Server, all_say, ask_all, find_servers
from app.dns.records import Wanted, canonical, of_purpose
from app.models.dns_checks import Health


@dataclass(frozen=True, slots=True)
class Checked:
    servers: list[Server]
    records: list[dict[str, Any]]
    status: Health


async def check_records(domain: str, wanted: Sequence[Wanted], settings: DnsSettings) -> Checked:
    """Asks each name server for each record. Never raises: what cannot be asked is a problem of every record."""
    servers: list[Server] = []
    problem = None
    try:
        async with asyncio.timeout(2 * settings.dns_seconds):
            servers = await find_servers(domain, settings)
    except DnsUnclear as error:
        problem = str(error)
    except TimeoutError:
        problem = f"The name servers of {domain} did not answer in time."
    judged = await asyncio.gather(*(_judge(servers, each, problem, settings) for each in wanted))
    statuses = {status for _, status in judged}
    worst = next((each for each in (Health.WRONG, Health.UNKNOWN) if each in statuses), Health.OK)
    return Checked(servers, [record for record, _ in judged], worst)


async def _judge(
    servers: Sequence[Server], wanted: Wanted, problem: str | None, settings: DnsSettings
) -> tuple[dict[str, Any], Health]:
    first, values = wanted.records[0], [record.value for record in wanted.records]
    answers: list[Answer] = []
    status = Health.UNKNOWN
    if problem is None:
        found = await ask_all(servers, first.name, first.type, settings)
        answers = [
            each if each.values is None else replace(each, values=of_purpose(wanted.purpose, each.values))
            for each in found
        ]
        same = partial(canonical, wanted.purpose)
        problem = all_say(answers, values, same)
        if problem is None:
            status = Health.OK
        elif any(each.values is not None and all_say([each], values, same) for each in answers):
            status = Health.WRONG
    record = {
        "purpose": wanted.purpose,
        "name": first.name,
        "type": first.type,
        "values": values,
        "zone": [record.zone_line for record in wanted.records],
        "live": [
            {
                "server": each.server.name,
                "address": each.server.address,
                "values": None if each.values is None else [value[:_LONGEST] for value in each.values[:_MOST]],
                "problem": each.problem,
            }
            for each in answers
        ],
        "ok": problem is None,
        "problem": problem,
    }
    return record, status


_MOST = 20
_LONGEST = 2000
"""What a foreign name server says is shown and kept up to here."""
