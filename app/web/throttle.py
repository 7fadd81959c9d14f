"""What slows guessing down: asked before a password or secret is looked at, and told of each wrong one.

One for each process. The counts are in the database; in memory is only what is on its way right now, so that a thousand
connections at once are not a thousand guesses before the first is recorded.
"""

import asyncio
import random
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any, NamedTuple

from sqlalchemy.exc import DBAPIError

from app.config import ApiSettings
from app.db import Clock, Database, is_busy
from app.errors import TooManyTries
from app.log import log
from app.models.login_failures import FailureKind
from app.services import login_failures as failures
from app.services.login_failures import Limits, Seen, Try

_TRIES = 3
_IN_FLIGHT = timedelta(seconds=60)
"""After that a login that Dovecot never reported about counts no longer."""
_FRESH = timedelta(seconds=1)
"""How long what was read for the first question serves for the second one."""
_NOTED = 20_000
"""Logins and networks of which one process remembers something."""
_KNOWN_AGAIN = timedelta(days=1)
_USED_AGAIN = timedelta(minutes=1)


class _Flight(NamedTuple):
    """A password that Dovecot is looking at."""

    at: datetime
    recorded: int
    """How many guesses this process had recorded when `seen` was read."""
    seen: Seen


class Throttle:
    def __init__(self, database: Database, settings: ApiSettings, key: bytes, clock: Clock) -> None:
        self._database = database
        self._key = key
        self._clock = clock
        self.window = timedelta(minutes=settings.failure_window_minutes)
        self._shared = settings.shared_networks
        self._longest = settings.tarpit_seconds
        pair, network, login = settings.guesses_per_pair, settings.guesses_per_network, settings.guesses_per_login
        self.limits = {
            FailureKind.MAIL: Limits(pair, network, login),
            # Their secrets cannot be guessed. A limit for all networks together would only shut clients out.
            FailureKind.API: Limits(pair, network, None),
            FailureKind.RESET: Limits(settings.resets_per_account, network, settings.resets_per_account),
        }
        self._primary_domain: str | None = None
        self._flights: OrderedDict[tuple[str, str, str], _Flight] = OrderedDict()
        self._flying: dict[str, set[tuple[str, str]]] = {}
        self._recorded = 0
        """Guesses that this process has recorded."""
        self._counted: OrderedDict[str, int] = OrderedDict()
        """Which of them was the last one at a login, or from a network."""
        self._known: OrderedDict[tuple[str, str], datetime] = OrderedDict()
        self._used: OrderedDict[int, datetime] = OrderedDict()

    def network_of(self, client_address: str) -> str:
        """By what tries from there are counted."""
        return failures.network_of(client_address, self._shared)

    async def check(self, kind: FailureKind, login: str, client_address: str) -> None:
        """Raises TooManyTries when a try would be refused. `login` is an address or a client id; empty: nobody is named, and
        the network alone counts. `client_address` empty, or a shared source: the login alone counts."""
        tried = await self._try(kind, login, client_address, "")
        now = self._clock()
        seen = await self._database.reading(failures.look, tried, now, self.window)
        if failures.judge(seen, tried, self.limits[kind], longest=self._longest) < 0:
            seconds = await self._database.reading(failures.refused_for, tried, now, self.window)
            # For fail2ban too, so no name in it: it may be a password in the wrong field.
            log.warning("too_many_tries", kind=kind.value, client_address=_plain(client_address))
            raise TooManyTries("There were too many tries. Wait before the next one.", retry_after=seconds)

    async def failed(self, kind: FailureKind, login: str, client_address: str, guess: str) -> None:
        """Records a wrong password or secret, of which a short hash is kept, in a transaction of its own.

        Of the kind `reset` each call counts, whatever the guess: also a request that is right.
        """
        hashed = secrets.token_hex(8) if kind is FailureKind.RESET else failures.guess_of(self._key, login, guess)
        await self._record(await self._try(kind, login, client_address, hashed))
        if kind is not FailureKind.RESET:
            log.warning("wrong_credentials", kind=kind.value, client_address=_plain(client_address))

    async def wrong(self, kind: FailureKind, login: str, client_address: str, guess: str) -> None:
        """Both, for whoever has looked already: raises TooManyTries, or else records it."""
        await self.check(kind, login, client_address)
        await self.failed(kind, login, client_address, guess)

    async def allow(self, login: str, client_address: str, guess: str) -> int:
        """Dovecot asks before and after it looks at a password: 0, the seconds to wait, or -1 to refuse."""
        tried = await self._try(FailureKind.MAIL, login, client_address, self._guess(login, guess))
        now = self._clock()
        name = tried.name or tried.hashed
        flight = self._recent_flight(name, tried, now)
        while flight is None or self._guessed_since(flight, name, tried):
            # Another guess that is recorded while we read has landed, and may not be in what we read.
            recorded = self._recorded
            flight = _Flight(now, recorded, await self._database.reading(failures.look, tried, now, self.window))
            self._note_known(name, tried, flight.seen)
        seen = self._with_flights(flight.seen, tried, name, now)
        status = failures.judge(seen, tried, self.limits[FailureKind.MAIL], longest=self._longest)
        if status >= 0:
            self._fly(name, tried, flight)
        else:
            log.warning("login_refused", client_address=_plain(client_address))
        return status

    async def report(
        self, login: str, client_address: str, guess: str, *, success: bool, rejected: bool, app_password_id: int | None
    ) -> None:
        """Dovecot says how it ended. What we ourselves refused does not count again."""
        tried = await self._try(FailureKind.MAIL, login, client_address, self._guess(login, guess))
        name = tried.name or tried.hashed
        now = self._clock()
        try:
            if not success and not rejected:
                await self._record(tried)
        finally:  # and not before: there is no moment at which a guess counts neither as on its way nor as recorded
            self._land(name, tried)
        if not success or rejected:
            return
        key = (name, tried.network)
        noted = self._known.get(key)
        if tried.name and not tried.shared and (noted is None or now - noted > _KNOWN_AGAIN):
            await self._once(failures.note_known, tried, now)
            self._remember(self._known, key, now, _NOTED)
        if app_password_id is not None:
            used = self._used.get(app_password_id)
            if used is None or now - used >= _USED_AGAIN:
                self._remember(self._used, app_password_id, now, _NOTED)
                await self._once(failures.note_app_password_use, app_password_id, now, _plain(client_address))

    async def _try(self, kind: FailureKind, login: str, client_address: str, guess: str) -> Try:
        if self._primary_domain is None and kind is not FailureKind.API:
            self._primary_domain = await self._database.reading(failures.primary_domain)
        name = failures.name_of(kind, login, self._primary_domain or "")
        # Of the one form, if there is one: whether it is ours is found out only when it is recorded.
        text = name or login
        hashed = "~" + failures.keyed_hash(self._key, "login", text, digits=32) if text else ""
        return Try(kind, name, hashed, self.network_of(client_address), guess)

    def _guess(self, login: str, text: str) -> str:
        """Dovecot's own hash, as long as it is one."""
        return text if failures.is_guess(text) else failures.guess_of(self._key, login, text)

    def _recent_flight(self, name: str, tried: Try, now: datetime) -> "_Flight | None":
        """What was read when Dovecot asked the first time, unless that was a while ago.

        What other processes recorded meanwhile is missed; it was as good as on its way.
        """
        flight = self._flights.get((name, tried.network, tried.guess))
        return None if flight is None or now - flight.at > _FRESH else flight

    def _guessed_since(self, flight: "_Flight", name: str, tried: Try) -> bool:
        return any(self._counted.get(each, 0) > flight.recorded for each in (name, tried.network))

    def _note_known(self, name: str, tried: Try, seen: Seen) -> None:
        if seen.known_at is None:
            self._known.pop((name, tried.network), None)
        else:
            self._remember(self._known, (name, tried.network), seen.known_at, _NOTED)

    def _with_flights(self, seen: Seen, tried: Try, name: str, now: datetime) -> Seen:
        """As if each password that is being looked at right now were wrong."""
        while self._flights and (first := next(iter(self._flights.items())))[1].at + _IN_FLIGHT <= now:
            self._forget(*first[0])
        flying = [where for where in self._flying.get(name, ()) if where[1] != tried.guess]
        if not flying:
            return seen
        here = sum(network == tried.network for network, _ in flying)
        return Seen(seen.login + len(flying), seen.pair + here, seen.network, seen.attempts, seen.known_at)

    def _fly(self, name: str, tried: Try, flight: _Flight) -> None:
        self._flights[name, tried.network, tried.guess] = flight
        self._flights.move_to_end((name, tried.network, tried.guess))
        self._flying.setdefault(name, set()).add((tried.network, tried.guess))

    def _land(self, name: str, tried: Try) -> None:
        if (name, tried.network, tried.guess) in self._flights:
            self._forget(name, tried.network, tried.guess)

    def _forget(self, name: str, network: str, guess: str) -> None:
        del self._flights[name, network, guess]
        flying = self._flying[name]
        flying.remove((network, guess))
        if not flying:
            del self._flying[name]

    @staticmethod
    def _remember(where: "OrderedDict[Any, Any]", key: Any, at: Any, at_most: int) -> None:
        where[key] = at
        where.move_to_end(key)
        if len(where) > at_most:
            where.popitem(last=False)

    async def _record(self, tried: Try) -> None:
        now = self._clock()
        await self._once(failures.record, tried, now, self.window)
        self._recorded += 1
        for each in (tried.name or tried.hashed, tried.network):
            self._remember(self._counted, each, self._recorded, _NOTED)

    async def _once(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """In a transaction of its own, which is tried again when another one was in the way."""
        for attempt in range(1, _TRIES + 1):
            try:
                async with self._database.write.begin() as connection:
                    await function(connection, *args)
                return
            except DBAPIError as error:
                if not is_busy(error) or attempt == _TRIES:
                    raise
                await asyncio.sleep(random.random() * 0.02 * attempt)  # noqa: S311  spreads retries, guards nothing


def _plain(client_address: str) -> str:
    """An address and nothing else: what a proxy passes on may be anything."""
    try:
        return str(ip_address(client_address))
    except ValueError:
        return ""
