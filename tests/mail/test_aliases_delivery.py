"""Where mail to an alias ends: by the worker's file, by the rows that local(8) reads, by those that cleanup(8) reads."""

from pathlib import Path

import pytest

from app.mailconfig.postfix import render_postfix
from tests.stack.accounts import OTHER, Account, Alias
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import run, wait_until

ALICE, BOB = f"alice@{PRIMARY_DOMAIN}", f"bob@{PRIMARY_DOMAIN}"
CAROL = f"carol@{OTHER}"
INFO, PR, HELP = (f"{name}@{PRIMARY_DOMAIN}" for name in ("info", "pr", "help"))
TEAM, BOARD = f"team@{OTHER}", f"board@{OTHER}"


def settled(stack: MailStack) -> list[str]:
    """Every line of the log, once nothing is in the queue but what wants to go elsewhere, and cannot."""

    def is_settled() -> bool:
        waiting = run(["postqueue", "-c", stack.postfix_config, "-j"]).splitlines()
        return all('"queue_name": "deferred"' in line for line in waiting)

    assert wait_until(is_settled)
    return stack.mail_log.read_text().splitlines()


@pytest.fixture
def open_directory(stack: MailStack) -> Path:
    """Everybody may write there: what local(8) does for an alias it does as `nobody`."""
    path = stack.directory / "open"
    path.mkdir(exist_ok=True)
    path.chmod(0o777)
    for leftover in path.iterdir():
        leftover.unlink()
    return path


def inbox(home: Path) -> list[str]:
    return [message.read_text() for message in home.glob("Maildir/new/*")]


def test_alias_in_the_file(stack: MailStack, account: Account) -> None:
    homes = [account(ALICE), account(CAROL)]
    stack.build_aliases(f"info: {ALICE}, {CAROL}\n")
    for address in (INFO, INFO.upper(), "info", f"info+x@{PRIMARY_DOMAIN}"):
        assert stack.send(address) == 250
    for home in homes:
        stack.wait_for_mail(home, 4)
    assert stack.send(f"info@{OTHER}") == 550


def test_alias_in_a_row_of_the_primary_domain(
    mariadb: MariaDB, stack: MailStack, account: Account, alias: Alias
) -> None:
    homes = [account(ALICE), account(CAROL)]
    alias(PR, ALICE, CAROL)
    for address in (PR, PR.upper(), "pr", f"pr+x@{PRIMARY_DOMAIN}"):
        assert stack.send(address) == 250
    for home in homes:
        stack.wait_for_mail(home, 4)
    assert stack.postmap("pr", PR, "PR", "ü", table=stack.local_aliases_map) == dict.fromkeys(
        ("pr", "PR"), f"{ALICE},{CAROL}"
    )
    assert stack.send(f"pr@{OTHER}") == 550
    mariadb.sql("UPDATE aliases SET deleted_at = created_at", "owner")
    assert stack.send(PR) == 550


def test_alias_in_a_row_of_another_domain(mariadb: MariaDB, stack: MailStack, account: Account, alias: Alias) -> None:
    homes = [account(ALICE), account(CAROL)]
    alias(TEAM, ALICE, CAROL, kind="receive_only")
    alias(BOARD, TEAM)
    for address in (TEAM, TEAM.upper(), f"team+x@{OTHER}", BOARD):
        assert stack.send(address) == 250
    for home in homes:
        stack.wait_for_mail(home, 4)
    keys = ("team", TEAM, f"@{OTHER}", "ü@x", f"ü@{OTHER}")
    assert stack.postmap(*keys, table=stack.virtual_aliases_map) == {TEAM: f"{ALICE},{CAROL}"}
    assert stack.send(f"team@{PRIMARY_DOMAIN}") == 550
    mariadb.sql("UPDATE aliases SET deleted_at = created_at", "owner")
    assert stack.send(TEAM) == 550


def test_each_kind_may_name_each_other(stack: MailStack, account: Account, alias: Alias) -> None:
    home = account(ALICE)
    stack.build_aliases(f"info: {PR}\nlast: {ALICE}\nvirtual: {TEAM}\n")
    alias(PR, ALICE)  # file to row
    alias(HELP, f"last@{PRIMARY_DOMAIN}")  # row to file
    alias(TEAM, HELP)  # other domain to row to file
    alias(BOARD, f"info@{PRIMARY_DOMAIN}")  # other domain to file to row
    alias(f"both@{PRIMARY_DOMAIN}", BOARD)  # row to other domain to file to row
    ways = (INFO, HELP, TEAM, BOARD, f"both@{PRIMARY_DOMAIN}", f"virtual@{PRIMARY_DOMAIN}")
    for count, address in enumerate(ways, 1):
        assert stack.send(address, subject=address) == 250, address
        stack.wait_for_mail(home, count)
    assert "status=bounced" not in "".join(
        line for line in settled(stack) if "@cacert.test" in line and "to=<s@" in line
    )


def test_loop_ends(stack: MailStack, account: Account, alias: Alias) -> None:
    """The API makes none, but a file made by hand and a row can be one."""
    account(ALICE)
    stack.build_aliases(f"info: {PR}\n")
    alias(PR, INFO)
    assert stack.send(INFO) == 250
    settled(stack)


def test_only_destinations_that_are_there(mariadb: MariaDB, stack: MailStack, account: Account, alias: Alias) -> None:
    home, other = account(ALICE), account(BOB)
    alias(PR, ALICE, BOB)
    mariadb.sql(
        f"UPDATE applied SET stands = 0 WHERE subject_id = (SELECT id FROM users WHERE address = '{BOB}')", "owner"
    )
    assert stack.send(PR) == 250
    stack.wait_for_mail(home)
    settled(stack)
    assert inbox(other) == []
    mariadb.sql("UPDATE applied SET stands = 0", "owner")
    assert stack.send(PR) == 550


def test_owner_alias_has_no_power(stack: MailStack, account: Account, alias: Alias) -> None:
    home, other = account(ALICE), account(BOB)
    alias(PR, ALICE, f"nobody@{PRIMARY_DOMAIN}")
    alias(f"owner-pr@{PRIMARY_DOMAIN}", BOB)
    assert stack.send(PR, sender="") == 250
    stack.wait_for_mail(home)
    assert stack.send(PR, sender="s@example.net") == 250
    for message in stack.wait_for_mail(home, 2):
        assert "owner-pr" not in message.read_text()
    settled(stack)
    assert inbox(other) == []


def test_outside_destination_keeps_the_sender(stack: MailStack, account: Account, alias: Alias) -> None:
    """Without `srs` nothing is rewritten."""
    alias(PR, "friend@example.net")
    assert stack.send(PR) == 250
    assert wait_until(lambda: "friend@example.net" in run(["postqueue", "-c", stack.postfix_config, "-j"]))
    assert '"sender": "s@example.net"' in run(["postqueue", "-c", stack.postfix_config, "-j"])


def test_hand_made_file_comes_after_ours(stack: MailStack, account: Account, alias: Alias, tmp_path: Path) -> None:
    hand_made = stack.directory / "hand-made"
    hand_made.write_text(f"info: {BOB}\nold: {BOB}\npr: {BOB}\n")
    file = stack.file.model_copy(update={"hand_made_aliases": hand_made})
    main = render_postfix(stack.settings, file, PRIMARY_DOMAIN)["main.cf"].text
    (tmp_path / "main.cf").write_text(main)
    (tmp_path / "master.cf").write_text("")
    shown = run(["postconf", "-c", tmp_path, "-h", "alias_maps", "alias_database"]).split("\n")
    assert shown[0].split() == [f"lmdb:{stack.aliases}/aliases", f"lmdb:{hand_made}", stack.local_aliases_map]
    assert shown[1] == f"lmdb:{hand_made}"


# What an attacker may have written into a row


HOSTILE = [
    "|touch {mark}",
    '"|touch {mark}"',
    '"|touch {mark}"@cacert.test',
    "|touch@cacert.test",
    "| touch {mark}",
    ":include:/etc/passwd",
    '":include:/etc/passwd"',
    ":include:{list}",
    ":include:{list}@cacert.test",
    "{mark}",
    '"{mark}"',
    "/{mark}@cacert.test",
    "alice@cacert.test\n|touch {mark}",
    "alice@cacert.test, |touch {mark}",
    "alice@cacert.test,bob@cacert.test",
    "alice@cacert.test bob@cacert.test",
    " bob@cacert.test",
    "\tbob@cacert.test",
    "bob@cacert.test\n",
    "\nbob@cacert.test",
    "bob@cacert.test ",
    "bob",
    "",
    "@cacert.test",
    "bob@",
    "b\u00f6b@cacert.test",
    "<bob@cacert.test>",
    "bob@cacert.test>",
    "(x)bob@cacert.test",
    "bob%example.net@cacert.test",
    "example.net!bob@cacert.test",
    "@example.net:bob@cacert.test",
    "-bob@cacert.test",
    "\\bob@cacert.test",
    "bob\\@example.net",
    "x' OR '1'='1@cacert.test",
    "bob@cacert.test;x",
    "bob@[127.0.0.1]",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("address", [PR, TEAM])
def test_hostile_destination(
    mariadb: MariaDB,
    stack: MailStack,
    account: Account,
    alias: Alias,
    open_directory: Path,
    address: str,
    text: str,
) -> None:
    account(ALICE)
    home = account(BOB)
    mark, listed = open_directory / "mark", open_directory / "list"
    listed.write_text(f"{BOB}\n")
    destination = text.format(mark=mark, list=listed)
    number = alias(address, "later@example.net")
    update = (
        f"UPDATE alias_destinations SET address = CONVERT(0x{destination.encode().hex() or '20'} USING utf8mb4)"
        f" WHERE alias_id = {number}"
    )
    if not destination.isascii():
        with pytest.raises(RuntimeError, match=r"Incorrect string value|Cannot convert"):
            mariadb.sql(update, "owner")
        return
    mariadb.sql(update, "owner")
    assert stack.send(address) == 550
    assert stack.send(BOB) == 250, "the map still answers"
    stack.wait_for_mail(home)
    settled(stack)
    assert len(inbox(home)) == 1
    assert not mark.exists()


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.startswith(("|", '"|', "{mark}", '"{mark}'))])
def test_hostile_line_in_the_alias_file(stack: MailStack, account: Account, open_directory: Path, text: str) -> None:
    """What the worker never writes, and local(8) refuses to do."""
    account(ALICE)
    mark = open_directory / "mark"
    stack.build_aliases(f"info: {text.format(mark=mark, list='x')}\n", complaints=True)
    stack.send(INFO)
    settled(stack)
    assert not mark.exists()


@pytest.mark.parametrize("local_part", ["a|b", "a,b", "a'b", "a b", " a", "a\\n", "owner-a", "a+b", "*", "%", "_", ""])
def test_hostile_name_of_an_alias(
    mariadb: MariaDB, stack: MailStack, account: Account, alias: Alias, local_part: str
) -> None:
    home = account(ALICE)
    alias(PR, ALICE)
    mariadb.sql(
        f"UPDATE aliases SET local_part = CONVERT(0x{local_part.encode().hex() or '20'} USING utf8mb4)", "owner"
    )
    assert stack.send(f"zz@{PRIMARY_DOMAIN}") == 550
    assert stack.send(ALICE) == 250
    stack.wait_for_mail(home)


def test_address_elsewhere_with_every_letter_that_it_may_have(stack: MailStack, alias: Alias, mariadb: MariaDB) -> None:
    """The API and the worker take these too; what begins with `|`, `/` or `-`, or has `!` or `%`, none of us takes."""
    for number, local_part in enumerate(("O'Brien", "#$&'*+-/=?^_`{|}~x", "a.b", "`x", "$mydomain", "UPPER"), 1):
        address = f"a{number}@{PRIMARY_DOMAIN}"
        alias(address, f"{local_part}@example.net")
        assert stack.postmap(f"a{number}", table=stack.local_aliases_map) == {f"a{number}": f"{local_part}@example.net"}
        assert stack.send(address) == 250
        wanted = f'"address": "{local_part}@example.net"'
        assert wait_until(lambda wanted=wanted: wanted in run(["postqueue", "-c", stack.postfix_config, "-j"])), wanted
        run(["postsuper", "-c", stack.postfix_config, "-d", "ALL"])
