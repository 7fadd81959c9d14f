"""Which SMTP connections are older than the moment at which a login's access was ended."""

import random
from datetime import UTC, datetime, timedelta

import pytest

from app.workers.policy import connections as module
from app.workers.policy.connections import Connections
from app.workers.policy.rows import Login

ENDED = datetime(2026, 11, 24, 10, 0, 0, 1, tzinfo=UTC)
NEVER = Login(None)

UNKNOWN, OLDER, NOW = "unknown connection", "older session", "ending now"


class Time:
    """Two clocks: one that people set, and one that they cannot."""

    def __init__(self) -> None:
        self.wall = ENDED.timestamp()
        self.steady = 5000.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def flushed(self) -> Login:
        """Access that this host ends now."""
        return Login(None, ENDED, ENDED, datetime.fromtimestamp(self.wall, UTC))


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def connections(time: Time) -> Connections:
    return Connections(lambda: time.wall, lambda: time.steady)


def asked(
    port: int | str = 40302, address: str = "127.0.0.5", server: str = "127.0.0.1", to: int | str = 587
) -> dict[bytes, bytes]:
    given = {"client_address": address, "client_port": str(port), "server_address": server, "server_port": str(to)}
    return {name.encode(): value.encode() for name, value in given.items()}


def test_only_what_began_after_the_flush(connections: Connections, time: Time) -> None:
    connections.note(asked(1))
    assert connections.why_not(asked(1), NEVER) is None
    time.pass_(0.001)
    login = time.flushed()
    connections.note(asked(2))
    assert connections.why_not(asked(2), login) == OLDER, "at the same moment is not after"
    time.pass_(0.001)
    connections.note(asked(3))
    for _ in range(2):
        assert [connections.why_not(asked(port), login) for port in (1, 2, 3, 4)] == [OLDER, OLDER, None, UNKNOWN]
        time.pass_(86400)


def test_the_same_four_again_are_a_new_connection(connections: Connections, time: Time) -> None:
    connections.note(asked(1))
    login = time.flushed()
    time.pass_(1)
    connections.note(asked(1))
    assert connections.why_not(asked(1), login) is None


@pytest.mark.parametrize("other", [{"port": 2}, {"address": "2001:db8::1"}, {"server": "127.0.0.2"}, {"to": 465}])
def test_another_in_any_of_the_four_is_another(connections: Connections, time: Time, other: dict[str, str]) -> None:
    connections.note(asked(1))
    login = time.flushed()
    time.pass_(1)
    different = asked(**{"port": 1, **other})  # type: ignore[arg-type]  # mixed on purpose
    assert connections.why_not(different, NEVER) == UNKNOWN
    connections.note(different)
    assert connections.why_not(different, login) is None
    assert connections.why_not(asked(1), login) == OLDER


@pytest.mark.parametrize(
    "which",
    [
        {},
        asked("0"),
        asked("unknown"),
        asked(""),
        asked("-1"),
        asked("²"),
        asked(address="unknown"),
        asked(address=""),
        asked(server=""),
        asked(to=""),
    ],
)
def test_who_cannot_be_told_apart_is_unknown(connections: Connections, which: dict[bytes, bytes]) -> None:
    connections.note(which)
    assert len(connections) == 0
    assert connections.why_not(which, NEVER) == UNKNOWN


def test_until_the_host_has_carried_it_out(connections: Connections, time: Time) -> None:
    connections.note(asked())
    earlier = ENDED - timedelta(days=1)
    for login in (
        Login(None, ENDED),
        Login(None, ENDED, earlier, earlier),
        Login(None, ENDED, ENDED + timedelta(microseconds=1), earlier),
        Login(None, ENDED, ENDED, None),
        Login(None, ENDED, None, earlier),
    ):
        assert connections.why_not(asked(), login) == NOW
    assert connections.why_not(asked(), Login(None, ENDED, ENDED, earlier)) is None


def test_a_clock_that_is_set_back(connections: Connections, time: Time) -> None:
    """The connection of before must not look younger than a flush of after."""
    connections.note(asked(1))
    time.wall -= 60
    login = time.flushed()
    time.pass_(1)
    assert connections.why_not(asked(1), login) == UNKNOWN
    connections.note(asked(1))
    assert connections.why_not(asked(1), login) is None


def test_a_clock_that_was_ahead_when_it_was_flushed(connections: Connections, time: Time) -> None:
    """Nobody has to wait until that moment comes again."""
    time.wall += 3600
    connections.note(asked(1))
    login = time.flushed()
    time.wall -= 3600
    assert connections.why_not(asked(1), login) == UNKNOWN
    connections.note(asked(2))
    assert connections.why_not(asked(2), login) is None
    # A little is no clock that was set: its connections were not forgotten.
    time.pass_(7200)
    connections.note(asked(3))
    login = time.flushed()
    time.wall -= 0.4
    assert connections.why_not(asked(3), login) == OLDER


def test_a_clock_that_is_set_forward_or_slewed_forgets_nobody(connections: Connections, time: Time) -> None:
    connections.note(asked(1))
    time.wall += 3600
    assert connections.why_not(asked(1), NEVER) is None
    for _ in range(100):  # to the right time, as ntpd does
        time.pass_(100)
        time.wall -= 0.05
        assert connections.why_not(asked(1), NEVER) is None


def test_memory_is_bounded_and_whoever_sends_is_kept(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 10)
    connections.note(asked(1))
    for number in range(2, 1000):
        connections.note(asked(number))
        assert len(connections) <= 10
        assert connections.why_not(asked(1), NEVER) is None
    assert [connections.why_not(asked(number), NEVER) for number in (989, 991, 999)] == [UNKNOWN, None, None]


def test_against_a_plain_model(connections: Connections, time: Time) -> None:
    """Random sessions and resets: over a connection passes exactly what began after the last one."""
    number = random.Random(4)
    began: dict[int, float] = {}
    flushed: float | None = None
    login = NEVER
    for _ in range(3000):
        time.pass_(number.choice((0.0001, 0.1, 5)))
        port = number.randint(1, 30)
        match number.randint(0, 9):
            case 0:
                login, flushed = time.flushed(), time.wall
            case 1 | 2 | 3:
                connections.note(asked(port))
                began[port] = time.wall
        passes = port in began and (flushed is None or began[port] > flushed)
        assert (connections.why_not(asked(port), login) is None) == passes
