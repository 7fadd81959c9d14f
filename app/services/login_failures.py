"""Login failures: who tried what from where, and what follows for the next try. The rules stand in docs/brute-force.md.

Distinct wrong passwords are counted and not tries: a program that repeats an old one is one guess, however often it comes.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any

from sqlalchemy import ColumnElement, bindparam, case, delete, distinct, func, literal_column, or_, select, update
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.errors import BadAddress
from app.models.addresses import addresses
from app.models.app_passwords import app_passwords
from app.models.domains import domains
from app.models.login_failures import FailureKind, login_failures
from app.models.principals import principals

KNOWN = "known"
"""Stands in `guess`, where hashes stand, for no guess: a login that succeeded from that network."""

KNOWN_LIFETIME = timedelta(days=14)
"""How long a network is one from which the owner signs in."""

FAILURE_LIFETIME = timedelta(days=1)
"""How long a failure is kept: as long as the longest window that can be set."""

SHARED = "shared"
"""Stands in `network` for all shared sources, and for a try that came from no network that we know."""

SLOW_FROM = 0.3
"""Of a limit: from this share of it on each answer takes longer."""

REPEATED = 5
"""So many tries with whatever passwords, from one network for one login, cost a second more; at most `MAX_REPEATED`."""
MAX_REPEATED = 5

_HEX = re.compile(r"[0-9a-f]{1,64}\Z")
_CLIENT_ID = re.compile(r"[a-z]{1,16}-[0-9a-f]{12}\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """Distinct guesses within the window: so many are refused. None: no such limit."""

    pair: int
    """For one login from one network."""
    network: int
    """From one network, for whatever logins."""
    login: int | None
    """For one login, from networks that it is not known from, all together; and again from all shared sources together."""


@dataclass(frozen=True, slots=True)
class Try:
    """One try to sign in, in the terms in which it is counted."""

    kind: FailureKind
    name: str
    """The address or client id in its one form; empty if it cannot be one of ours."""
    hashed: str
    """Stands for the name if it is none of ours: it may be a password in the wrong field."""
    network: str
    guess: str

    @property
    def who(self) -> str:
        return f"{self.kind} {self.name or self.hashed}"

    @property
    def where(self) -> str:
        return f"{self.kind} {self.network}"

    @property
    def shared(self) -> bool:
        return self.network == SHARED


@dataclass(frozen=True, slots=True)
class Seen:
    """What is recorded within the window: distinct guesses."""

    login: int
    pair: int
    network: int
    attempts: int
    """Tries for this login from this network."""
    known_at: datetime | None
    """When the login was last noted to have succeeded from this network."""
    own_login: int = 0
    """1 if the try's own guess is among those at the login."""
    own_pair: int = 0


@lru_cache(maxsize=10_000)
def network_of(client_address: str, shared_sources: tuple[Any, ...] = ()) -> str:
    """The network by which an address is counted: /32 of IPv4, also where it is written as IPv6; /64 of IPv6."""
    try:
        address = ip_address(client_address.partition("%")[0])
    except ValueError:
        return SHARED
    address = getattr(address, "ipv4_mapped", None) or address
    if any(address in source for source in shared_sources if source.version == address.version):
        return SHARED
    return str(ip_network((address, 32 if address.version == 4 else 64), strict=False))


def name_of(kind: FailureKind, login: str, primary_domain: str) -> str:
    """The one form of a login, whatever its case and extension are; empty if it can be nobody's."""
    if kind is FailureKind.API:
        return login if _CLIENT_ID.match(login) else ""
    local_part, _, domain = login.rpartition("@") if "@" in login else (login, "", primary_domain)
    try:
        return str(MailAddress(f"{local_part.partition('+')[0]}@{domain}"))
    except BadAddress:
        return ""


def keyed_hash(key: bytes, purpose: str, text: str, *, digits: int) -> str:
    message = f"{purpose}\0{text}".encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:digits]


def guess_of(key: bytes, login: str, password: str) -> str:
    """16 bits, which tell two guesses apart and do not tell what they were, as Dovecot's own hash with its 12 bits."""
    return keyed_hash(key, f"guess\0{login}", password, digits=4)


def is_guess(text: str) -> bool:
    return _HEX.match(text) is not None


_t = login_failures.c
_MINE = _t.login.in_([bindparam("name"), bindparam("hashed")])
_GUESS = _t.guess != KNOWN
_OWN = _t.guess == bindparam("guess")
_HERE = _t.network == bindparam("network")
_OF_NETWORK = (
    select(func.count())
    .select_from(login_failures)
    .where(
        _HERE,
        _t.last_at > bindparam("since"),
        _t.kind == bindparam("kind"),
        _GUESS,
    )
    .scalar_subquery()
)


def _look(of_network: Any) -> Any:
    """One statement, both of whose parts stay within one index range."""
    return select(
        func.count(distinct(case((_GUESS, _t.guess)))),
        func.count(distinct(case((_GUESS & _HERE, _t.guess)))),
        func.coalesce(func.sum(case((_HERE & _GUESS, _t.attempts), else_=0)), 0),
        func.max(case((_HERE & (_t.guess == KNOWN), _t.last_at))),
        of_network,
        func.max(case((_OWN, 1), else_=0)),
        func.max(case((_OWN & _HERE, 1), else_=0)),
    ).where(
        _t.kind == bindparam("kind"),
        _MINE,
        or_(_t.last_at > bindparam("since"), (_t.guess == KNOWN) & (_t.last_at > bindparam("known_since"))),
    )


_LOOK = _look(_OF_NETWORK)
_LOOK_SHARED = _look(literal_column("0"))
"""What all shared sources have tried together is no measure, and may be many rows."""


async def look(connection: AsyncConnection, tried: Try, now: datetime, window: timedelta) -> Seen:
    values = {
        "kind": tried.kind.value,
        "name": tried.name,
        "hashed": tried.hashed,
        "network": tried.network,
        "guess": tried.guess,
        "since": now - window,
        "known_since": now - KNOWN_LIFETIME,
    }
    row = (await connection.execute(_LOOK_SHARED if tried.shared else _LOOK, values)).one()
    return Seen(
        login=row[0],
        pair=row[1],
        attempts=int(row[2]),
        known_at=row[3],
        network=row[4],
        own_login=row[5] or 0,
        own_pair=row[6] or 0,
    )


def judge(seen: Seen, tried: Try, limits: Limits, *, longest: int) -> int:
    """-1: refused. Else the seconds that the answer is to take, at most `longest`.

    A try that repeats a guess is not slowed for it. It is refused for it: its short hash may stand for another password.
    """
    stranger = is_stranger(seen, tried)
    counted = []
    if tried.name or tried.hashed:
        counted.append((seen.pair, seen.own_pair, limits.login or limits.pair if tried.shared else limits.pair))
        if limits.login is not None and stranger:
            counted.append((seen.login, seen.own_login, limits.login))
    if stranger:
        counted.append((seen.network, seen.own_pair, limits.network))
    if any(count >= limit for count, _, limit in counted):
        return -1
    slow = max((_delay(count - own, limit) for count, own, limit in counted), default=0)
    repeated = 0 if tried.shared else min(seen.attempts // REPEATED, MAX_REPEATED)
    return min(max(slow, repeated), longest)


def is_stranger(seen: Seen, tried: Try) -> bool:
    """It comes from a network from which this login never succeeded."""
    return not tried.shared and seen.known_at is None


def slow_from(limit: int) -> int:
    """The number of guesses from which on answers are slowed."""
    return max(1, round(limit * SLOW_FROM))


def _delay(count: int, limit: int) -> int:
    """1, 2, 4, 8, … seconds from the share of the limit on that `SLOW_FROM` is."""
    steps = count - slow_from(limit)
    return int(2 ** min(steps, 10)) if steps >= 0 else 0


async def record(connection: AsyncConnection, tried: Try, now: datetime, window: timedelta) -> None:
    """One more try. A row whose last try lies before the window begins anew."""
    name = tried.name if await _is_ours(connection, tried) else tried.hashed
    await _upsert(connection, tried, name, tried.guess, now, now - window)


async def note_known(connection: AsyncConnection, tried: Try, now: datetime) -> None:
    await _upsert(connection, tried, tried.name, KNOWN, now, now)


async def _is_ours(connection: AsyncConnection, tried: Try) -> bool:
    if tried.kind is FailureKind.API:
        query = select(principals.c.id).where(principals.c.id == tried.name)
    else:
        query = select(addresses.c.address).where(addresses.c.address == tried.name)
    return (await connection.execute(query)).first() is not None


async def _upsert(
    connection: AsyncConnection, tried: Try, login: str, guess: str, now: datetime, since: datetime
) -> None:
    values = {
        "kind": tried.kind.value,
        "login": login,
        "network": tried.network,
        "guess": guess,
        "attempts": 1,
        "first_at": now,
        "last_at": now,
    }
    lapsed = _t.last_at <= since
    # In this order: MariaDB reads a column that it has set already as it is then.
    anew = [
        ("attempts", case((lapsed, 1), else_=_t.attempts + 1)),
        ("first_at", case((lapsed, now), else_=_t.first_at)),
        ("last_at", now),
    ]
    if connection.dialect.name == "sqlite":
        on_sqlite = sqlite.insert(login_failures).values(values)
        key = ["kind", "login", "network", "guess"]
        await connection.execute(on_sqlite.on_conflict_do_update(index_elements=key, set_=dict(anew)))
    else:
        await connection.execute(mysql.insert(login_failures).values(values).on_duplicate_key_update(anew))


async def refused_for(connection: AsyncConnection, tried: Try, now: datetime, window: timedelta) -> int:
    """Seconds until the first of the guesses that this try is refused for is no longer counted; at least 1."""
    mine = [_t.login.in_([tried.name, tried.hashed])]
    here = [_t.network == tried.network]
    oldest = (
        select(func.min(_t.last_at))
        .where(_t.kind == tried.kind.value, _t.guess != KNOWN, _t.last_at > now - window)
        .where(or_(*mine, *here) if not tried.shared else mine[0])
    )
    at = (await connection.execute(oldest)).scalar()
    return max(1, int((at + window - now).total_seconds()) + 1) if at is not None else 1


async def forget_try(connection: AsyncConnection, tried: Try) -> None:
    """What `record` has written, of a guess that nobody else makes."""
    mine = (_t.kind == tried.kind.value) & _t.login.in_([tried.name, tried.hashed]) & (_t.guess == tried.guess)
    await connection.execute(delete(login_failures).where(mine, _t.network == tried.network))


async def forget_guesses(connection: AsyncConnection, address: str, network: str) -> None:
    """Whoever has just shown that the account is theirs is not refused for having tried what they had forgotten."""
    theirs = (_t.kind == FailureKind.MAIL.value) & (_t.login == address) & (_t.network == network) & (_t.guess != KNOWN)
    await connection.execute(delete(login_failures).where(theirs))


async def forget_login(connection: AsyncConnection, address: str) -> None:
    """The address is somebody else's from now on: neither guesses at a predecessor count, nor where that one signed in."""
    kinds = (FailureKind.MAIL.value, FailureKind.RESET.value)
    await connection.execute(delete(login_failures).where(_t.kind.in_(kinds), _t.login == address))


def lapsed(now: datetime) -> ColumnElement[bool]:
    """Of rows that nothing asks for any more."""
    return or_(_t.last_at < now - KNOWN_LIFETIME, (_t.guess != KNOWN) & (_t.last_at < now - FAILURE_LIFETIME))


async def primary_domain(connection: AsyncConnection) -> str | None:
    """It never changes, once there is one."""
    name: str | None = (await connection.execute(select(domains.c.name).where(domains.c.primary_slot == 1))).scalar()
    return name


async def note_app_password_use(
    connection: AsyncConnection, app_password_id: int, now: datetime, client_address: str
) -> None:
    """At most once a minute, so that a busy program costs no write each time."""
    await connection.execute(
        update(app_passwords)
        .where(
            app_passwords.c.id == app_password_id,
            app_passwords.c.last_used_at.is_(None) | (app_passwords.c.last_used_at <= now - timedelta(minutes=1)),
        )
        .values(last_used_at=now, last_used_from=client_address)
    )
