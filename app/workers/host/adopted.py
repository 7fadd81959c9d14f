"""Old homes that keep the uid and gid they have: a list that root alone writes.

SECURITY: loaded by the worker (root), which believes this file and no row about who owns an old home. It is refused unless root
alone can write to it. Written by `cacert-mail import users`, run by root.

A line is `<id of the user> <address> <uid> <gid>`. It counts only if both id and address are the row's: a database that was
made anew gives the same ids to others.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.addresses import MailAddress
from app.errors import BadAddress
from app.workers.host.fs import UnsafePath, file_status, open_own_directory, write_file

LOWEST = 1000
"""Debian's system users and groups lie below, and are never a mailbox's."""


@dataclass(frozen=True, slots=True)
class Adopted:
    user_id: int
    address: MailAddress
    uid: int
    gid: int


def read_adopted(path: Path | None) -> dict[int, Adopted]:
    """By the user's id. Raises UnsafePath for a file that root did not write, or a line that cannot be."""
    status = None if path is None else file_status(path)
    if status is None:
        return {}
    if os.geteuid() == 0 and (status.uid != 0 or status.mode & 0o022):
        raise UnsafePath(f"{path}: root alone must own it and be able to write to it.")
    found: dict[int, Adopted] = {}
    for number, line in enumerate(status.data.decode("ascii", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            user_id, address, uid, gid = line.split()
            entry = Adopted(int(user_id), MailAddress(address), int(uid), int(gid))
        except (ValueError, BadAddress):
            raise UnsafePath(f"{path}, line {number}: takes an id, an address, a uid and a gid.") from None
        if entry.uid < LOWEST or entry.gid < LOWEST:
            raise UnsafePath(f"{path}, line {number}: uid and gid are {LOWEST} at least.")
        if entry.user_id in found or any(entry.uid == other.uid for other in found.values()):
            raise UnsafePath(f"{path}, line {number}: this id, or this uid, is in it twice.")
        found[entry.user_id] = entry
    return found


def write_adopted(path: Path, entries: Iterable[Adopted]) -> None:
    """In place of what stands there."""
    lines = ["# user, address, uid, gid: homes that keep their old owner. Written by `cacert-mail import users`.\n"]
    lines += [
        f"{entry.user_id} {entry.address} {entry.uid} {entry.gid}\n"
        for entry in sorted(entries, key=lambda entry: entry.user_id)
    ]
    with open_own_directory(path.parent) as directory:
        write_file(directory, path.name, "".join(lines).encode(), 0o644)


class AdoptedHomes:
    """The list as it is now: read again when the file has changed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._entries: dict[int, Adopted] = {}

    def find(self, user_id: int, address: str) -> Adopted | None:
        """Raises UnsafePath, as `read_adopted` does."""
        if self._path is None:
            return None
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            return None
        seen = (status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._entries = read_adopted(self._path)
            self._seen = seen
        entry = self._entries.get(user_id)
        return entry if entry is not None and entry.address == address else None
