"""Counting recipients, with a clock that stands still until it is moved."""

import random

import pytest

from app.workers.policy import recipients as module
from app.workers.policy.recipients import BadQuestion, Recipients, Refusal, parse_question

ANN, BOB = "ann@cacert.test", "bob@cacert.test"


class Minutes:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now * 60


@pytest.fixture
def clock() -> Minutes:
    return Minutes()


@pytest.fixture
def recipients(clock: Minutes) -> Recipients:
    return Recipients(clock)


def test_so_many_an_hour_and_each_login_for_itself(recipients: Recipients) -> None:
    assert [recipients.take(ANN, 3, None) for _ in range(4)] == [None, None, None, Refusal(60, first=True)]
    assert recipients.take(BOB, 3, None) is None


def test_a_recipient_falls_out_with_its_minute(recipients: Recipients, clock: Minutes) -> None:
    for minute in (1000.0, 1020.5, 1059.99):
        clock.now = minute
        assert recipients.take(ANN, 3, None) is None
    assert recipients.take(ANN, 3, None) == Refusal(1, first=True)
    clock.now = 1060
    assert recipients.take(ANN, 3, None) is None
    assert recipients.take(ANN, 3, None) == Refusal(20, first=True)
    clock.now = 1079.9
    assert recipients.take(ANN, 3, None) == Refusal(1, first=True)
    clock.now = 1080
    assert recipients.take(ANN, 3, None) is None


def test_the_wait_that_is_told_is_the_wait(recipients: Recipients, clock: Minutes) -> None:
    """Also after the limit was lowered. Whoever waits gets through: what was refused is not counted."""
    number = random.Random(1)
    for _ in range(300):
        clock.now += number.choice((0, 0, 0.3, 1, 7))
        limit = number.randint(1, 20)
        refusal = recipients.take(ANN, limit, None)
        if refusal is None:
            continue
        begun = int(clock.now)
        for _ in range(5):
            clock.now = begun + refusal.minutes - 0.01
            assert recipients.take(ANN, limit, None) is not None
        clock.now = begun + refusal.minutes
        assert recipients.take(ANN, limit, None) is None


def test_the_same_question_counts_once(recipients: Recipients) -> None:
    for _ in range(3):
        assert recipients.take(ANN, 2, (b"1", b"x@x.test")) is None
    assert recipients.take(ANN, 2, (b"2", b"x@x.test")) is None, "another message"
    assert recipients.take(ANN, 2, (b"2", b"y@x.test")) is not None
    assert recipients.take(ANN, 2, (b"2", b"x@x.test")) is None, "as before, though the hour is full"
    assert recipients.take(BOB, 1, (b"1", b"x@x.test")) is None
    assert recipients.take(BOB, 1, (b"1", b"y@x.test")) is not None, "another login's questions are not ann's"


def test_a_refused_question_is_asked_again_later(recipients: Recipients, clock: Minutes) -> None:
    assert recipients.take(ANN, 1, (b"1", b"x@x.test")) is None
    assert recipients.take(ANN, 1, (b"1", b"y@x.test")) == Refusal(60, first=True)
    assert recipients.take(ANN, 1, (b"1", b"y@x.test")) == Refusal(60, first=False)
    clock.now += 60
    assert recipients.take(ANN, 1, (b"1", b"y@x.test")) is None
    assert recipients.take(ANN, 1, (b"1", b"z@x.test")) == Refusal(60, first=True)


def test_memory_is_bounded(recipients: Recipients, clock: Minutes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWERED", 10)
    for minute in range(200):
        clock.now += 1
        for number in range(5):
            recipients.take(f"u{minute}-{number}@cacert.test", 1, (b"%d" % minute, b"x"))
            recipients.take(f"u{minute}-{number}@cacert.test", 1, None)
            recipients.take(ANN, 10_000, (b"%d" % minute, b"%d" % number))
    assert len(recipients) == 60 * 5 + 1
    assert len(recipients._refused) == 60 * 5
    assert len(recipients._answered) == 10
    assert len(recipients._sent[ANN]) == 60
    assert recipients.take(ANN, 10_000, (b"199", b"4")) is None


@pytest.mark.parametrize(
    "request_text",
    [
        b"",
        b"x",
        b"=x",
        b"request=other",
        b"a=b",
        b"request=smtpd_access_policy\n",
        b"request=smtpd_access_policy\r\n\r",
    ],
)
def test_what_is_no_question(request_text: bytes) -> None:
    with pytest.raises(BadQuestion):
        parse_question(request_text)


def test_a_question() -> None:
    parsed = parse_question(b"request=smtpd_access_policy\nhelo_name=a=b\nsender=\nx=1\nx=2")
    assert parsed == {b"request": b"smtpd_access_policy", b"helo_name": b"a=b", b"sender": b"", b"x": b"2"}
