"""A rotation with everything real: worker, service process, rspamd, Postfix, a name server that takes our records. Mail goes
out all the time, and each message verifies with the keys that the name server has when it arrives."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.stack.accounts import PASSWORD, account
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.rotation import Rotation, rotation
from tests.stack.traffic import traffic

__all__ = ["account"]

pytestmark = pytest.mark.asyncio

ALICE = f"alice@{PRIMARY_DOMAIN}"
SERVICE = {"DNS_SECONDS": "1", "DNS_WATCH_SECONDS": "0.3", "POLL_SECONDS": "0.2"}
RETENTION = 3
"""Seconds that a key stays in DNS when it signs no more, in which the message before must arrive."""

# Each step is written down where no rollback reaches, and then takes its time, so that it can be cut off half done.
_SLOW_STEPS = """
CREATE TABLE steps (id INT AUTO_INCREMENT PRIMARY KEY, step VARCHAR(64) NOT NULL) ENGINE=Aria TRANSACTIONAL=0;
DELIMITER ;;
CREATE TRIGGER slow_key BEFORE UPDATE ON dkim_keys FOR EACH ROW
BEGIN
  IF NEW.state <> OLD.state THEN
    INSERT INTO steps (step) VALUES (CONCAT(OLD.state, ' to ', NEW.state)); DO SLEEP(0.3);
  ELSEIF NEW.proved_at IS NOT NULL AND OLD.proved_at IS NULL THEN
    INSERT INTO steps (step) VALUES ('proved'); DO SLEEP(0.3);
  ELSEIF NEW.probed_at <> COALESCE(OLD.probed_at, '2000-01-01') THEN
    INSERT INTO steps (step) VALUES ('probe sent'); DO SLEEP(0.3);
  END IF;
END;;
CREATE TRIGGER slow_first_report BEFORE INSERT ON applied FOR EACH ROW
BEGIN
  IF NEW.kind = 'dkim.sync' THEN
    INSERT INTO steps (step) VALUES ('host: key made'); DO SLEEP(0.3);
  END IF;
END;;
CREATE TRIGGER slow_report BEFORE UPDATE ON applied FOR EACH ROW
BEGIN
  IF NEW.kind = 'dkim.sync' AND NEW.version <> OLD.version THEN
    INSERT INTO steps (step) SELECT CONCAT('host: ', state) FROM dkim_keys WHERE id = NEW.subject_id; DO SLEEP(0.3);
  END IF;
END;;
DELIMITER ;
"""
_FAST_STEPS = "DROP TRIGGER slow_key; DROP TRIGGER slow_first_report; DROP TRIGGER slow_report; DROP TABLE steps;"
STEPS = {
    *("host: key made", "generating to unpublished", "unpublished to published", "published to active", "host: active"),
    *("probe sent", "proved", "active to retiring", "host: retiring", "retiring to revoked", "host: revoked"),
    *("revoked to removed", "host: removed"),
}
"""Those that the host may leave out, because it comes to a key when the next step is done, are not among them."""


@pytest.fixture(scope="module")
def stack(mariadb: MariaDB) -> Iterator[MailStack]:
    """One of our own, whose configuration the worker looks after."""
    mail = MailStack()
    mail.start(mariadb)
    yield mail
    mail.close()


@pytest_asyncio.fixture(params=["rfc2136", "powerdns"])
async def site(request: pytest.FixtureRequest, mariadb: MariaDB, stack: MailStack) -> AsyncIterator[Rotation]:
    mariadb.empty()
    stack.empty()
    async with rotation(mariadb, stack, powerdns=request.param == "powerdns", **SERVICE) as made:
        yield made


async def test_every_message_verifies_before_during_and_after(site: Rotation, account: object) -> None:
    account(ALICE)  # type: ignore[operator]
    await site.until_proved(await site.rotate())
    with traffic(site.mail, site.sink, site.names, (ALICE, PASSWORD)) as mail:
        for _ in range(3):
            await site.until_proved(await site.rotate())
        await asyncio.sleep(0.5)
        states = await site.states()
    assert [state for state, *_ in states.values()] == ["retiring"] * 3 + ["active"]
    assert len(mail.judged) == len(mail.sent) > 20
    assert not mail.wrong
    assert len(mail.selectors) == 4, "each of them signed"
    assert max(map(len, mail.judged.values())) == 2, "old and new side by side, until the probe was back"


@pytest.mark.parametrize("victim", ["worker", "service", "names"])
async def test_killed_once_in_each_step_it_gets_to_its_end(
    mariadb: MariaDB, stack: MailStack, account: object, victim: str
) -> None:
    mariadb.empty()
    stack.empty()
    settings = {**SERVICE, "DKIM_RETENTION_DAYS": str(RETENTION / 86400)}
    killed: set[str] = set()
    async with rotation(mariadb, stack, **settings) as site:
        account(ALICE)  # type: ignore[operator]
        old = await site.rotate()
        await site.until_proved(old)

        async def kill() -> None:
            seen = 0
            while not killed >= STEPS:
                for number, step in mariadb.sql(f"SELECT id, step FROM steps WHERE id > {seen} ORDER BY id", "owner"):
                    seen = int(number)
                    if step not in killed:
                        await asyncio.to_thread(site.kill, victim)
                        await asyncio.sleep(0.3)
                        await asyncio.to_thread(site.start, victim)
                        killed.add(step)
                await asyncio.sleep(0.02)

        mariadb.sql(_SLOW_STEPS, "owner")
        try:
            with traffic(site.mail, site.sink, site.names, (ALICE, PASSWORD)) as mail:
                killing = asyncio.create_task(kill())
                new = await site.rotate()
                await site.until_proved(new, seconds=60)
                await site.until_removed(old)
                async with asyncio.timeout(20):
                    await killing
        finally:
            mariadb.sql(_FAST_STEPS, "owner")
        states = await site.states()
    assert {key_id: state for key_id, (state, *_) in states.items()} == {old: "removed", new: "active"}
    assert not mail.wrong
    assert len(mail.judged) == len(mail.sent) > 50
