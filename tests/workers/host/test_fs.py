"""The homes, as an attacker would have them. Needs root: the code under test gives directories to other users."""
# As in the code under test, names, descriptors and links are meant, not paths.
# ruff: noqa: PTH101, PTH102, PTH103, PTH108, PTH110, PTH115, PTH118, PTH208, PTH211

import ctypes
import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from app.addresses import DomainName, LocalPart
from app.errors import BadAddress
from app.workers.host import fs
from app.workers.host.fs import (
    ArchiveMissing,
    ArchiveTaken,
    FlockHeld,
    Home,
    HomeBroken,
    Homes,
    HomeTaken,
    HomeUnknown,
    UnsafePath,
    check_home,
    ensure_archived,
    ensure_home,
    ensure_purged,
    ensure_restored,
    has_archive,
    hold_lock,
    list_archives,
    list_homes,
    open_homes,
    owner_in_place,
    refuse_unknown,
    write_file,
)

UID, OTHER_UID, USER_ID = 20001, 20002, 7
ALICE = Home(None, LocalPart("alice"))
CAROL = Home(DomainName("example.org"), LocalPart("carol"))
PARTS = ("", "/Maildir", "/Maildir/cur", "/Maildir/new", "/Maildir/tmp")
both = pytest.mark.parametrize("home", [ALICE, CAROL], ids=["primary", "virtual"])


@pytest.fixture(autouse=True)
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("These tests must run as root: they make directories for other users.")


@contextmanager
def temporary_root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="fs-"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        # Not shutil.rmtree: it is recursive, and a test that fails may leave a tree that is too deep for it.
        subprocess.run(["/usr/bin/rm", "-rf", str(root)], check=True)


@pytest.fixture
def root() -> Iterator[Path]:
    with temporary_root() as root:
        yield root


@pytest.fixture
def homes(root: Path) -> Iterator[Homes]:
    with open_homes(root) as homes:
        yield homes


@pytest.fixture
def victim(root: Path) -> Iterator[Path]:
    """A directory of root's with a file; nothing in it may have changed when the test ends."""
    victim = root / "victim"
    victim.mkdir()
    (victim / "shadow").write_text("secret")
    (victim / "cur").mkdir()
    before = snapshot(victim)
    yield victim
    assert snapshot(victim) == before


def snapshot(top: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, uid and gid of everything at and below `top`."""
    found = {"": os.lstat(top)}
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            found[os.path.relpath(path, top)] = os.lstat(path)
    return {path: (status.st_mode, status.st_uid, status.st_gid) for path, status in found.items()}


def start_as_user(uid: int, function: Callable[[], Any]) -> int:
    """Run a function in a process of that user; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def run_as_user(uid: int, function: Callable[[], Any]) -> None:
    _, status = os.waitpid(start_as_user(uid, function), 0)
    assert status == 0


@contextmanager
def meanwhile(uid: int, function: Callable[[], Any]) -> Iterator[None]:
    """A program of the user that does the same again and again, until it is killed at the end."""
    read, write = os.pipe()

    def forever() -> None:
        for round_ in itertools.count():
            with suppress(OSError):
                function()
            if round_ == 1:
                os.write(write, b"x")

    pid = start_as_user(uid, forever)
    try:
        assert os.read(read, 1)
        yield
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the attacker died early"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


class Killed(BaseException):
    """Stands for SIGKILL: only descriptors are closed on its way out, as the kernel would."""


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """Die instead of making the system call number `step`, from 1."""
    steps = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "open",
            "mkdir",
            "rmdir",
            "unlink",
            "rename",
            "stat",
            "fstat",
            "fchmod",
            "fchown",
            "fsync",
            "scandir",
        ):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(fs, "_move", counted(fs._move))
        yield


def survives_every_kill(prepare: Callable[[Homes], Any], action: Callable[[Homes], Any]) -> int:
    """Kill `action` at every step, run it again, compare with a run that nobody killed; the number of steps."""
    with temporary_root() as root:
        with open_homes(root) as homes:
            prepare(homes)
            action(homes)
        right = snapshot(root)
    for step in itertools.count(1):
        with temporary_root() as root:
            with open_homes(root) as homes:
                prepare(homes)
            try:
                with killed_before(step), open_homes(root) as homes:
                    action(homes)
            except Killed:
                with open_homes(root) as homes:
                    action(homes)
                assert snapshot(root) == right, f"killed before step {step}"
            else:
                assert snapshot(root) == right
                return step - 1
    raise AssertionError


# Names and numbers


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../etc", "/etc", ".staging", "a\0", "a\n", "@x.org", "-rf", "ü"]
)
def test_no_other_name_becomes_a_home(name: str) -> None:
    with pytest.raises(BadAddress):
        Home(None, name)  # type: ignore[arg-type]  # a row that got past the types
    with pytest.raises(BadAddress):
        Home(name, LocalPart("alice"))  # type: ignore[arg-type]


@pytest.mark.parametrize("uid", [0, -1, 2**32 - 1, 2**32])
def test_no_home_for_root(homes: Homes, uid: int) -> None:
    for function in (ensure_home, check_home):
        with pytest.raises(ValueError, match="cannot be the uid"):
            function(homes, ALICE, uid)
    assert not os.path.lexists(homes.path_of(ALICE))


@pytest.mark.parametrize("user_id", [0, -1])
def test_no_archive_for_nobody(homes: Homes, user_id: int) -> None:
    with pytest.raises(ValueError, match="cannot be the id"):
        ensure_purged(homes, user_id)


# The directory of all homes


def test_makes_what_is_missing(root: Path) -> None:
    old = os.umask(0o077)
    try:
        with open_homes(root, "srv/home") as homes:
            assert homes.path == f"{root}/srv/home"
    finally:
        os.umask(old)
    assert {path: oct(mode) for path, (mode, _, _) in snapshot(root / "srv").items()} == {
        "": "0o40755",
        "home": "0o40755",
        "home/.staging": "0o40700",
        "home/.archive": "0o40700",
        "home/.trash": "0o40700",
    }


def test_leaves_the_mode_of_an_existing_directory_of_homes(root: Path) -> None:
    (root / "home").mkdir(mode=0o711)
    with open_homes(root):
        assert stat.S_IMODE((root / "home").stat().st_mode) == 0o711


@pytest.mark.parametrize("where", ["", "home", "home/.staging", "home/.archive", "home/.trash", "home/@example.org"])
@pytest.mark.parametrize("harm", ["foreign", "group", "world", "symlink", "file"])
def test_refuses_a_directory_that_others_can_change(root: Path, where: str, harm: str) -> None:
    path = root / where
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.chmod(0o755)
    if harm == "foreign":
        os.chown(path, UID, UID)
    elif harm in ("group", "world"):
        path.chmod(0o775 if harm == "group" else 0o757)
    else:
        path.rmdir()
        if harm == "symlink":
            (root.parent / f"{root.name}-elsewhere").mkdir()
            path.symlink_to(root.parent / f"{root.name}-elsewhere")
        else:
            path.touch()
    try:
        with pytest.raises(UnsafePath), open_homes(root) as homes:
            ensure_home(homes, CAROL, UID)
    finally:
        with suppress(FileNotFoundError):
            (root.parent / f"{root.name}-elsewhere").rmdir()
        if path == root and not path.is_dir():
            path.unlink()
            path.mkdir()


def test_check_refuses_a_domain_that_others_can_change(root: Path, homes: Homes) -> None:
    ensure_home(homes, CAROL, UID)
    (root / "home/@example.org").chmod(0o777)
    with pytest.raises(UnsafePath):
        check_home(homes, CAROL, UID)


@pytest.mark.parametrize("name", ["", "..", "home/..", "/home", "home/", "a//b", "."])
def test_refuses_a_crooked_path(root: Path, name: str) -> None:
    with pytest.raises(UnsafePath), open_homes(root, name):
        pass


# Homes


@both
def test_home_stands(root: Path, homes: Homes, home: Home) -> None:
    place = {ALICE: "alice", CAROL: "@example.org/carol"}[home]
    for _ in range(2):
        assert ensure_home(homes, home, UID) == f"{root}/home/{place}"
        check_home(homes, home, UID)
        assert set(snapshot(root / "home" / place).values()) == {(stat.S_IFDIR | 0o700, UID, UID)}
        assert len(snapshot(root / "home" / place)) == 5
    assert os.listdir(homes.staging) == []
    if home is CAROL:
        assert snapshot(root / "home/@example.org")[""] == (stat.S_IFDIR | 0o755, 0, 0)


@pytest.mark.parametrize("durable", [True, False])
def test_fsync_is_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch, durable: bool) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    with open_homes(root, durable=durable) as homes:
        ensure_home(homes, ALICE, UID)
        made = len(synced)
        ensure_home(homes, CAROL, UID)
        virtual, synced[made:] = synced[made:], []
    assert (f"{root}/home" in virtual) == (f"{root}/home/@example.org" in virtual) == durable
    new = [f"{root}/home/.staging/{UID}{part}" for part in reversed(PARTS)]
    old = [f"{root}/home/alice/Maildir", f"{root}/home/alice", f"{root}/home"]
    assert synced == ([str(root), f"{root}/home", *new, *old] if durable else [])
    synced.clear()
    fd = os.open(root, os.O_RDONLY)
    write_file(fd, "made", b"", 0o600, durable=durable)
    os.close(fd)
    assert synced == ([f"{root}/.made.new", str(root)] if durable else [])


@both
def test_home_survives_every_kill(home: Home) -> None:
    assert survives_every_kill(lambda homes: None, lambda homes: ensure_home(homes, home, UID)) > 40


@pytest.mark.parametrize("part", PARTS[1:])
def test_repair_survives_every_kill(part: str) -> None:
    def prepare(homes: Homes) -> None:
        shutil.rmtree(ensure_home(homes, ALICE, UID) + part)

    survives_every_kill(prepare, lambda homes: ensure_home(homes, ALICE, UID))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", [0o755, 0o000, 0o2700, 0o1777])
def test_sets_the_mode_and_group_right(homes: Homes, part: str, mode: int) -> None:
    path = Path(ensure_home(homes, ALICE, UID) + part)
    path.chmod(mode)
    with pytest.raises(HomeBroken, match="not drwx------"):
        check_home(homes, ALICE, UID)
    ensure_home(homes, ALICE, UID)
    check_home(homes, ALICE, UID)
    os.chown(path, -1, 100)
    with pytest.raises(HomeBroken, match=f"{UID}:100"):
        check_home(homes, ALICE, UID)
    ensure_home(homes, ALICE, UID)
    check_home(homes, ALICE, UID)


@pytest.mark.parametrize("part", PARTS)
def test_says_what_is_missing(homes: Homes, part: str) -> None:
    shutil.rmtree(ensure_home(homes, ALICE, UID) + part)
    with pytest.raises(HomeBroken, match="is missing"):
        check_home(homes, ALICE, UID)
    ensure_home(homes, ALICE, UID)
    check_home(homes, ALICE, UID)


def test_check_without_the_domain(homes: Homes) -> None:
    with pytest.raises(HomeBroken, match="is missing"):
        check_home(homes, CAROL, UID)
    assert not os.path.exists(f"{homes.path}/@example.org")


def test_mail_is_left_alone(homes: Homes) -> None:
    path = Path(ensure_home(homes, ALICE, UID))
    (path / "Maildir/cur/1").write_text("mail")
    os.chown(path / "Maildir/cur/1", 0, 0)
    shutil.rmtree(path / "Maildir/new")
    before = os.lstat(path / "Maildir/cur/1")
    ensure_home(homes, ALICE, UID)
    assert os.lstat(path / "Maildir/cur/1") == before


@both
def test_home_of_somebody_else(homes: Homes, home: Home) -> None:
    before = snapshot(Path(ensure_home(homes, home, OTHER_UID)))
    with pytest.raises(HomeTaken) as caught:
        ensure_home(homes, home, UID)
    assert caught.value.owner == OTHER_UID
    with pytest.raises(HomeBroken, match=f"{OTHER_UID}:{OTHER_UID}, not drwx------ {UID}:{UID}"):
        check_home(homes, home, UID)
    assert snapshot(Path(homes.path_of(home))) == before


@pytest.mark.parametrize("part", PARTS[1:])
def test_part_of_somebody_else_is_not_taken(homes: Homes, part: str) -> None:
    """Not even root's: the owner may have renamed into this place whatever root has made in the home."""
    path = Path(ensure_home(homes, ALICE, UID) + part)
    shutil.rmtree(path)
    path.mkdir(mode=0o755)
    with pytest.raises(HomeBroken, match="belongs to uid 0"):
        ensure_home(homes, ALICE, UID)
    with pytest.raises(HomeBroken):
        check_home(homes, ALICE, UID)
    assert snapshot(path)[""] == (stat.S_IFDIR | 0o755, 0, 0)


def put_symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def put_dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "nothing")


def put_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def put_hard_link(path: Path, victim: Path) -> None:
    os.link(victim / "shadow", path)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("put", [put_symlink, put_dangling, put_fifo, put_hard_link])
@both
def test_something_else_in_the_place(homes: Homes, victim: Path, home: Home, part: str, put: Any) -> None:
    path = Path(ensure_home(homes, home, UID) + part)
    shutil.rmtree(path)
    put(path, victim)
    os.chown(path, UID, UID, follow_symlinks=False)
    for function in (ensure_home, check_home):
        with pytest.raises(HomeBroken, match=r"symbolic link, or no directory|, not drwx------"):
            function(homes, home, UID)
    os.chown(path, 0, 0, follow_symlinks=False)


@pytest.mark.parametrize("part", PARTS[1:])
def test_the_owner_swaps_directories_for_links(homes: Homes, victim: Path, part: str) -> None:
    path = ensure_home(homes, ALICE, UID) + part
    renameat2 = ctypes.CDLL(None).renameat2
    held: list[int] = []
    outcomes: set[type[Exception] | None] = set()

    def swap() -> None:
        if not held:
            held.append(os.open(path, os.O_RDONLY))
            os.symlink(victim, path + "-link")
        os.fchmod(held[0], 0o755)
        renameat2(-100, path.encode(), -100, (path + "-link").encode(), 2)  # RENAME_EXCHANGE

    with meanwhile(UID, swap):
        for _ in range(1500):
            for function in (ensure_home, check_home):
                try:
                    function(homes, ALICE, UID)
                except (HomeBroken, FileExistsError, FileNotFoundError) as error:
                    outcomes.add(type(error))
                else:
                    outcomes.add(None)
    assert outcomes >= {HomeBroken, None}


def test_disk_full_then_not(root: Path) -> None:
    """ENOSPC at each inode that a home needs; afterwards the same call succeeds."""
    mount = root / "host"
    mount.mkdir()
    failed = []
    for inodes in range(6, 12):  # The root, homes and three directories of ours take five.
        options = f"size=1m,mode=755,nr_inodes={inodes}"
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", options, "none", str(mount)], check=True)
        try:
            with open_homes(mount) as homes:
                try:
                    ensure_home(homes, ALICE, UID)
                except OSError as error:
                    failed.append(error.errno)
                    assert not os.path.lexists(homes.path_of(ALICE))
                again = ["/usr/bin/mount", "-o", "remount,nr_inodes=100", str(mount)]
                subprocess.run(again, check=True)
                ensure_home(homes, ALICE, UID)
                check_home(homes, ALICE, UID)
                assert os.listdir(homes.staging) == []
        finally:
            subprocess.run(["/usr/bin/umount", mount], check=True)
    assert set(failed) == {errno.ENOSPC}
    assert len(failed) < 6


def test_never_replaces_what_appears_in_between(homes: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory, which rename(2) would replace."""
    ensure_home(homes, ALICE, UID)
    ensure_archived(homes, ALICE, UID, USER_ID)
    os.mkdir(homes.path_of(ALICE), 0o711)
    os.mkdir(f"{homes.path}/.archive/{USER_ID + 1}", 0o711)
    before = snapshot(Path(homes.path))
    lstat = fs._lstat
    for blind, function in (
        ("alice", lambda: ensure_home(homes, ALICE, UID)),
        ("alice", lambda: ensure_restored(homes, ALICE, UID, USER_ID)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(fs, "_lstat", lambda fd, name, blind=blind: None if name == blind else lstat(fd, name))
            with pytest.raises(FileExistsError):
                function()
    os.chown(homes.path_of(ALICE), UID, UID)
    with monkeypatch.context() as patch:
        patch.setattr(fs, "_lstat", lambda fd, name: None if name == str(USER_ID + 1) else lstat(fd, name))
        with pytest.raises(FileExistsError):
            ensure_archived(homes, ALICE, UID, USER_ID + 1)
    os.chown(homes.path_of(ALICE), 0, 0)
    shutil.rmtree(f"{homes.path}/.staging/{UID}")
    assert snapshot(Path(homes.path)) == before


def test_something_else_in_the_staging_directory(homes: Homes, victim: Path) -> None:
    os.symlink(victim, f"{homes.path}/.staging/{UID}")
    with pytest.raises(OSError, match="Not a directory"):
        ensure_home(homes, ALICE, UID)


# Archive


@both
def test_archived_and_restored(homes: Homes, home: Home) -> None:
    path = Path(ensure_home(homes, home, UID))
    (path / "Maildir/cur/1").write_text("mail")
    before = snapshot(path)
    for _ in range(2):
        assert ensure_archived(homes, home, UID, USER_ID)
        assert not path.exists()
        assert snapshot(Path(homes.path, ".archive", str(USER_ID))) == before
    for _ in range(2):
        ensure_restored(homes, home, UID, USER_ID)
        assert snapshot(path) == before
        assert os.listdir(homes.archive) == []


@both
def test_nothing_to_archive_or_restore(homes: Homes, home: Home) -> None:
    assert not ensure_archived(homes, home, UID, USER_ID)
    with pytest.raises(ArchiveMissing):
        ensure_restored(homes, home, UID, USER_ID)


@both
def test_archive_survives_every_kill(home: Home) -> None:
    def archive(homes: Homes) -> None:
        assert ensure_archived(homes, home, UID, USER_ID)

    survives_every_kill(lambda homes: ensure_home(homes, home, UID), archive)


@both
def test_restore_survives_every_kill(home: Home) -> None:
    def prepare(homes: Homes) -> None:
        ensure_home(homes, home, UID)
        ensure_archived(homes, home, UID, USER_ID)

    survives_every_kill(prepare, lambda homes: ensure_restored(homes, home, UID, USER_ID))


def test_a_successor_keeps_its_home(homes: Homes) -> None:
    path = Path(ensure_home(homes, ALICE, UID))
    ensure_archived(homes, ALICE, UID, USER_ID)
    ensure_home(homes, ALICE, OTHER_UID)
    before = snapshot(path)
    assert ensure_archived(homes, ALICE, UID, USER_ID)
    assert not ensure_archived(homes, ALICE, UID, USER_ID + 1)
    with pytest.raises(HomeTaken):
        ensure_restored(homes, ALICE, UID, USER_ID)
    assert snapshot(path) == before
    assert os.listdir(homes.archive) == [str(USER_ID)]


def test_never_two_homes_in_one_archive(homes: Homes) -> None:
    ensure_home(homes, ALICE, UID)
    ensure_archived(homes, ALICE, UID, USER_ID)
    ensure_home(homes, ALICE, UID)
    before = snapshot(Path(homes.path))
    with pytest.raises(ArchiveTaken):
        ensure_archived(homes, ALICE, UID, USER_ID)
    with pytest.raises(ArchiveTaken):
        ensure_restored(homes, ALICE, UID, USER_ID)
    assert snapshot(Path(homes.path)) == before


def test_restores_no_home_of_another(homes: Homes) -> None:
    ensure_home(homes, ALICE, OTHER_UID)
    ensure_archived(homes, ALICE, OTHER_UID, USER_ID)
    with pytest.raises(ArchiveTaken):
        ensure_restored(homes, ALICE, UID, USER_ID)


@pytest.mark.parametrize("put", [put_symlink, put_dangling, put_fifo, put_hard_link])
def test_archives_and_restores_directories_only(homes: Homes, victim: Path, put: Any) -> None:
    for path in (homes.path_of(ALICE), f"{homes.path}/.archive/{USER_ID}"):
        put(Path(path), victim)
        os.chown(path, UID, UID, follow_symlinks=False)
        with pytest.raises((HomeBroken, ArchiveTaken)):
            (ensure_archived if path.endswith("alice") else ensure_restored)(homes, ALICE, UID, USER_ID)
        os.chown(path, 0, 0, follow_symlinks=False)
        os.unlink(path)


# Purging


def fill(homes: Homes, victim: Path | None = None) -> Path:
    """An archived home with everything that its owner could leave in it."""
    path = Path(ensure_home(homes, ALICE, UID))
    folder = os.fsencode(path / "Maildir")
    for name in (b"\xff\xfe", b"\xe4" * 255, b"n" * 255, b" \n\t", b"-rf", b"*", b"%s", b"..."):
        os.mkdir(folder + b"/" + name)
        os.close(os.open(folder + b"/" + name + b"/" + name, os.O_CREAT))
    os.mkfifo(path / "fifo")
    (path / "locked/inside").mkdir(parents=True)
    (path / "locked").chmod(0)
    if victim is not None:
        (path / "link").symlink_to(victim)
        (path / "Maildir/link").symlink_to(victim / "shadow")
        os.link(victim / "shadow", path / "hard")
        (path / "up").symlink_to("../../..")
    for name in (b"/1", b"/2"):
        os.mkdir(os.fsencode(path) + name)
        os.mkdir(os.fsencode(path) + name + b"/1")
    ensure_archived(homes, ALICE, UID, USER_ID)
    return Path(homes.path, ".archive", str(USER_ID))


def test_purged(homes: Homes, victim: Path) -> None:
    before = snapshot(Path(homes.path))
    fill(homes, victim)
    for _ in range(2):
        ensure_purged(homes, USER_ID)
        assert snapshot(Path(homes.path)) == before


def test_purges_one_user_alone(homes: Homes) -> None:
    fill(homes)
    ensure_home(homes, ALICE, OTHER_UID)
    ensure_archived(homes, ALICE, OTHER_UID, USER_ID + 1)
    before = snapshot(Path(homes.path, ".archive", str(USER_ID + 1)))
    ensure_purged(homes, USER_ID)
    assert snapshot(Path(homes.path, ".archive", str(USER_ID + 1))) == before


def test_purge_survives_every_kill() -> None:
    assert survives_every_kill(fill, lambda homes: ensure_purged(homes, USER_ID)) > 100


@pytest.mark.parametrize("put", [put_symlink, put_dangling, put_fifo, put_hard_link])
def test_purges_an_archive_that_is_no_directory(homes: Homes, victim: Path, put: Any) -> None:
    put(Path(homes.path, ".archive", str(USER_ID)), victim)
    ensure_purged(homes, USER_ID)
    assert os.listdir(homes.archive) == os.listdir(homes.trash) == []


def test_purges_a_deep_tree_with_few_descriptors(homes: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    top = fd = os.open(ensure_home(homes, ALICE, UID), os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("d" * 200, dir_fd=fd)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    assert top > 2
    ensure_archived(homes, ALICE, UID, USER_ID)
    most, opened = 0, os.open

    def counting(*args: Any, **kwargs: Any) -> int:
        nonlocal most
        fd = opened(*args, **kwargs)
        most = max(most, fd)
        return fd

    lowest = os.dup(0)
    os.close(lowest)
    monkeypatch.setattr(os, "open", counting)
    ensure_purged(homes, USER_ID)
    assert most < lowest + 10
    assert os.listdir(homes.archive) == os.listdir(homes.trash) == []


def test_purge_goes_on_where_it_stopped(homes: Homes) -> None:
    fill(homes)
    with pytest.raises(TimeoutError):
        ensure_purged(homes, USER_ID, seconds=-1)
    assert os.listdir(homes.trash) == [str(USER_ID)]
    ensure_purged(homes, USER_ID)
    assert os.listdir(homes.trash) == []


def test_purge_enters_no_mount_point(homes: Homes, victim: Path) -> None:
    """A bind mount of the same file system, which st_dev would not tell."""
    place = fill(homes) / "Maildir/cur"
    subprocess.run(["/usr/bin/mount", "--bind", victim, place], check=True)
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="busy"):
                ensure_purged(homes, USER_ID)
    finally:
        [left] = (
            line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if homes.path in line
        )
        subprocess.run(["/usr/bin/umount", left], check=True)
    ensure_purged(homes, USER_ID)


def test_purge_stops_at_an_immutable_name(homes: Homes) -> None:
    place = fill(homes) / "Maildir/cur"
    (place / "held").touch()
    subprocess.run(["/usr/bin/chattr", "+i", place / "held"], check=True)
    try:
        with pytest.raises(PermissionError):
            ensure_purged(homes, USER_ID)
    finally:
        [held] = Path(homes.path).rglob("held")
        subprocess.run(["/usr/bin/chattr", "-i", held], check=True)
    ensure_purged(homes, USER_ID)


def test_the_owner_works_in_a_home_that_is_purged(homes: Homes, victim: Path) -> None:
    """Its program has the deepest directory open, makes names, and swaps directories for links to the victim."""
    renameat2 = ctypes.CDLL(None).renameat2
    for _ in range(25):
        path = ensure_home(homes, ALICE, UID)
        deepest = os.path.join(path, *("d" * 20))
        run_as_user(UID, lambda deepest=deepest: os.makedirs(deepest))  # type: ignore[misc]
        here = os.open(deepest, os.O_RDONLY)
        names = itertools.count()

        def attack(here: int = here, names: Iterator[int] = names) -> None:
            name = next(names)
            os.fchdir(here)
            os.mkdir(f"{name}")
            os.symlink(victim, f"{name}-link")
            renameat2(-100, b"%d" % name, -100, b"%d-link" % name, 2)
            os.chmod(".", 0o777)  # noqa: S103 - the attacker may

        with meanwhile(UID, attack):
            ensure_archived(homes, ALICE, UID, USER_ID)
            ensure_purged(homes, USER_ID)
        os.close(here)
        assert os.listdir(homes.archive) == os.listdir(homes.trash) == []


# Not root


def test_purge_stops_when_it_is_told_to(homes: Homes) -> None:
    ensure_home(homes, ALICE, UID)
    for number in range(10):
        (Path(homes.path) / f"alice/Maildir/new/{number}").touch()
    ensure_archived(homes, ALICE, UID, USER_ID)
    asked = itertools.count()
    with pytest.raises(TimeoutError):
        ensure_purged(homes, USER_ID, stopped=lambda: next(asked) == 5)
    ensure_purged(homes, USER_ID)
    assert os.listdir(homes.trash) == []


# Whose it is


def test_owner_in_place(homes: Homes, victim: Path) -> None:
    for home in (ALICE, CAROL):
        assert owner_in_place(homes, home) is None
        ensure_home(homes, home, UID)
        assert owner_in_place(homes, home) == UID
    shutil.rmtree(f"{homes.path}/alice/Maildir")
    assert owner_in_place(homes, ALICE) == UID
    shutil.rmtree(f"{homes.path}/alice")
    os.symlink(victim, f"{homes.path}/alice")
    os.lchown(f"{homes.path}/alice", OTHER_UID, OTHER_UID)
    assert owner_in_place(homes, ALICE) == OTHER_UID


def put_file(home: str) -> None:
    Path(home, "note").touch()


def put_hidden(home: str) -> None:
    Path(home, "Maildir/.Sent").mkdir()


def put_mail(home: str) -> None:
    Path(home, "Maildir/cur/1").touch()


def put_link(home: str) -> None:
    Path(home, "Maildir/tmp").rmdir()
    Path(home, "Maildir/tmp").symlink_to("/tmp")


def put_instead(home: str) -> None:
    shutil.rmtree(home)
    Path(home).touch()
    os.chown(home, UID, UID)


@pytest.mark.parametrize("put", [put_file, put_hidden, put_mail, put_link, put_instead])
@both
def test_what_nobody_knows_is_refused(homes: Homes, home: Home, put: Callable[[str], None]) -> None:
    path = ensure_home(homes, home, UID)
    put(path)
    before = snapshot(Path(homes.path))
    with pytest.raises(HomeUnknown, match=f"{path} holds files"):
        refuse_unknown(homes, home, UID, USER_ID)
    refuse_unknown(homes, home, UID, USER_ID, look_in_place=False)
    refuse_unknown(homes, home, OTHER_UID, USER_ID)  # HomeTaken is for `ensure_home` to say
    assert snapshot(Path(homes.path)) == before


@both
def test_an_archive_that_nobody_knows_is_refused(homes: Homes, home: Home) -> None:
    path = ensure_home(homes, home, UID)
    put_mail(path)
    ensure_archived(homes, home, UID, USER_ID)
    for look_in_place in (True, False):
        with pytest.raises(HomeUnknown, match=f"{homes.path}/.archive/{USER_ID} holds files"):
            refuse_unknown(homes, home, UID, USER_ID, look_in_place=look_in_place)
    refuse_unknown(homes, home, UID, USER_ID + 1)


@pytest.mark.parametrize("missing", ["", *PARTS])
def test_empty_homes_are_nobodys(homes: Homes, missing: str) -> None:
    """What a run that was killed has made, wherever it was killed."""
    refuse_unknown(homes, ALICE, UID, USER_ID)
    path = ensure_home(homes, ALICE, UID)
    if missing:
        shutil.rmtree(f"{path}{missing}")
    refuse_unknown(homes, ALICE, UID, USER_ID)
    ensure_archived(homes, ALICE, UID, USER_ID)
    refuse_unknown(homes, ALICE, UID, USER_ID)


def test_lists_what_lies_there(homes: Homes, victim: Path) -> None:
    assert (list(list_homes(homes)), list_archives(homes)) == ([], [])
    for home, uid in ((ALICE, UID), (CAROL, OTHER_UID)):
        ensure_home(homes, home, uid)
    for name in ("UPPER", "a b", "line\nbreak", "ü", "@nodot", "@example.org/.x"):
        os.mkdir(f"{homes.path}/{name}")
    os.mkdir(os.fsencode(homes.path) + b"/\xff")
    os.symlink(victim, f"{homes.path}/link")
    os.symlink(victim, f"{homes.path}/@example.net")
    Path(f"{homes.path}/@example.com").touch()
    found = {path.removeprefix(homes.path): (home, owner) for home, path, owner in list_homes(homes)}
    assert found == {
        "/alice": (ALICE, UID),
        "/@example.org/carol": (CAROL, OTHER_UID),
        "/link": (Home(None, LocalPart("link")), 0),
    } | dict.fromkeys(("/UPPER", "/a b", "/line\nbreak", "/ü", "/\udcff", "/@example.org/.x"), (None, 0))
    ensure_archived(homes, ALICE, UID, USER_ID)
    Path(f"{homes.path}/.archive/rubbish").touch()
    assert list_archives(homes) == [USER_ID]
    assert (has_archive(homes, USER_ID), has_archive(homes, USER_ID + 1)) == (True, False)


def test_looks_without_making(root: Path) -> None:
    (root / "home").mkdir()
    before = snapshot(root)
    with open_homes(root, make=False) as homes:
        assert (has_archive(homes, USER_ID), list_archives(homes), list(list_homes(homes))) == (False, [], [])
        assert owner_in_place(homes, CAROL) is None
    assert snapshot(root) == before
    with open_homes(root) as homes:
        ensure_home(homes, ALICE, UID)
        ensure_archived(homes, ALICE, UID, USER_ID)
    with open_homes(root, make=False) as homes:
        assert (has_archive(homes, USER_ID), list_archives(homes)) == (True, [USER_ID])


def test_without_root(root: Path) -> None:
    """The embedded default: all homes belong to whoever runs the worker."""
    os.chown(root, 65534, 65534)

    def life() -> None:
        with open_homes(root) as homes:
            for home in (ALICE, CAROL):
                for _ in range(2):
                    path = ensure_home(homes, home, UID)
                    check_home(homes, home, UID)
                assert set(snapshot(Path(path)).values()) == {(stat.S_IFDIR | 0o700, 65534, 65534)}
                assert ensure_archived(homes, home, UID, USER_ID)
                ensure_restored(homes, home, UID, USER_ID)
                assert ensure_archived(homes, home, UID, USER_ID)
                ensure_purged(homes, USER_ID)
                assert not os.path.exists(path)

    run_as_user(65534, life)


def test_without_root_a_home_of_root_is_taken(root: Path) -> None:
    os.chown(root, 65534, 65534)
    (root / "home").mkdir()
    (root / "home/alice").mkdir()
    os.chown(root / "home", 65534, 65534)

    def life() -> None:
        with open_homes(root) as homes, pytest.raises(HomeTaken):
            ensure_home(homes, ALICE, UID)

    run_as_user(65534, life)


# Files and the lock


def test_writes_a_file(root: Path, victim: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    (root / "made").symlink_to(victim / "shadow")
    (root / ".made.new").symlink_to(victim / "shadow")
    for data in (b"one", b"two" * 100_000):
        write_file(fd, "made", data, 0o640)
        assert (root / "made").read_bytes() == data
        assert stat.S_IMODE(os.lstat(root / "made").st_mode) == 0o640
    for name in ("", ".", "..", "a/b", "a\0b"):
        with pytest.raises(UnsafePath):
            write_file(fd, name, b"", 0o644)
    os.close(fd)
    assert sorted(os.listdir(root)) == ["made", "victim"]


def test_a_file_is_old_or_new_at_every_kill(root: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    seen = set()
    for step in itertools.count(1):
        (root / "made").write_bytes(b"old")
        try:
            with killed_before(step):
                write_file(fd, "made", b"new", 0o600)
        except Killed:
            seen.add((root / "made").read_bytes())
        else:
            break
    os.close(fd)
    assert (root / "made").read_bytes() == b"new"
    assert os.listdir(root) == ["made"]
    assert seen == {b"old", b"new"}


def test_one_lock(root: Path) -> None:
    path = root / "lock"
    held = hold_lock(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FlockHeld):
        hold_lock(path)
    os.close(held)
    os.close(hold_lock(path))


def test_lock_file_of_the_worker_alone(root: Path) -> None:
    path = root / "lock"
    path.touch()
    path.chmod(0o666)
    with pytest.raises(UnsafePath):
        hold_lock(path)
    path.chmod(0o600)
    os.chown(path, UID, UID)
    with pytest.raises(UnsafePath):
        hold_lock(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnsafePath):
        hold_lock(path)
    path.unlink()
    path.symlink_to(root / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        hold_lock(path)
    assert not (root / "elsewhere").exists()
