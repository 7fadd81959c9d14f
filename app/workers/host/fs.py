"""The homes of all mailboxes, and the few other files that the host's worker writes.

SECURITY: runs as root (as any other user in the embedded default, see `Homes.owner_of`). Takes names and numbers from
rows that an attacker may have written, and meets directories in which mailbox owners run programs of their own, at the
same moment. It writes below the directory of all homes, into directories whose descriptor the caller hands over, and
to one lock file; nowhere else. Five rules hold all of it together:

 1. A user's tree is reached one name at a time, from a directory descriptor, never through a symbolic link.
 2. Nothing is given to a user but an empty directory made a moment before where no user can reach it.
 3. What is already there is never given to another user; its mode and group are changed only through a descriptor that
    has been seen to be the same user's own directory. Files are neither opened nor changed, so hard links are harmless.
 4. A move never replaces anything (renameat2(2), RENAME_NOREPLACE).
 5. A tree is taken away from its owner before it is emptied.

Every function may be killed anywhere and run again. An OSError that escapes (ENOSPC, EIO, EBUSY, a time limit) may pass
and is for the caller to retry; a HostError says what stands in the way:

    HostError
    ├── HomeTaken       another uid's home is in the place: passes once that one has been archived
    ├── HomeBroken      the home is not as mail needs it, and only its owner or an administrator can mend it
    ├── HomeUnknown     files lie where this user's should, and nothing says that they are this user's
    ├── ArchiveTaken    the archive holds something else under this user's id
    ├── ArchiveMissing  there is nothing to restore
    ├── UnsafePath      somebody but the worker could change what lies there: an administrator must look
    ├── FlockHeld       another worker runs on this host
    └── CommandFailed, NotConfigured (commands.py)
"""

import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from app.addresses import DomainName, LocalPart
from app.errors import BadAddress

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
_LEAVES = ("cur", "new", "tmp")
_SKELETON = ("", "/Maildir", *(f"/Maildir/{leaf}" for leaf in _LEAVES))

_renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


class HostError(Exception):
    """The host is not as it should be; the text is a sentence for administrators."""


class HomeTaken(HostError):
    """`owner` is the uid whose home it is."""

    def __init__(self, path: str, owner: int) -> None:
        super().__init__(f"{path} is the home of uid {owner}.")
        self.owner = owner


class HomeBroken(HostError): ...


class HomeUnknown(HostError): ...


class ArchiveTaken(HostError): ...


class ArchiveMissing(HostError): ...


class UnsafePath(HostError): ...


class FlockHeld(HostError): ...


@dataclass(frozen=True, slots=True)
class Home:
    """Whose home; `domain` is None for the primary domain. Raises BadAddress."""

    domain: DomainName | None
    local_part: LocalPart

    def __post_init__(self) -> None:
        # These become file names, so a plain str that got past the type checker is parsed once more.
        object.__setattr__(self, "local_part", LocalPart(self.local_part))
        if self.domain is not None:
            object.__setattr__(self, "domain", DomainName(self.domain))


@dataclass(frozen=True, slots=True)
class Homes:
    """The directory of all homes, held open; made by `open_homes` alone. Threads may share it.

    `durable` False leaves out every fsync(2). `staging`, `archive` and `trash` are descriptors of the worker's own
    directories beside the homes, mode 0700.
    """

    path: str
    fd: int
    staging: int
    archive: int
    trash: int
    durable: bool
    groups: dict[int, int] = field(default_factory=dict)
    """The gid of a uid that has another than itself: of adopted homes alone."""

    def path_of(self, home: Home) -> str:
        """The absolute path, as Dovecot sees it; for people and for comparing, never for opening."""
        domain = "" if home.domain is None else f"@{home.domain}/"
        return f"{self.path}/{domain}{home.local_part}"

    def owner_of(self, uid: int) -> tuple[int, int]:
        """The uid and gid that a home of `uid` has on disk: those of the worker itself where it is not root."""
        if not 0 < uid < 2**32 - 1:  # chown(2) takes the highest, (uid_t) -1, for "leave as it is", which is root.
            raise ValueError(f"{uid} cannot be the uid of a mailbox.")
        return (uid, self.groups.get(uid, uid)) if os.geteuid() == 0 else (os.geteuid(), os.getegid())

    def sync(self, *fds: int) -> None:
        if self.durable:
            for fd in fds:
                os.fsync(fd)


@contextmanager
def open_homes(root: Path, homes: str = "home", *, durable: bool = True, make: bool = True) -> Iterator[Homes]:
    """Open `homes` below the host root `root`, an existing directory; make what is missing below it, mode 0755.

    Without `make` nothing is made or changed, for looking alone: of the worker's own directories only the archive is
    opened then, if there is one.

    Raises UnsafePath for a symbolic link anywhere on the way and, as root, if anybody else may write to one of these.
    """
    top = root.absolute()
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        try:
            fd = keep(os.open("/", _DIRECTORY))
            for name in top.parts[1:]:
                fd = keep(_enter(fd, name))
            _refuse_shared(fd, str(top))
            if not make:
                for name in _components(homes):
                    fd = keep(_enter(fd, name))
                archive = keep(_enter(fd, ".archive")) if _lstat(fd, ".archive") else -1
                yield Homes(str(top / homes), fd, -1, archive, -1, durable)
                return
            for name in _components(homes):
                parent, fd = fd, keep(_own_directory(fd, name, 0o755, exact=False))
                if durable:
                    os.fsync(parent)
            staging, archive, trash = (keep(_own_directory(fd, n, 0o700)) for n in (".staging", ".archive", ".trash"))
            if durable:
                os.fsync(fd)
        except NotADirectoryError as error:
            raise UnsafePath(f"{top / homes}: {error.filename} is a symbolic link, or no directory.") from error
        yield Homes(str(top / homes), fd, staging, archive, trash, durable)


def ensure_home(homes: Homes, home: Home, uid: int) -> str:
    """Make the home and its Maildir stand, all 0700 and of owner `uid:uid`; return the path as Dovecot sees it.

    Parts that are missing in an own home are made again; mode and group are set right. Raises HomeTaken and HomeBroken.
    """
    path = homes.path_of(home)
    owner, _ = homes.owner_of(uid)
    with _parent(homes, home, make=True) as parent:
        if _lstat(parent, home.local_part) is None:
            _build(homes, uid)
            _move(homes.staging, str(uid), parent, home.local_part)
        try:
            with _entered(parent, home.local_part) as place:
                if (found := os.fstat(place).st_uid) != owner:
                    raise HomeTaken(path, found)
                _close_to_others(homes, place, uid, path)
                with _part(homes, place, "/Maildir", uid, path) as mail:
                    for leaf in _LEAVES:
                        with _part(homes, mail, f"/Maildir/{leaf}", uid, path):
                            pass
                    homes.sync(mail, place, parent)
            _unbuild(homes, uid)
        except NotADirectoryError as error:
            raise HomeBroken(f"{path}: {error.filename} is a symbolic link, or no directory.") from error
    return path


def check_home(homes: Homes, home: Home, uid: int) -> None:
    """Prove, changing nothing, that `ensure_home` has nothing to do; raise HomeBroken otherwise. Takes about 20 µs."""
    wanted = (stat.S_IFDIR | 0o700, *homes.owner_of(uid))
    try:
        with (
            _parent(homes, home, make=False) as parent,
            _entered(parent, home.local_part) as place,
            _entered(place, "Maildir") as mail,
        ):
            found = [os.fstat(place), os.fstat(mail)]
            found += [os.stat(leaf, dir_fd=mail, follow_symlinks=False) for leaf in _LEAVES]
    except FileNotFoundError as error:
        raise HomeBroken(f"{homes.path_of(home)}: {error.filename} is missing.") from error
    except NotADirectoryError as error:
        raise HomeBroken(f"{homes.path_of(home)}: {error.filename} is a symbolic link, or no directory.") from error
    for part, status in zip(_SKELETON, found, strict=True):
        if (status.st_mode, status.st_uid, status.st_gid) != wanted:
            raise HomeBroken(f"{homes.path_of(home)}{part} is {_shown(*_fields(status))}, not {_shown(*wanted)}.")


def ensure_archived(homes: Homes, home: Home, uid: int, user_id: int) -> bool:
    """Move the home of `uid` into the archive; True if it lies there now, False if there was none to keep.

    A home of another owner in the place is a successor's and stays. Where the worker is not root all homes have one
    owner, so that the caller must know by itself that it has not archived already. Raises ArchiveTaken, HomeBroken.
    """
    owner, _ = homes.owner_of(uid)
    kept = _user_name(user_id)
    with _parent(homes, home, make=True) as parent:
        here, there = _lstat(parent, home.local_part), _lstat(homes.archive, kept)
        own = here is not None and here.st_uid == owner
        if here and own and not stat.S_ISDIR(here.st_mode):
            raise HomeBroken(f"{homes.path_of(home)} is no directory.")
        if own and there:
            raise ArchiveTaken(f"{homes.path_of(home)} is in place, and user {user_id} has an archive already.")
        if own:
            _move(parent, home.local_part, homes.archive, kept)
        homes.sync(parent, homes.archive)  # Also if nothing was moved: a run that was killed may have moved it.
        return own or there is not None


def ensure_restored(homes: Homes, home: Home, uid: int, user_id: int) -> None:
    """Move the home of `uid` back out of the archive. Raises ArchiveMissing, ArchiveTaken and HomeTaken."""
    owner, _ = homes.owner_of(uid)
    path, kept = homes.path_of(home), _user_name(user_id)
    with _parent(homes, home, make=True) as parent:
        here, there = _lstat(parent, home.local_part), _lstat(homes.archive, kept)
        if here and here.st_uid != owner:
            raise HomeTaken(path, here.st_uid)
        if here and there:
            raise ArchiveTaken(f"{path} is in place, and user {user_id} has an archive beside it.")
        if not here and not there:
            raise ArchiveMissing(f"There is neither {path} nor an archive of user {user_id}.")
        if there:
            if not stat.S_ISDIR(there.st_mode) or there.st_uid != owner:
                raise ArchiveTaken(f"The archive of user {user_id} is {_shown(*_fields(there))}, no home of {owner}.")
            _move(homes.archive, kept, parent, home.local_part)
        homes.sync(parent, homes.archive)


def stat_in_place(homes: Homes, home: Home) -> os.stat_result | None:
    """What lies in the place of the home, whatever it is; None if nothing does."""
    try:
        with _parent(homes, home, make=False) as parent:
            return _lstat(parent, home.local_part)
    except FileNotFoundError:
        return None


def owner_in_place(homes: Homes, home: Home) -> int | None:
    found = stat_in_place(homes, home)
    return None if found is None else found.st_uid


def has_archive(homes: Homes, user_id: int) -> bool:
    return homes.archive >= 0 and _lstat(homes.archive, _user_name(user_id)) is not None


def refuse_unknown(homes: Homes, home: Home, uid: int, user_id: int, *, look_in_place: bool = True) -> None:
    """Raise HomeUnknown if files of this uid lie in the place, or in the archive of this user; empty homes are none.

    For a user of whom nothing was ever made as far as the database knows. A database that was made anew counts its
    users from 1 again, and so gives away the uids, and the homes, of people that it does not know.
    """
    places: list[tuple[int, str, str]] = []
    with ExitStack() as stack:
        if look_in_place and owner_in_place(homes, home) == homes.owner_of(uid)[0]:
            parent = stack.enter_context(_parent(homes, home, make=False))
            places.append((parent, home.local_part, homes.path_of(home)))
        if has_archive(homes, user_id):
            places.append((homes.archive, _user_name(user_id), f"{homes.path}/.archive/{user_id}"))
        for parent, name, path in places:
            if not _is_bare(parent, name):
                raise HomeUnknown(
                    f"{path} holds files, and nothing in the database says that they are user {user_id}'s: a database "
                    "that was made anew counts from 1 again. If they are, run `cacert-mail sweep --trust-homes` on this "
                    "host, once; otherwise move them away."
                )


def list_homes(homes: Homes) -> Iterator[tuple[Home | None, str, int]]:
    """What lies in the places of homes: whose place (None: no address has that name), path and owner."""
    for domain, name, owner in _list_places(homes):
        path = f"{homes.path}/{'' if domain is None else f'@{domain}/'}{name}"
        try:
            home = Home(domain, LocalPart(name))
        except BadAddress:
            yield None, path, owner
        else:
            yield (home if home.local_part == name else None), path, owner


def _list_places(homes: Homes) -> Iterator[tuple[DomainName | None, str, int]]:
    for name in os.listdir(homes.fd):
        if name.startswith("."):
            continue
        if not name.startswith("@"):
            if (found := _lstat(homes.fd, name)) is not None:
                yield None, name, found.st_uid
            continue
        with suppress(BadAddress, NotADirectoryError, FileNotFoundError):
            domain = DomainName(name[1:])
            with _entered(homes.fd, name) as fd:
                for below in os.listdir(fd):
                    if (found := _lstat(fd, below)) is not None:
                        yield domain, below, found.st_uid


def list_archives(homes: Homes) -> list[int]:
    """The ids of the users whose archives are kept."""
    names = os.listdir(homes.archive) if homes.archive >= 0 else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def ensure_purged(
    homes: Homes, user_id: int, *, seconds: float = 600, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Remove the archive of a user, however deep and whatever the names.

    Raises TimeoutError after `seconds`, or once `stopped()` is true.

    Every directory is first moved into one flat directory of the worker's own, then taken over, then emptied, so that
    neither depth nor a program of the owner that still has it open matters. A mount point cannot be moved (EBUSY, or
    EXDEV), so none is ever entered. What a killed or late run has left is where the next one goes on.
    """
    kept = _user_name(user_id)
    end = time.monotonic() + seconds

    def check_time() -> None:
        if stopped() or time.monotonic() > end:
            raise TimeoutError("There is more to remove than fits into the time limit.")

    flat = _own_directory(homes.trash, kept, 0o700)
    try:
        with os.scandir(flat) as left:
            numbers = itertools.count(1 + max((int(entry.name) for entry in left), default=0))
        with suppress(FileNotFoundError):
            _move(homes.archive, kept, flat, str(next(numbers)))
        while _empty_each(flat, numbers, check_time):
            pass
    finally:
        os.close(flat)
    os.rmdir(kept, dir_fd=homes.trash)
    homes.sync(homes.archive, homes.trash)


def write_file(dir_fd: int, name: str, data: bytes, mode: int, *, gid: int = -1, durable: bool = True) -> None:
    """Put `data` in place of file `name` in one step: whoever opens it sees all of the old or all of the new.

    The directory must be one in which nobody else may write. A symbolic link of that name is replaced, not followed.
    """
    if len(_components(name)) != 1:
        raise UnsafePath(f"{name!r} is not the name of a file.")
    beside = f".{name}.new"
    with suppress(FileNotFoundError):
        os.unlink(beside, dir_fd=dir_fd)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        if gid != -1:
            os.fchown(fd, -1, gid)
        os.fchmod(fd, mode)
        if durable:
            os.fsync(fd)
    os.rename(beside, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    if durable:
        os.fsync(dir_fd)


def write_new_file(dir_fd: int, name: str, data: bytes, mode: int, *, gid: int, durable: bool = True) -> None:
    """Put a file there in one step, which nothing ever replaces: FileExistsError if anything has the name."""
    beside = f".{name}"
    write_file(dir_fd, beside, data, mode, gid=gid, durable=durable)
    try:
        _move(dir_fd, beside, dir_fd, name)
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=dir_fd)
        raise
    if durable:
        os.fsync(dir_fd)


def sync_directory(dir_fd: int) -> None:
    """So that what was removed stays so after a power cut."""
    os.fsync(dir_fd)


@contextmanager
def open_group_directory(path: Path, gid: int) -> Iterator[int]:
    """As `open_own_directory`, but this group alone may look into it: mode 0750."""
    with open_own_directory(path) as fd:
        status = os.fstat(fd)
        if status.st_gid != gid:
            os.fchown(fd, -1, gid)
        if stat.S_IMODE(status.st_mode) != 0o750:
            os.fchmod(fd, 0o750)
        yield fd


@contextmanager
def open_own_directory(path: Path, *, make: bool = True) -> Iterator[int]:
    """A directory of the worker's own outside the homes; its last part is made, mode 0755, when it is missing.

    Raises UnsafePath for a symbolic link on the way and, as root, if anybody else may write to it or to the one above.
    """
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        try:
            fd = keep(os.open("/", _DIRECTORY))
            for name in path.parent.parts[1:]:
                fd = keep(_enter(fd, name))
            _refuse_shared(fd, str(path.parent))
            yield keep(_own_directory(fd, path.name, 0o755, exact=False) if make else _enter(fd, path.name))
        except NotADirectoryError as error:
            raise UnsafePath(f"{path}: {error.filename} is a symbolic link, or no directory.") from error


def read_file(dir_fd: int | None, name: str, *, limit: int = 64 * 2**20) -> bytes | None:
    """All of a regular file; None if there is no such file. Raises UnsafePath for anything else, or more than `limit`."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsafePath(f"{name} is not a file.")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafePath(f"{name} is longer than {limit} bytes.")
    return data


def has_file(dir_fd: int, name: str) -> bool:
    """Whether a regular file has the name."""
    found = _lstat(dir_fd, name)
    return found is not None and stat.S_ISREG(found.st_mode)


def empty_staging(dir_fd: int) -> None:
    """An empty directory `.new` below `dir_fd`, mode 0700, for files that a program builds from each other."""
    with _staging(dir_fd) as fd:
        for name in os.listdir(fd):
            os.unlink(name, dir_fd=fd)


def stage_file(dir_fd: int, name: str, data: bytes, *, durable: bool = True) -> None:
    """Write a file into `.new`, to be readable for all once it is in place."""
    with _staging(dir_fd) as fd:
        write_file(fd, name, data, 0o644, durable=durable)


def move_staged(dir_fd: int, *names: str, durable: bool = True) -> None:
    """Move files of `.new` into place, each in one step, in the order given: the one that counts comes first."""
    with _staging(dir_fd) as staging:
        for name in names:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
            try:
                os.fchmod(fd, 0o644)
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
        for name in names:
            os.rename(name, name, src_dir_fd=staging, dst_dir_fd=dir_fd)
        if durable:
            os.fsync(dir_fd)


@contextmanager
def _staging(dir_fd: int) -> Iterator[int]:
    fd = _own_directory(dir_fd, ".new", 0o700)
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class FileStatus:
    data: bytes
    mode: int
    """The permission bits."""
    uid: int
    gid: int


def file_status(path: Path) -> FileStatus | None:
    """A file with its owner; None if there is none. Raises UnsafePath for a symbolic link or anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafePath(f"{path} is a symbolic link.") from error
        raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise UnsafePath(f"{path} is not a file.")
    with os.fdopen(fd, "rb") as file:
        return FileStatus(file.read(), stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


def copy_aside(dir_fd: int, below: str, path: Path) -> None:
    """Keep a file as it is, below a directory of the worker's own, under its whole path. None there: nothing to keep."""
    kept = file_status(path)
    if kept is None:
        return
    with ExitStack() as stack:
        fd = dir_fd
        for name in (*_components(below), *path.parent.parts[1:]):
            fd = _own_directory(fd, name, 0o700)
            stack.callback(os.close, fd)
        write_file(fd, path.name, kept.data, kept.mode & 0o700)


def remove_tree(dir_fd: int, name: str) -> None:
    """A file, or a tree, that nobody but the worker can write to. Nothing there is fine."""
    if len(_components(name)) != 1:
        raise UnsafePath(f"{name!r} is not the name of a file.")
    with suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=dir_fd)
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=dir_fd)


def hold_lock(path: Path) -> int:
    """Take the lock on file `path`, made when missing; return the descriptor that holds it until it is closed.

    Raises FlockHeld if another process has it, UnsafePath if the file is not the worker's own. Source: flock(2).
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise UnsafePath(f"{path} is {_shown(*_fields(status))}, not a file of the worker alone.")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise FlockHeld(f"Another worker holds {path}.") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _enter(parent: int, name: str) -> int:
    """Open a directory; NotADirectoryError for anything else. open(2) allows ELOOP or ENOTDIR for a symbolic link."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name) from error
        raise


@contextmanager
def _entered(parent: int, name: str) -> Iterator[int]:
    fd = _enter(parent, name)
    try:
        yield fd
    finally:
        os.close(fd)


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _move(source: int, name: str, target: int, new_name: str) -> None:
    """Rename without replacing: FileExistsError if anything has the new name. No fallback, since none is atomic."""
    if _renameat2(source, os.fsencode(name), target, os.fsencode(new_name), _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name, None, new_name)


def _components(path: str) -> list[str]:
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UnsafePath(f"{path!r} must be plain names, joined by single slashes.")
    return parts


def _user_name(user_id: int) -> str:
    if user_id <= 0:
        raise ValueError(f"{user_id} cannot be the id of a user.")
    return str(int(user_id))


def _fields(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_uid, status.st_gid


def _shown(mode: int, uid: int, gid: int) -> str:
    return f"{stat.filemode(mode)} {uid}:{gid}"


def _refuse_shared(fd: int, name: str) -> None:
    """As root, trust a directory only if nobody else can add, remove or exchange a name in it."""
    status = os.fstat(fd)
    if os.geteuid() == 0 and (status.st_uid != 0 or status.st_mode & 0o022):
        raise UnsafePath(f"{name} is {_shown(*_fields(status))}: root alone must own it and be able to write there.")


def _own_directory(parent: int, name: str, mode: int, *, exact: bool = True) -> int:
    """Open a directory of the worker's own, made when missing; `exact` sets its mode even if it was there."""
    made = False
    with suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=parent)
        made = True
    fd = _enter(parent, name)
    try:
        _refuse_shared(fd, name)
        if (made or exact) and stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def _parent(homes: Homes, home: Home, *, make: bool) -> Iterator[int]:
    """The directory that holds the home: that of all homes, or its `@domain` below."""
    if home.domain is None:
        yield homes.fd
        return
    name = f"@{home.domain}"
    try:
        fd = _own_directory(homes.fd, name, 0o755) if make else _enter(homes.fd, name)
    except NotADirectoryError as error:
        raise UnsafePath(f"{homes.path}/{name} is a symbolic link, or no directory.") from error
    try:
        if make:
            homes.sync(homes.fd)
        else:
            _refuse_shared(fd, name)
        yield fd
    finally:
        os.close(fd)


def _is_bare(parent: int, name: str) -> bool:
    """Whether it is nothing but the directories, or some of them, that `_build` makes."""
    try:
        with _entered(parent, name) as place:
            if not set(os.listdir(place)) <= {"Maildir"}:
                return False
            with _entered(place, "Maildir") as mail:
                if not set(leaves := os.listdir(mail)) <= set(_LEAVES):
                    return False
                for leaf in leaves:
                    with _entered(mail, leaf) as fd:
                        if os.listdir(fd):
                            return False
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    return True


def _build(homes: Homes, uid: int) -> None:
    """Make an empty home named `uid` in the staging directory.

    Nobody but the worker can reach a name below the staging directory, so that here alone a path has several names.
    """
    _unbuild(homes, uid)
    for part in _SKELETON:
        os.mkdir(f"{uid}{part}", 0o700, dir_fd=homes.staging)
    for part in reversed(_SKELETON):
        with _entered(homes.staging, f"{uid}{part}") as fd:
            os.fchmod(fd, 0o700)
            os.fchown(fd, *homes.owner_of(uid))
            homes.sync(fd)


def _unbuild(homes: Homes, uid: int) -> None:
    """Remove what a killed run, or one that needed only a part, has left in the staging directory."""
    for part in reversed(_SKELETON):
        with suppress(FileNotFoundError):
            os.rmdir(f"{uid}{part}", dir_fd=homes.staging)


@contextmanager
def _part(homes: Homes, parent: int, part: str, uid: int, path: str) -> Iterator[int]:
    """Enter a part of the skeleton in its own home; put a new one there if it is missing.

    It is moved in ready-made, so that a directory of root's in a user's home is never taken for an unfinished one of
    ours: the user may have renamed it from something else.
    """
    name = part.rpartition("/")[2]
    if _lstat(parent, name) is None:
        _build(homes, uid)
        _move(homes.staging, f"{uid}{part}", parent, name)
    with _entered(parent, name) as fd:
        _close_to_others(homes, fd, uid, path + part)
        yield fd


def _close_to_others(homes: Homes, fd: int, uid: int, path: str) -> None:
    """Set mode 0700 and the right group on a directory that has the right owner; HomeBroken if it has another."""
    owner, group = homes.owner_of(uid)
    status = os.fstat(fd)
    if status.st_uid != owner:
        raise HomeBroken(f"{path} belongs to uid {status.st_uid}, not to {owner}.")
    if status.st_gid != group:
        os.fchown(fd, -1, group)
    if stat.S_IMODE(status.st_mode) != 0o700:
        os.fchmod(fd, 0o700)


def _empty_each(flat: int, numbers: Iterator[int], check_time: Callable[[], None]) -> bool:
    """Remove each entry of `flat` once, moving the directories in it up into `flat`; False if there was none left."""
    found = False
    with os.scandir(flat) as entries:
        for entry in entries:
            found = True
            try:
                fd = _enter(flat, entry.name)
            except NotADirectoryError:
                os.unlink(entry.name, dir_fd=flat)
                continue
            try:
                _empty(fd, flat, numbers, check_time)
            finally:
                os.close(fd)
            os.rmdir(entry.name, dir_fd=flat)
    return found


def _empty(fd: int, flat: int, numbers: Iterator[int], check_time: Callable[[], None]) -> None:
    if os.geteuid() == 0:
        os.fchown(fd, 0, 0)  # In this order: an owner could undo the mode. From here on nobody else adds names.
    os.fchmod(fd, 0o700)  # This cuts off access control lists too: it sets their mask.
    with os.scandir(fd) as entries:  # Names that are not UTF-8 pass through str unharmed (PEP 383).
        for entry in entries:
            check_time()
            if entry.is_dir(follow_symlinks=False):
                _move(fd, entry.name, flat, str(next(numbers)))
            else:
                os.unlink(entry.name, dir_fd=fd)
