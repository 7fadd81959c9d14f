"""The reader of From and Sender: what it takes, what it refuses, and that two other readers find the same one address."""

import contextlib
import email
import email.policy
import email.utils
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.workers.policy.headers import MAX_FIELD, MAX_LINE, BadHeader, Mailbox, read_senders

ALICE = "alice@cacert.test"

TAKEN = [
    b"alice@cacert.test",
    b"<alice@cacert.test>",
    b"  alice@cacert.test \t",
    b"ALICE@CAcert.TEST",
    b"Alice <alice@cacert.test>",
    b"Alice<alice@cacert.test>",
    b"Alice B. Carroll <alice@cacert.test>",
    b'"Alice B. Carroll" <alice@cacert.test>',
    b'"Carroll, Alice" <alice@cacert.test>',
    b'"alice@cacert.test" <alice@cacert.test>',
    b'"Team: Alice; (CAcert)" <alice@cacert.test>',
    b'"" <alice@cacert.test>',
    b'"Alice \\"Al\\" Carroll" <alice@cacert.test>',
    b'"back\\\\slash" <alice@cacert.test>',
    b"Alice (at work) <alice@cacert.test>",
    b"alice@cacert.test (Alice)",
    b"Alice <alice@cacert.test> (CAcert Inc.)",
    b"=?utf-8?q?Alice_M=C3=BCller?= <alice@cacert.test>",
    b"=?UTF-8?B?QWxpY2UgTcO8bGxlcg==?= <alice@cacert.test>",
    b"=?iso-8859-1?Q?M=FCller=2C_Alice?= <alice@cacert.test>",
    b"=?utf-8?q?M=C3=BCller?=\r\n =?utf-8?q?_Alice?= <alice@cacert.test>",
    b'"=?utf-8?q?M=C3=BCller?=" <alice@cacert.test>',
    b"=?iso-2022-jp?B?GyRCO1ZFRBsoQg==?= <alice@cacert.test>",
    b"\r\n Alice\r\n\t<alice@cacert.test>",
    b'"Alice\r\n Carroll" <alice@cacert.test>',
]


@pytest.mark.parametrize("text", TAKEN)
def test_one_plain_mailbox(text: bytes) -> None:
    assert read_senders(b"From: " + text + b"\r\n") == [Mailbox("From", ALICE)]


@pytest.mark.parametrize("name", [b"From", b"from", b"FROM", b"fRoM", b"From ", b"From\t ", b"From  \t"])
@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_names_and_line_ends(name: bytes, end: bytes) -> None:
    lines = [b"Subject: one", b"\ttwo", name + b": Alice", b" <alice@cacert.test>", b"To: bob@example.org"]
    for block in (end.join(lines), end.join([*lines, b""]), end.join([*lines, b"", b""])):
        assert read_senders(block) == [Mailbox("From", ALICE)]
        with pytest.raises(BadHeader, match="more than one From"):
            read_senders(b"From: alice@cacert.test" + end + block)


def test_all_four_fields() -> None:
    block = b"""Resent-From: d@cacert.test
Sender: Bob <b@cacert.test>
From: a@cacert.test
Resent-Sender: e@cacert.test
Resent-From: F@cacert.test
Reply-To: anybody@example.org, else@example.org
X-From: boss@cacert.test
From-Field: boss@cacert.test
"""
    assert read_senders(block) == [
        Mailbox("From", "a@cacert.test"),
        Mailbox("Sender", "b@cacert.test"),
        Mailbox("Resent-From", "d@cacert.test"),
        Mailbox("Resent-From", "f@cacert.test"),
        Mailbox("Resent-Sender", "e@cacert.test"),
    ]


NOT_PLAIN = "not one plain address"
REFUSED = {
    b"": NOT_PLAIN,
    b"Alice": NOT_PLAIN,
    b"<>": NOT_PLAIN,
    b"Alice <>": NOT_PLAIN,
    b"alice": NOT_PLAIN,
    b"alice@": NOT_PLAIN,
    b"@cacert.test": NOT_PLAIN,
    b"alice@localhost": NOT_PLAIN,
    # Lists and groups
    b"alice@cacert.test, boss@cacert.test": NOT_PLAIN,
    b"boss@cacert.test, alice@cacert.test": NOT_PLAIN,
    b"Alice <alice@cacert.test>, Boss <boss@cacert.test>": NOT_PLAIN,
    b"alice@cacert.test,": NOT_PLAIN,
    b",alice@cacert.test": NOT_PLAIN,
    b"alice@cacert.test; boss@cacert.test": NOT_PLAIN,
    b"alice@cacert.test boss@cacert.test": NOT_PLAIN,
    b"Team: alice@cacert.test;": NOT_PLAIN,
    b"Team: alice@cacert.test, boss@cacert.test;": NOT_PLAIN,
    b"undisclosed-recipients:;": NOT_PLAIN,
    # Two addresses that look like one
    b"boss@cacert.test <alice@cacert.test>": NOT_PLAIN,
    b"Boss <boss@cacert.test> <alice@cacert.test>": NOT_PLAIN,
    b"<alice@cacert.test> <boss@cacert.test>": NOT_PLAIN,
    b"<alice@cacert.test> boss@cacert.test": NOT_PLAIN,
    b"<boss@cacert.test> alice@cacert.test": NOT_PLAIN,
    b"<<alice@cacert.test>>": NOT_PLAIN,
    b"Alice <alice@cacert.test": NOT_PLAIN,
    b"Alice alice@cacert.test>": NOT_PLAIN,
    b'"<boss@cacert.test>" <alice@cacert.test>': NOT_PLAIN,
    b'"x\\" <boss@cacert.test>, \\"y" <alice@cacert.test>': NOT_PLAIN,
    b'"x\\", boss@cacert.test, \\"y" <alice@cacert.test>': NOT_PLAIN,
    b'"\\boss" <alice@cacert.test>': NOT_PLAIN,
    b'"unended <alice@cacert.test>': NOT_PLAIN,
    b'Al"ice <alice@cacert.test>': NOT_PLAIN,
    b'"Alice\\" <alice@cacert.test>': NOT_PLAIN,
    # Comments
    b"(boss@cacert.test) alice@cacert.test": NOT_PLAIN,
    b"(comment) alice@cacert.test": NOT_PLAIN,
    b"alice(comment)@cacert.test": NOT_PLAIN,
    b"alice@(comment)cacert.test": NOT_PLAIN,
    b"alice@cacert.test(comment).example.org": NOT_PLAIN,
    b"<alice@cacert.test(comment)>": NOT_PLAIN,
    b"<(comment)alice@cacert.test>": NOT_PLAIN,
    b"alice@cacert.test (boss@cacert.test)": NOT_PLAIN,
    b"alice@cacert.test (<boss>)": NOT_PLAIN,
    b"Alice (\\) <alice@cacert.test> (": NOT_PLAIN,
    b"alice@cacert.test ((nested))": NOT_PLAIN,
    b"alice@cacert.test (un\\)ended)": NOT_PLAIN,
    b"alice@cacert.test (, boss)": NOT_PLAIN,
    b"(unended alice@cacert.test": NOT_PLAIN,
    # Addresses of another form
    b'"alice"@cacert.test': NOT_PLAIN,
    b'Alice <"alice"@cacert.test>': NOT_PLAIN,
    b'"alice@cacert.test"': NOT_PLAIN,
    b'"boss@cacert.test"@cacert.test': NOT_PLAIN,
    b"<@relay.test:alice@cacert.test>": NOT_PLAIN,
    b"<@relay.test,@other.test:alice@cacert.test>": NOT_PLAIN,
    b"alice@[127.0.0.1]": NOT_PLAIN,
    b"alice@[cacert.test]": NOT_PLAIN,
    b"alice@@cacert.test": NOT_PLAIN,
    b"alice@boss@cacert.test": NOT_PLAIN,
    b".alice@cacert.test": NOT_PLAIN,
    b"al..ice@cacert.test": NOT_PLAIN,
    b"alice.@cacert.test": NOT_PLAIN,
    b"alice@cacert.test.": NOT_PLAIN,
    b"alice@cacert..test": NOT_PLAIN,
    b"alice@cacert_.test": NOT_PLAIN,
    b"alice @cacert.test": NOT_PLAIN,
    b"alice@ cacert.test": NOT_PLAIN,
    b"alice@cacert. test": NOT_PLAIN,
    b"< alice@cacert.test>": NOT_PLAIN,
    b"<alice@cacert.test >": NOT_PLAIN,
    b"<alice@cacert\r\n .test>": NOT_PLAIN,
    b"alice\r\n @cacert.test": NOT_PLAIN,
    b"mailto:alice@cacert.test": NOT_PLAIN,
    b"alice%cacert.test": NOT_PLAIN,
    b"boss!alice": NOT_PLAIN,
    b"Alice\x0b <alice@cacert.test>": NOT_PLAIN,
    b"Alice\x7f <alice@cacert.test>": NOT_PLAIN,
    b"alice@cacert.test\x0c": NOT_PLAIN,
    b"alice@-cacert.test": "is none",
    b"alice@cacert.123": "is none",
    b"a" * 65 + b"@cacert.test": "is none",
    b"alice@" + b"a" * 64 + b".test": "is none",
    b"alice@" + b"abc." * 62 + b"test": "is none",
    # Encoded
    b"=?utf-8?q?alice=40cacert.test?=": NOT_PLAIN,
    b"=?utf-8?q?alice?=@cacert.test": "is encoded",
    b"<=?utf-8?q?boss?=@cacert.test>": "is encoded",
    b"alice@=?utf-8?q?cacert.test?=": NOT_PLAIN,
    b"=?utf-8?q?=3Cboss=40cacert.test=3E?= <alice@cacert.test>": "has <, > or @",
    b"=?utf-8?q?boss=40cacert.test?= <alice@cacert.test>": "has <, > or @",
    b"=?utf-8?b?Ym9zc0BjYWNlcnQudGVzdA==?= <alice@cacert.test>": "has <, > or @",
    b"=?utf-8?q?a=0D=0AFrom=3A_boss?= <alice@cacert.test>": "has <, > or @",
    b"=?utf-8?q?a=00b?= <alice@cacert.test>": "has <, > or @",
    b'"=?utf-8?q?boss=40cacert.test?=" <alice@cacert.test>': "has <, > or @",
    b'"=?utf-8?q?boss@cacert.test?=" <alice@cacert.test>': "in a wrong way",
    b'"=?utf-8?q?"a?= <alice@cacert.test>': "in a wrong way",
    b'"=?utf-8?q?a(b)?=" <alice@cacert.test>': "in a wrong way",
    b"alice@cacert.test (=?utf-8?q?boss=40cacert.test?=)": "has <, > or @",
    b"x=?utf-8?q?boss=40cacert.test?=x <alice@cacert.test>": "has <, > or @",
    b"=?utf-7?q?boss+AEA-cacert.test?= <alice@cacert.test>": "unknown charset",
    b"=?x-evil?q?a?= <alice@cacert.test>": "unknown charset",
    b"=?idna?q?a?= <alice@cacert.test>": "unknown charset",
    b"=?utf-16-le?b?YgBAAA==?= <alice@cacert.test>": "unknown charset",
    b"=?cp037?b?fA==?= <alice@cacert.test>": "unknown charset",
    b"=?utf-8?q?=C0=80?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?q?=C3?= <alice@cacert.test>": "in a wrong way",
    b"=?us-ascii?q?=C3?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?q?=4?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?b?A?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?b?====?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?b?QQ==QUFB?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?x?a?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8*en?q?a?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?q?a <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?q?a b?= <alice@cacert.test>": "in a wrong way",
    b"=?utf-8?q?a?b?= <alice@cacert.test>": "in a wrong way",
    b"=?=?utf-8?q?a?=utf-8?q?=40?= <alice@cacert.test>": "in a wrong way",
    "Älice <alice@cacert.test>".encode(): "outside ASCII",
    "Älice <alice@cacert.test>".encode("latin-1"): "outside ASCII",
    "älice@cacert.test".encode(): "outside ASCII",
    "alice@cacert.test\u2028".encode(): "outside ASCII",
    "alice＠cacert.test".encode(): "outside ASCII",
    # Lines
    b"alice@cacert.test\r\n \r\n": "an empty line in it",
    b" \r\n \r\n alice@cacert.test": "an empty line in it",
    b"Alice\n\t\n <alice@cacert.test>": "an empty line in it",
    b"alice@cacert.test\r\n\r\nFrom: boss@cacert.test": "no header field",
    b"alice@cacert.test\0": "NUL or a bare CR",
    b"alice@cacert.test\0From: boss@cacert.test": "NUL or a bare CR",
    b"alice@cacert.test\rFrom: boss@cacert.test": "NUL or a bare CR",
    b"Alice\r <alice@cacert.test>": "NUL or a bare CR",
    b". <alice@cacert.test>": NOT_PLAIN,
    b"Alice .<alice@cacert.test>": NOT_PLAIN,
    b"(at work) <alice@cacert.test>": NOT_PLAIN,
    b"alice@cacert.test\r\r\n": "NUL or a bare CR",
    b"A" * MAX_LINE + b" <alice@cacert.test>": "too long",
    b"Alice\r\n " + b"A" * MAX_LINE + b"\r\n <alice@cacert.test>": "too long",
    b"Alice" + b"\r\n Alice" * (MAX_FIELD // 6 + 1) + b" <alice@cacert.test>": "too long",
    # Another From
    b"alice@cacert.test\r\nfrom : boss@cacert.test": "more than one From",
    b"alice@cacert.test\nFROM\t:boss@cacert.test": "more than one From",
    b"alice@cacert.test\r\nFrom:": "more than one From",
    b"alice@cacert.test\r\nFrom: alice@cacert.test": "more than one From",
    b"alice@cacert.test\r\nFrom\r\n : boss@cacert.test": "no header field",
    b"alice@cacert.test\r\nFr om: boss@cacert.test": "no header field",
    b"alice@cacert.test\r\nFrom boss@cacert.test": "no header field",
    b"alice@cacert.test\r\n\x0bFrom: boss@cacert.test": "no header field",
    b"alice@cacert.test\r\n\xa0From: boss@cacert.test": "no header field",
    b"alice@cacert.test\r\n\xef\xbb\xbfFrom: boss@cacert.test": "no header field",
    b"alice@cacert.test\r\nFrom\xad: boss@cacert.test": "no header field",
    b"alice@cacert.test\r\n: boss@cacert.test": "no header field",
    b"alice@cacert.test\r\n>From: boss@cacert.test\r\n.\r\n": "no header field",
    # The others by the same rules
    b"alice@cacert.test\r\nSender: a@cacert.test\r\nsender: a@cacert.test": "more than one Sender",
    b"alice@cacert.test\r\nSender:": "The Sender header field is not one plain",
    b"alice@cacert.test\r\nSender: a@cacert.test, b@cacert.test": "The Sender header field is not one plain",
    b"alice@cacert.test\r\nResent-From: a@cacert.test, b@cacert.test": "The Resent-From header field is not one plain",
    b"alice@cacert.test\r\nresent-sender : Team:;": "The Resent-Sender header field is not one plain",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_whatever_could_be_read_otherwise(text: bytes) -> None:
    for block in (
        b"From: " + text,
        b"From: " + text + b"\r\n",
        b"To: x@example.org\r\nFrom: " + text + b"\nDate: now\n",
    ):
        with pytest.raises(BadHeader) as refused:
            read_senders(block)
        assert REFUSED[text] in str(refused.value)
        assert str(refused.value).isascii()
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"", "no From"),
        (b"\r\n", "no From"),
        (b"\n\n", "no From"),
        (b"Subject: x\r\n", "no From"),
        (b"X-From: alice@cacert.test\r\n", "no From"),
        (b"Subject: x\r\n From: alice@cacert.test\r\n", "no From"),
        (b"Sender: alice@cacert.test\r\n", "no From"),
        (b" From: alice@cacert.test\r\n", "Line 1 "),
        (b"\r\nFrom: alice@cacert.test\r\n", "Line 1 "),
        (b"\r\n\r\n\r\n", "Line 1 "),
        (b"From alice Mon Nov 23\r\nFrom: alice@cacert.test\r\n", "Line 1 "),
        (b"From: alice@cacert.test\r\n\r\n\r\n", "Line 2 "),
        (b"From: alice@cacert.test\r\nSubject: x\r\n\r\nBody\r\n", "Line 3 "),
        (b"Subject: \0\r\nFrom: alice@cacert.test\r\n", "NUL"),
        (b"Subject: x\rFrom: boss@cacert.test\r\nFrom: alice@cacert.test\r\n", "bare CR"),
    ],
)
def test_blocks_that_are_none(block: bytes, why: str) -> None:
    with pytest.raises(BadHeader, match=why):
        read_senders(block)


@pytest.mark.parametrize(
    "other", [b"Subject: \xe4\xff\xc3\x28", b"Subject: x\r\n \r\n y", b"X: " + b"y" * 100_000, b"A:"]
)
def test_other_fields_are_not_looked_at(other: bytes) -> None:
    assert read_senders(other + b"\r\nFrom: alice@cacert.test\r\n") == [Mailbox("From", ALICE)]


EVIL = [
    "From: ",
    "from:",
    "From :",
    "Sender: ",
    "\r\n",
    "\n",
    "\r",
    "\r\n ",
    "\n\t",
    "alice@cacert.test",
    "<alice@cacert.test>",
]
EVIL += [
    "boss@cacert.test",
    "<boss@cacert.test>",
    ", ",
    ";",
    ":",
    '"',
    "\\",
    '\\"',
    "(",
    ")",
    "=?utf-8?q?",
    "=40",
    "?=",
    "=?",
    "\0",
]
EVIL += ["@", ".", "<", ">", " ", "Alice", "[", "]", "Team:", "ü", "\x0b", "=?utf-8?b?QA==?=", "%", "&", "+x"]
pieces = st.lists(st.sampled_from(EVIL) | st.text(max_size=3), max_size=14).map(
    lambda parts: "".join(parts).encode("utf-8", "replace")
)


@settings(max_examples=2000, deadline=None)
@given(pieces)
@example(b"From: alice@cacert.test")
def test_two_other_readers_find_the_same_one_address(text: bytes) -> None:
    """Whatever comes in, there is an answer; and where it is yes, Python's two readers of addresses agree."""
    agree(b"From: " + text + b"\r\n")


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200) | pieces)
def test_any_octets_have_an_answer(block: bytes) -> None:
    agree(block)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(TAKEN), st.data())
def test_near_what_is_taken(text: bytes, data: st.DataObject) -> None:
    """One piece put into a good one, at any place."""
    place = data.draw(st.integers(0, len(text)))
    agree(b"From: " + text[:place] + data.draw(st.sampled_from(EVIL)).encode() + text[place:] + b"\r\n")


def agree(block: bytes) -> None:
    try:
        found = read_senders(block)
    except BadHeader as error:
        refused = str(error)
    else:
        refused = ""
    assert refused.isascii()
    assert refused.isprintable()
    if refused:
        return
    assert found[0].field == "From"
    message = email.message_from_bytes(block, policy=email.policy.SMTP)
    for name in {field for field, _ in found}:
        ours = [address for field, address in found if field == name]
        theirs = [header.addresses for header in message.get_all(name)]
        assert [[each.addr_spec.lower() for each in addresses] for addresses in theirs] == [[each] for each in ours]
        assert all(header.groups[0].display_name is None for header in message.get_all(name))
        plain = email.message_from_bytes(block, policy=email.policy.compat32)
        unfolded = [str(text).replace("\r", "").replace("\n", "") for text in plain.get_all(name, [])]
        assert [[a.lower() for _, a in email.utils.getaddresses([text])] for text in unfolded] == [
            [each] for each in ours
        ]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: b"a:\n" * n,
        lambda n: b"From: " + b"a" * n,
        lambda n: b"From: x\r\n" + b" x\r\n" * n,
        lambda n: b"From: " + b"=?utf-8?q?a?=" * (n // 13),
        lambda n: b"From:a@b.test\n" * n,
        lambda n: b"From: " + b"(" * 900 + b"\n " + b"a " * 450 + b"\n " + b'"' * 900,
        lambda n: b"From: " + b"a." * 450 + b"\n " + b"a" * 900 + b"\n " + b"=?" * 450,
        lambda n: b"From: " + b'"\\"' * 300 + b"\n " + b"=?utf-8?q?" + b"=41" * 290,
        lambda n: b"Subject: " + b"\n " * n + b"\nFrom: a@b.test",
    ],
)
def test_large_ones_take_time_in_proportion(make: Callable[[int], bytes]) -> None:
    """A block of the largest size that is looked at, and one of half of it; a quadratic reader would need an hour."""
    for size in (128 * 1024, 256 * 1024):
        block = make(size)[: 256 * 1024]
        began = time.process_time()
        with contextlib.suppress(BadHeader):
            read_senders(block)
        assert time.process_time() - began < 5
