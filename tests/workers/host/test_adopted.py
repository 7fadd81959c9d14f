"""The list of old homes that keep their owner: root's word, and nobody else's."""

import os
from pathlib import Path

import pytest

from app.addresses import MailAddress
from app.workers.host.adopted import Adopted, AdoptedHomes, read_adopted, write_adopted
from app.workers.host.fs import UnsafePath
from app.workers.host.handlers.users import GiveUp
from tests.workers.host.machine import UID_FIRST, Machine, machine, root, worker_settings

__all__ = ["machine", "root", "worker_settings"]

ANN = Adopted(1, MailAddress("ann@cacert.test"), 1001, 1002)


@pytest.fixture
def file(scratch: Path) -> Path:
    return scratch / "etc/adopted-homes"


def put(file: Path, *entries: Adopted) -> AdoptedHomes:
    write_adopted(file, entries)
    return AdoptedHomes(file)


def test_what_is_written_is_read(file: Path) -> None:
    bob = Adopted(2, MailAddress("bob@other.test"), 1003, 1003)
    homes = put(file, bob, ANN)
    assert read_adopted(file) == {1: ANN, 2: bob}
    assert file.stat().st_mode & 0o777 == 0o644
    assert homes.find(1, "ann@cacert.test") == ANN
    assert homes.find(1, "bob@other.test") is None, "another database gave the same id to somebody else"
    assert homes.find(3, "ann@cacert.test") is None
    write_adopted(file, [bob])
    os.utime(file, ns=(1, 1))
    assert homes.find(1, "ann@cacert.test") is None


def test_without_a_file(scratch: Path) -> None:
    assert AdoptedHomes(scratch / "none").find(1, "ann@cacert.test") is None
    assert AdoptedHomes(None).find(1, "ann@cacert.test") is None


@pytest.mark.parametrize(
    "line",
    [
        "1 ann@cacert.test 1001",
        "1 ann@cacert.test 1001 1001 1001",
        "1 ann 1001 1001",
        "x ann@cacert.test 1001 1001",
        "1 ann@cacert.test 0 0",
        "1 ann@cacert.test 999 1001",
        "1 ann@cacert.test 1001 8",
        "1 ann@cacert.test -1 1001",
        "2 bob@cacert.test 1001 1001\n1 ann@cacert.test 1001 1001",
        "1 ann@cacert.test 1001 1001\n1 ann@cacert.test 1002 1002",
        "1 änn@cacert.test 1001 1001",
    ],
)
def test_a_line_that_cannot_be(file: Path, line: str) -> None:
    homes = put(file, ANN)
    file.write_text(f"{line}\n")
    with pytest.raises(UnsafePath, match=r"line [12]"):
        homes.find(1, "ann@cacert.test")


@pytest.mark.parametrize("harm", ["owner", "mode", "link"])
def test_a_file_that_is_not_root_s(file: Path, scratch: Path, harm: str) -> None:
    homes = put(file, ANN)
    if harm == "owner":
        os.chown(file, 4711, 4711)
    elif harm == "mode":
        file.chmod(0o666)
    else:
        file.rename(scratch / "elsewhere")
        file.symlink_to(scratch / "elsewhere")
    with pytest.raises(UnsafePath):
        homes.find(1, "ann@cacert.test")


@pytest.mark.asyncio
async def test_only_its_own_account_gets_it(machine: Machine, file: Path) -> None:
    home = machine.home()
    (home / "Maildir/cur").mkdir(parents=True)
    (home / "Maildir/cur/1").write_text("old mail")
    for path in (home, *home.rglob("*")):
        os.chown(path, 1001, 1002)
    ann = await machine.create()
    with pytest.raises(GiveUp, match="is the home of uid 1001"):
        await machine.sync(ann)
    machine.host.adopted = put(file, Adopted(ann, MailAddress("ann@cacert.test"), 1001, 1002))
    await machine.sync(ann)
    row = await machine.applied(ann)
    assert row is not None
    assert (row.stands, row.result["uid"], row.result["gid"]) == (True, 1001, 1002)
    assert (home / "Maildir/cur/1").read_text() == "old mail"
    status = (home / "Maildir/new").stat()
    assert (status.st_uid, status.st_gid) == (1001, 1002)
    await machine.delete(ann)
    await machine.sync(ann)
    second = await machine.create(reuse=True)
    await machine.sync(second)
    assert home.stat().st_uid == UID_FIRST + second
    assert list(home.rglob("cur/*")) == []
    assert (machine.archive(ann) / "Maildir/cur/1").exists()


@pytest.mark.asyncio
async def test_a_uid_of_our_own_range_is_never_adopted(machine: Machine, file: Path) -> None:
    ann, bob = await machine.create(), await machine.create("bob")
    await machine.sync(bob)
    uid = UID_FIRST + bob
    machine.host.adopted = put(file, Adopted(ann, MailAddress("ann@cacert.test"), uid, uid))
    with pytest.raises(GiveUp, match="another user's"):
        await machine.sync(ann)
    assert not machine.home().exists()
