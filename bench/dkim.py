"""A DKIM rotation on a host of its own: how soon the new key signs, and whether a message ever fails to verify."""

import asyncio
import statistics
import time
from typing import NamedTuple

from bench.system import create_schema
from tests.stack.accounts import PASSWORD, account_maker
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.rotation import Rotation, rotation
from tests.stack.traffic import traffic

ALICE = f"alice@{PRIMARY_DOMAIN}"
SENDERS = 4


class Rotations(NamedTuple):
    """Seconds from the request until rspamd signs with the new key, and until a probe has verified and the old one retires;
    medians. Then of the messages that were sent meanwhile."""

    signs: float
    proved: float
    messages: int
    wrong: int


def measure_rotations(count: int, messages: int) -> Rotations:
    """`count` rotations on an idle host, and as many while mail goes out from `SENDERS` connections, until there are
    `messages` of it."""
    mariadb, mail = MariaDB(), MailStack()
    try:
        mariadb.start(durable=True)
        mariadb.create_database(create_schema)
        mariadb.apply_grants()
        mail.start(mariadb)
        return asyncio.run(_measure(mariadb, mail, count, messages))
    finally:
        for part in (mail, mariadb):
            if hasattr(part, "_processes"):  # it was started
                part.close()


async def _measure(mariadb: MariaDB, mail: MailStack, count: int, messages: int) -> Rotations:
    async with rotation(mariadb, mail) as site:
        account_maker(mariadb, mail)(ALICE)
        await site.until_proved(await site.rotate())
        took = [await _rotate(site) for _ in range(count)]
        with traffic(site.mail, site.sink, site.names, (ALICE, PASSWORD), senders=SENDERS) as sent:
            for _ in range(count):
                await _rotate(site)
            while len(sent.sent) < messages:
                await _rotate(site)
        signs, proved = (statistics.median(times) for times in zip(*took, strict=True))
        return Rotations(signs, proved, len(sent.judged), len(sent.wrong))


async def _rotate(site: Rotation) -> tuple[float, float]:
    began = time.perf_counter()
    key_id = await site.rotate()
    selector = await site.selector(key_id)
    while not site.signs(selector):
        if time.perf_counter() - began > 60:
            raise RuntimeError(f"the new key does not sign: {await site.states()}")
        await asyncio.sleep(0.005)
    signs = time.perf_counter() - began
    await site.until_proved(key_id)
    return signs, time.perf_counter() - began
