"""The text of the alias file: what gets in, what does not, and that postalias reads it as it was meant."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.addresses import OutsideAddress
from app.errors import BadAddress
from app.workers.host.alias_file import (
    names_in,
    parse_destination,
    parse_name,
    render,
    same_lines,
    value_of,
    version_of,
)
from tests.workers.host.aliased import dump, make_postfix

HOSTILE = [
    "|touch /tmp/x",
    '"|touch /tmp/x"',
    "/tmp/file",
    "/tmp/file@else.example",
    "|sh@else.example",
    "-f@else.example",
    "-oQ/tmp@else.example",
    "a!b@else.example",
    "a%b@cacert.test",
    ":include:/etc/passwd",
    ":include:/etc/passwd@else.example",
    '"quoted"@else.example',
    "a b@else.example",
    " a@else.example",
    "a@else.example ",
    "a@else.example\n|sh",
    "a@else.example,|sh",
    "a@else.example\nroot: x@y.example",
    "a@else.example\0",
    "a(c)@else.example",
    "a@[127.0.0.1]",
    "@else.example",
    "root",
    "ü@else.example",
    "a@ü.example",
    "\\backslash@else.example",
    "a;b@else.example",
    "<a@else.example>",
    "#a b@else.example",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_such_destination(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_destination(text)


@pytest.mark.parametrize(
    "text",
    [*HOSTILE, "Root", "owner-list", "owner-", "mailer-daemon", "returns", "a:b", "a:", "#a", "-a", "a@b.de", "a+b"],
)
def test_no_such_name(text: str) -> None:
    if text == "root":
        assert parse_name(text) == text
        return
    with pytest.raises(BadAddress):
        parse_name(text)


@pytest.mark.parametrize("text", ["postmaster", "root", "abuse", "list-owner", "a.b-c_d", "0"])
def test_names(text: str) -> None:
    assert parse_name(text) == text


def test_text() -> None:
    text = render({"zoe": ["z@x.example"], "ann": ["b@x.example", "a@x.example"]}, 7)
    head, version, *lines = text.decode().splitlines()
    assert head.startswith("# Made by cacert-mail")
    assert (version, version_of(text)) == ("# version: 7", 7)
    assert lines == ["ann: b@x.example,", "    a@x.example", "zoe: z@x.example"]
    assert same_lines(text, text.replace(b"version: 7", b"version: 8"))
    assert not same_lines(text, text.replace(b"zoe", b"zod"))
    assert not same_lines(text, text + b"x: y\n")
    assert [version_of(other) for other in (b"", b"x: y\n# version: x\n", b"# version: -1\n")] == [0, 0, 0]


ATOM = st.text("abcXYZ019!#$%&'*+/=?^_`{|}~-", min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(ATOM, ATOM), min_size=1, max_size=20))
def test_postalias_reads_what_was_meant(parts: list[tuple[str, str]]) -> None:
    """Whatever the characters that an address elsewhere may have."""
    entries = {}
    for number, (first, second) in enumerate(parts):
        try:
            to = parse_destination(f"{first}.{second}@else.example")
        except BadAddress:
            continue
        entries[f"n{number}"] = [OutsideAddress(to), "second@else.example"]
    assert built(render(entries, 1)) == {name: value_of(to) for name, to in entries.items()}


@pytest.fixture(scope="module", autouse=True)
def scratch_postfix(memory_directory: Path) -> None:
    global BASE  # noqa: PLW0603  hypothesis wants no function-scoped fixture
    BASE = memory_directory / "alias-file"
    BASE.mkdir(exist_ok=True)
    if not (BASE / "postfix").exists():
        make_postfix(BASE)


BASE = Path()


def built(text: bytes, *, complains: bool = False) -> dict[str, str]:
    file = BASE / "file"
    file.write_bytes(text)
    file.with_suffix(".lmdb").unlink(missing_ok=True)
    done = subprocess.run(
        ["postalias", "-c", BASE / "postfix", f"lmdb:{file}"], capture_output=True, text=True, check=True
    )
    assert complains or done.stderr == ""
    return dump(BASE / "postfix", file)


HAND_MADE = """\
# comment: no
  # another: no
root: x
"Quoted Name" : y
"post\\master": a
   b,
# mid

   continued: z
Upper.Case: |"/usr/bin/prog: x"
(c) abc: y
comment (with: colon): y
"a"b: z
q\\x: z
tab\t: u
"a\\"b": o
x y: z
colon:in:value
dup: a
more: c
"""


def test_names_of_a_hand_made_file_are_those_that_postalias_finds() -> None:
    found = names_in(HAND_MADE)
    assert set(found) == set(built(HAND_MADE.encode()))
    lines = HAND_MADE.splitlines()
    for name, number in found.items():
        assert name.split()[0].strip('"')[:1] in lines[number - 1].lower()
    assert (found["root"], found["postmaster"], found["upper.case"], found["dup"]) == (3, 5, 10, 19)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "   lead: x\n  more: y\n",
        '"open: z\n',
        '"": e\n',
        ": f\n",
        "nocolon\n",
        "\\",
        "\xff\n",
        "a: b\na: c\n",
    ],
)
def test_what_is_no_line_defines_nothing(text: str) -> None:
    assert set(names_in(text)) == set(built(text.encode("latin-1"), complains=True)) - {""}
