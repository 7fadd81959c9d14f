"""When each SMTP connection of a user began.

A session that has signed in stays signed in, whatever becomes of the password. So Postfix asks here as soon as somebody
connects, and what began before the login's access was ended sends nothing more. Postfix never tells that one has closed.
"""

from collections import OrderedDict
from collections.abc import Callable

from app.log import log
from app.workers.policy.rows import Login

MAX_CONNECTIONS = 50_000
"""More than Postfix holds open at once. Whoever is forgotten has to connect again."""
SET_BACK_SECONDS = 0.5
"""By which the clock must fall behind to count as set back; less may lie between our two looks at it."""

ATTRIBUTES = (b"client_address", b"client_port", b"server_address", b"server_port")
"""All four: a client may come to 465 from the very port that it holds a session on 587 with."""


class Connections:
    """In memory: a restart forgets all. `clock` gives seconds since 1970, and must be the clock that the worker of this host
    takes `flushed_at` from; `steady` is one that nobody sets."""

    def __init__(self, clock: Callable[[], float], steady: Callable[[], float]) -> None:
        self._clock = clock
        self._steady = steady
        self._ahead = clock() - steady()
        # The one that was asked about longest ago first.
        self._began: OrderedDict[tuple[bytes, ...], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._began)

    def note(self, attributes: dict[bytes, bytes]) -> None:
        """That this one begins now. Its four are used again after it has closed."""
        now = self._now()
        key = _key(attributes)
        if key is None:
            return
        self._began[key] = now
        self._began.move_to_end(key)
        if len(self._began) > MAX_CONNECTIONS:
            self._began.popitem(last=False)

    def why_not(self, attributes: dict[bytes, bytes], login: Login) -> str | None:
        """Why the login may not send over this connection, in two words for the log; None when it may."""
        now = self._now()
        key = _key(attributes)
        began = None if key is None else self._began.get(key)
        if key is None or began is None:
            return "unknown connection"
        self._began.move_to_end(key)
        if login.access_ended_at is None:
            return None
        if login.ended_at != login.access_ended_at or login.flushed_at is None:
            return "ending now"
        flushed = login.flushed_at.timestamp()
        # A moment to come is of a clock that was set back since: whatever is still known here began after that.
        return None if began > flushed or flushed > now + SET_BACK_SECONDS else "older session"

    def _now(self) -> float:
        """Forgets all when the clock was set back: an old connection would seem to be younger than it is."""
        now = self._clock()
        ahead = now - self._steady()
        if ahead < self._ahead - SET_BACK_SECONDS:
            log.warning("clock_set_back", seconds=round(self._ahead - ahead, 1), forgotten=len(self._began))
            self._began.clear()
        self._ahead = ahead
        return now


def _key(attributes: dict[bytes, bytes]) -> tuple[bytes, ...] | None:
    """None for a client that cannot be told apart: Postfix has `unknown` for an address and 0 or `unknown` for a port then."""
    key = tuple(attributes.get(name, b"") for name in ATTRIBUTES)
    known = key[0] not in (b"", b"unknown") and key[1].isdigit() and int(key[1]) > 0 and all(key)
    return key if known else None
