"""What a refusal says: one line of printable ASCII that fits into a reply, whatever the addresses are like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.workers.policy.rows import Rows
from app.workers.policy.senders import BadRequest, parse_head, why_not

pytestmark = pytest.mark.asyncio


class Known(Rows):
    """Rows without a database."""

    def __init__(self, *own: str) -> None:
        self.own = list(own)

    async def senders(self, name: str) -> list[str]:
        return self.own


LONG = "a" * 64 + "@" + "b" * 63 + "." + "c" * 63 + ".test"


async def test_five_of_them_are_shown() -> None:
    own = [f"n{number}@cacert.test" for number in range(5)]
    all_five = f"The From address x@y.test is not yours. You may send as: {', '.join(own)}"
    assert await why_not("n0@cacert.test", b"From: x@y.test", Known(*own)) == all_five
    assert (
        await why_not("n0@cacert.test", b"From: x@y.test", Known(*own, "n5@cacert.test")) == f"{all_five}, and others"
    )
    short = await why_not("n0@cacert.test", b"From: x@y.test", Known("n0@cacert.test", LONG, LONG, LONG))
    assert short == f"The From address x@y.test is not yours. You may send as: n0@cacert.test, {LONG}, and others"


async def test_it_fits_into_a_reply_line() -> None:
    """RFC 5321, section 4.5.3.1.5: 512 octets, with `550 5.7.1 ` before and CRLF after."""
    longest = "a" * 64 + "@" + ".".join(["b" * 46] * 4) + ".t"
    assert len(longest) == 254
    for address in (longest, "x" * 50 + "@" + "y" * 40 + ".test"):
        for field in (b"From", b"Resent-Sender"):
            block = b"From: me@cacert.test\n" * (field != b"From") + field + b": " + address.encode()
            own = [longest[1:].replace("b", letter) for letter in "cdefgh"]
            reason = await why_not("me", block, Known(*own, *(["me@cacert.test"] if field != b"From" else [])))
            assert reason is not None
            assert len(f"550 5.7.1 {reason}\r\n") <= 512


@given(
    st.binary(max_size=300)
    | st.text(max_size=60).map(lambda text: b"From: " + text.encode("utf-8", "replace") + b"@x.test")
)
async def test_any_header_has_an_answer_in_printable_ascii(block: bytes) -> None:
    reason = await why_not("me@cacert.test", block, Known("me@cacert.test"))
    assert reason is not None
    assert reason.isascii()
    assert reason.isprintable()
    assert "%" not in reason


@given(
    st.binary(max_size=300) | st.binary(max_size=100).map(lambda more: b"POST /from HTTP/1.1\r\nX-Login: a\r\n" + more)
)
async def test_any_head_has_an_answer(head: bytes) -> None:
    try:
        found = parse_head(head)
    except BadRequest as error:
        status = error.status
    else:
        status = 200
        assert found.login.isascii()
        assert found.length >= 0
    assert status in (200, 400, 404, 405, 411)
