"""What slows guessing down: asked before a password or secret is looked at, and told of each wrong one.

One for each process. The counts are in the database; in memory is only what is on its way right now, so that a thousand
connections at once are not a thousand guesses before the first is recorded.
"""

import asyncio
import random
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any, NamedTuple, Never

from sqlalchemy.exc import DBAPIError

from app.config import ApiSettings
from app.db import Clock, Database, is_busy
from app.errors import LinkNotValid, TooManyTries, Unauthenticated, WrongPassword
from app.log import log
from app.models.login_failures import FailureKind
from app.services import login_failures as failures
from app.services.login_failures import Limits, Seen, Try

WRONG = (LinkNotValid, Unauthenticated, WrongPassword)

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
    """A password that is being looked at."""

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
        """By who is tried: from where, and which guess."""
        self._flying_from: dict[str, set[tuple[str, str]]] = {}
        """By where strangers come from: who is tried, and which guess."""
        self._recorded = 0
        """Guesses that this process has recorded."""
        self._counted: OrderedDict[str, int] = OrderedDict()
        """Which of them was the last one at a login, or from a network."""
        self._known: OrderedDict[tuple[str, str], datetime] = OrderedDict()
        self._used: OrderedDict[int, datetime] = OrderedDict()

    def network_of(self, client_address: str) -> str:
        """By what tries from there are counted."""
        return failures.network_of(client_address, self._shared)

    @asynccontextmanager
    async def guessing(self, kind: FailureKind, login: str, client_address: str, guess: str) -> AsyncIterator[None]:
        """Stands around the look at a password, a secret or a token. What is raised inside of WRONG is a wrong guess, and is
        recorded as one, by a short hash of `guess`.

        `login` is an address or a client id; empty: nobody is named, and the network alone counts. `client_address` empty, or
        a shared source: the login alone counts. Raises TooManyTries, and then nothing is to be looked at.
        """
        tried = await self._try(kind, login, client_address, failures.guess_of(self._key, login, guess))
        now = self._clock()
        flight = await self._look(tried, now, None)
        if self._judge(tried, flight, now) < 0:
            await self._refuse(tried, client_address, now)
        try:
            yield
        except WRONG:
            await self._record(tried)
            log.warning("wrong_credentials", kind=kind.value, client_address=_plain(client_address))
            raise
        finally:  # and not before: there is no moment at which a guess counts neither as on its way nor as recorded
            self._land(tried)

    async def count_request(self, login: str) -> None:
        """One more link is asked for. Raises TooManyTries at one too many, which then does not count.

        It is written down before it is judged: of many at one moment, in whatever process, each sees those that passed.
        """
        tried = await self._try(FailureKind.RESET, login, "", secrets.token_hex(8))
        now = self._clock()
        await self._record(tried)
        seen = await self._database.reading(failures.look, tried, now, self.window)
        if seen.pair > self.limits[FailureKind.RESET].pair:
            await self._once(failures.forget_try, tried)
            await self._refuse(tried, "", now)

    async def _refuse(self, tried: Try, client_address: str, now: datetime) -> Never:
        seconds = await self._database.reading(failures.refused_for, tried, now, self.window)
        # For fail2ban too, so no name in it: it may be a password in the wrong field.
        log.warning("too_many_tries", kind=tried.kind.value, client_address=_plain(client_address))
        raise TooManyTries("There were too many tries. Wait before the next one.", retry_after=seconds)

    async def allow(self, login: str, client_address: str, guess: str) -> int:
        """Dovecot asks before and after it looks at a password: 0, the seconds to wait, or -1 to refuse."""
        tried = await self._try(FailureKind.MAIL, login, client_address, self._guess(login, guess))
        now = self._clock()
        flight = await self._look(tried, now, self._recent_flight(tried, now))
        self._note_known(tried, flight.seen)
        status = self._judge(tried, flight, now)
        if status < 0:
            log.warning("login_refused", client_address=_plain(client_address))
        return status

    async def _look(self, tried: Try, now: datetime, flight: "_Flight | None") -> "_Flight":
        while flight is None or any(self._counted.get(each, 0) > flight.recorded for each in (tried.who, tried.where)):
            # Another guess that is recorded while we read has landed, and may not be in what we read.
            recorded = self._recorded
            flight = _Flight(now, recorded, await self._database.reading(failures.look, tried, now, self.window))
        return flight

    def _judge(self, tried: Try, flight: "_Flight", now: datetime) -> int:
        """What is not refused is on its way from here on."""
        seen = self._with_flights(flight.seen, tried, now)
        status = failures.judge(seen, tried, self.limits[tried.kind], longest=self._longest)
        if status >= 0:
            self._fly(tried, flight)
        return status

    async def report(
        self, login: str, client_address: str, guess: str, *, success: bool, rejected: bool, app_password_id: int | None
    ) -> None:
        """Dovecot says how it ended. What we ourselves refused does not count again."""
        tried = await self._try(FailureKind.MAIL, login, client_address, self._guess(login, guess))
        now = self._clock()
        try:
            if not success and not rejected:
                await self._record(tried)
        finally:  # and not before: there is no moment at which a guess counts neither as on its way nor as recorded
            self._land(tried)
        if not success or rejected:
            return
        key = (tried.who, tried.network)
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

    def _recent_flight(self, tried: Try, now: datetime) -> "_Flight | None":
        """What was read when Dovecot asked the first time, unless that was a while ago.

        What other processes recorded meanwhile is missed; it was as good as on its way.
        """
        flight = self._flights.get((tried.who, tried.where, tried.guess))
        return None if flight is None or now - flight.at > _FRESH else flight

    def _note_known(self, tried: Try, seen: Seen) -> None:
        if seen.known_at is None:
            self._known.pop((tried.who, tried.network), None)
        else:
            self._remember(self._known, (tried.who, tried.network), seen.known_at, _NOTED)

    def _with_flights(self, seen: Seen, tried: Try, now: datetime) -> Seen:
        """As if each password that is being looked at right now were wrong."""
        while self._flights and (first := next(iter(self._flights.items())))[1].at + _IN_FLIGHT <= now:
            self._forget(first[0])
        here = self._flying_from.get(tried.where, ())
        flying = [where for where, guess in self._flying.get(tried.who, ()) if guess != tried.guess]
        return replace(
            seen,
            login=seen.login + len(flying),
            pair=seen.pair + flying.count(tried.where),
            network=seen.network + len(here) - ((tried.who, tried.guess) in here),
        )

    def _fly(self, tried: Try, flight: _Flight) -> None:
        key = (tried.who, tried.where, tried.guess)
        self._flights[key] = flight
        self._flights.move_to_end(key)
        self._flying.setdefault(tried.who, set()).add((tried.where, tried.guess))
        if failures.is_stranger(flight.seen, tried):  # many who are known from an office are no measure of it
            self._flying_from.setdefault(tried.where, set()).add((tried.who, tried.guess))

    def _land(self, tried: Try) -> None:
        key = (tried.who, tried.where, tried.guess)
        if key in self._flights:
            self._forget(key)

    def _forget(self, key: tuple[str, str, str]) -> None:
        who, where, guess = key
        del self._flights[key]
        for flying, of, what in ((self._flying, who, (where, guess)), (self._flying_from, where, (who, guess))):
            there = flying.get(of, set())
            there.discard(what)
            if not there:
                flying.pop(of, None)

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
        for each in (tried.who, tried.where):
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
