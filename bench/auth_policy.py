"""Dovecot's questions about logins: how many a core answers with 100,000 wrong passwords on record, all within the window.

A login is three requests: before the password, after it, and the report. The owners have signed in from their networks
before, and each login and each network on record has twenty wrong guesses, so every question counts some.
"""

import json
from dataclasses import dataclass

from bench.load import Load
from bench.system import POLICY_KEY, Api, System

FAILURES = 100_000
OWNERS = 2_000
AT_ONCE = 50

_FILL = """
TRUNCATE login_failures;
SET @now = UTC_TIMESTAMP(6);
INSERT INTO login_failures (kind, login, network, guess, attempts, first_at, last_at)
  SELECT 'mail', CONCAT('user', seq % 5000 + 1, '@cacert.test'),
    CONCAT('10.', (seq DIV 20) DIV 250, '.', (seq DIV 20) % 250, '.1/32'),
    LOWER(HEX(seq)), 3, @now, @now FROM seq_1_to_{failures};
INSERT INTO login_failures (kind, login, network, guess, attempts, first_at, last_at)
  SELECT 'mail', CONCAT('user', seq, '@cacert.test'), CONCAT('172.16.', seq DIV 250, '.', seq % 250, '/32'), 'known', 1,
    @now, @now FROM seq_1_to_{owners};
ANALYZE TABLE login_failures;
"""


@dataclass(frozen=True)
class AuthPolicy:
    rate: float
    """Answers a second, of owners who sign in: three to a login."""
    cpu: float
    """Microseconds of the API's CPU for each."""
    guesses: float
    """Answers a second when each password is wrong, half of which are reports: each a durable commit."""


def measure_auth_policy(system: System, seconds: float) -> AuthPolicy:
    system.mariadb.sql(_FILL.format(failures=FAILURES, owners=OWNERS), "owner")
    with system.api() as api:
        logins = [_login(api, number) for number in range(1, OWNERS + 1)]
        # So many at once that a login's first question has been answered before its second is asked.
        groups = [logins[start : start + AT_ONCE] for start in range(0, OWNERS, AT_ONCE)]
        owners = [login[step] for group in groups for step in range(3) for login in group]
        signed_in = Load(api.port, owners, seconds, pids={"api": api.pid}).run().only(200)
        # No network is refused meanwhile, since none tries often enough.
        wrong = [request for number in range(4000) for request in _guess(api, number)]
        guessed = Load(api.port, wrong, seconds).run().only(200)
    return AuthPolicy(signed_in.rate, signed_in.cpu_each("api"), guessed.rate)


def _login(api: Api, number: int) -> list[bytes]:
    said = _said(f"user{number}@cacert.test", f"172.16.{number // 250}.{number % 250}", "abc")
    report = {**said, "success": True, "policy_reject": False}
    return [_ask(api, "allow", said), _ask(api, "allow", said), _ask(api, "report", report)]


def _guess(api: Api, number: int) -> list[bytes]:
    said = _said(f"user{number % 1000}@cacert.test", f"192.168.{number // 250}.{number % 250}", f"{number:03x}")
    return [_ask(api, "allow", said), _ask(api, "report", {**said, "success": False, "policy_reject": False})]


def _said(login: str, remote: str, guess: str) -> dict[str, object]:
    """As Dovecot writes it."""
    return {
        "app_password_id": "",
        "device_id": "",
        "login": login,
        "protocol": "imap",
        "pwhash": guess,
        "remote": remote,
        "session_id": "8KjEWfpgx7V/AAAB",
        "tls": True,
    }


def _ask(api: Api, command: str, said: dict[str, object]) -> bytes:
    body = json.dumps(said).encode()
    lines = [
        f"POST /dovecot/auth-policy?command={command} HTTP/1.1",
        f"Host: 127.0.0.1:{api.port}",
        "User-Agent: dovecot/auth-policy-client",
        f"X-API-Key: {POLICY_KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
