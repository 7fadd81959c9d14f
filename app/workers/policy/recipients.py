"""Postfix's questions about each step of a user's message, and how many recipients a login had within an hour.

The protocol is that of SMTPD_POLICY_README: lines `name=value`, an empty line, and an answer `action=…` as in access(5).
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from app.errors import Unavailable
from app.log import log
from app.workers.policy.connections import Connections
from app.workers.policy.rows import Rows

MINUTES = 60
MAX_ANSWERED = 100_000

PASS = "DUNNO"  # noqa: S105  a word of access(5): the next restriction decides
# Numbers and not DEFER or DEFER_IF_PERMIT, which become 450 whatever the cause, or REJECT, which becomes 554. 451 is "local
# error in processing".
AWAY = "451 4.3.0 This server cannot look up your account now. Your message was not sent; try again in a minute."
BEGINNINGS = (b"CONNECT", b"XCLIENT")
"""States in which nobody has signed in. With XCLIENT a proxy that Postfix trusts says who connects; then it begins anew."""
NOT_ALLOWED = "550 5.7.1 This account may not send mail. Ask the administrators of your mail server."
# After 421 Postfix closes the connection. The mailbox program tries again, and is asked for the new password then.
SIGN_IN_AGAIN = "421 4.7.0 This session has ended: your access was changed, or this server restarted. Sign in again."


class BadQuestion(Exception):
    """Not what Postfix would ask."""


class Refusal(NamedTuple):
    minutes: int
    """Until the next recipient is taken."""
    first: bool
    """Whether it is this minute's first refusal of this login: for the log."""


class Recipients:
    """Counts recipients by login over the last sixty minutes, in sixty buckets of a minute each; a recipient falls out with
    its minute, after 59 to 60 of them.

    In memory: a restart forgets, and each mail host counts for itself. It stays small: only names that are accounts get here,
    one without a recipient in the last hour is dropped, and of answered questions only the last `MAX_ANSWERED` are known.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # By login, the one that was counted longest ago first: minute and recipients, the oldest minute first.
        self._sent: OrderedDict[str, deque[list[int]]] = OrderedDict()
        self._answered: OrderedDict[int, None] = OrderedDict()
        self._refused: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def take(self, login: str, limit: int, question: tuple[bytes, bytes] | None) -> Refusal | None:
        """Counts one recipient, or says why not. A refused one is not counted: who waits gets through.

        `question` is instance and recipient. Postfix asks about the same two again when several restrictions ask us, when a
        client names a recipient twice, and when it lost our answer: that counts once, and is answered as before.
        """
        minute = int(self._clock() // 60)
        key = hash((login, question))
        if question and key in self._answered:
            return None
        sent = self._forget(minute, login)
        excess = sum(count for _, count in sent) + 1 - limit
        if excess > 0:
            first = self._refused.get(login) != minute
            self._refused[login] = minute
            return Refusal(_wait(sent, excess, minute), first)
        if not sent or sent[-1][0] != minute:
            sent.append([minute, 0])
        sent[-1][1] += 1
        self._sent[login] = sent
        self._sent.move_to_end(login)
        if question:
            self._answered[key] = None
            if len(self._answered) > MAX_ANSWERED:
                self._answered.popitem(last=False)
        return None

    def _forget(self, minute: int, login: str) -> deque[list[int]]:
        """What the login sent in the last hour. Whoever sent nothing for an hour is dropped on the way."""
        while self._sent and next(iter(self._sent.values()))[-1][0] <= minute - MINUTES:
            name, _ = self._sent.popitem(last=False)
            self._refused.pop(name, None)
        sent = self._sent.get(login, deque())
        while sent and sent[0][0] <= minute - MINUTES:
            sent.popleft()
        return sent


def _wait(sent: deque[list[int]], excess: int, minute: int) -> int:
    """Minutes until so many of the recipients have fallen out."""
    for then, count in sent:
        excess -= count
        if excess <= 0:
            return then + MINUTES - minute
    return MINUTES


def parse_question(request: bytes) -> dict[bytes, bytes]:
    """The attributes of a request, without its last empty line. Raises BadQuestion."""
    attributes = {}
    for line in request.split(b"\n"):
        name, equals, value = line.partition(b"=")
        if not (name and equals):
            raise BadQuestion("a line without an attribute")
        attributes[name] = value
    if attributes.get(b"request") != b"smtpd_access_policy":
        raise BadQuestion("no request=smtpd_access_policy")
    return attributes


async def answer_question(
    attributes: dict[bytes, bytes],
    rows: Rows,
    connections: Connections,
    recipients: Recipients,
    recipients_per_hour: int,
) -> str:
    """An action of access(5).

    A connection that begins is only noted. From then on it has to be an account that may send, over a connection
    that began after its access was last ended.

    A recipient that Postfix asks about is counted, whatever becomes of it: a stolen account that writes to guessed addresses
    is to be stopped too. (Postfix asks last, so what its other restrictions refuse is not asked about.)
    """
    if attributes.get(b"protocol_state") in BEGINNINGS:
        connections.note(attributes)
        return PASS
    login = attributes.get(b"sasl_username", b"").decode("latin-1").lower()
    if not login:
        return PASS
    try:
        row = await rows.login(login)
    except Unavailable:
        return AWAY
    if row is None:
        return NOT_ALLOWED
    ended = connections.why_not(attributes, row)
    if ended is not None:
        log.info("session_ended", login=login, why=ended)
        return SIGN_IN_AGAIN
    limit = recipients_per_hour if row.send_limit is None else row.send_limit
    if limit <= 0:
        return NOT_ALLOWED
    if attributes.get(b"protocol_state") != b"RCPT":
        return PASS
    instance = attributes.get(b"instance")
    refusal = recipients.take(login, limit, (instance, attributes.get(b"recipient", b"")) if instance else None)
    if refusal is None:
        return PASS
    if refusal.first:
        log.warning("send_limit_reached", login=login, limit=limit)
    # 450: the mailbox program keeps the message and tries again, or shows the text. Not 452, on which some programs go on with
    # the rest of the recipients at once, and not 5xx, which ends in a bounce.
    when = "a minute" if refusal.minutes == 1 else f"{refusal.minutes} minutes"
    people = "1 recipient" if limit == 1 else f"{limit} recipients"
    return f"450 4.7.1 You may write to {people} an hour, and have. Try again in {when}."
