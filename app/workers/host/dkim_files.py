"""The private DKIM keys of this host, and the list that says which of them sign.

SECURITY: runs as root, in the worker and behind `cacert-mail dkim adopt`. The directory and every file in it belong to root,
rspamd's group may read them, and nobody else. A private key is never in an answer, a log or an error. Names of files come from
parsed names alone. A key's file is never written twice: rspamd 3.4 keeps a key by its path and the whole second of its change,
so that another one under the same path could go unnoticed, and sign what nobody can verify.

rspamd reads the list for each message (`dkim.lua`), so a key signs, or no longer, from the message after the rename on. What it
cannot read makes mail wait.
"""

import grp
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from app.addresses import DomainName, Selector
from app.config import WorkerSettings
from app.mailconfig.hosts import HostFileError, load_host_file
from app.models.dkim_keys import Algorithm
from app.workers.host.fs import (
    FileStatus,
    HostError,
    file_status,
    open_group_directory,
    remove_tree,
    sync_directory,
    write_file,
    write_new_file,
)
from app.workers.host.rows import MAX_DKIM_NAME

GROUP = "_rspamd"
TABLE = "keys.json"
MODE = 0o640

PrivateKey = RSAPrivateKey | Ed25519PrivateKey


class KeyUnusable(HostError):
    """A key's file is not as it must be, and nothing of ours mends it."""


@dataclass(frozen=True, slots=True)
class Table:
    """The list as it stands: by domain, the selectors that sign."""

    version: int = 0
    domains: Mapping[str, Sequence[str]] | None = None
    """None: there is no list, or it cannot be read."""


def key_path(directory: Path, domain: DomainName, selector: Selector) -> Path:
    """Where the private half is. Parsed once more, for a plain str that got past the type checker."""
    name = f"{Selector(selector)}._domainkey.{DomainName(domain)}"
    if len(name) > MAX_DKIM_NAME:
        raise KeyUnusable(f"The name {name[:80]}… is too long for a file.")
    return directory / name


def read_public_half(directory: Path, domain: DomainName, selector: Selector, algorithm: Algorithm) -> str | None:
    """What `p=` has of the key that stands; None if there is none. Raises KeyUnusable for a file of another owner, mode or
    algorithm."""
    path = key_path(directory, domain, selector)
    found = file_status(path)
    if found is None:
        return None
    if wrong := _wrong_owner(found):
        raise KeyUnusable(f"{path} {wrong}.")
    return _public_half(_parsed(path, found.data, algorithm))


def make_key(
    directory: Path, domain: DomainName, selector: Selector, algorithm: Algorithm, *, durable: bool = True
) -> str:
    """The public half of the key that stands, or of the one that is made now: 0.1 to 2 s for RSA. Raises KeyUnusable."""
    standing = read_public_half(directory, domain, selector, algorithm)
    if standing is not None:
        return standing
    if algorithm is Algorithm.ED25519:
        key: PrivateKey = Ed25519PrivateKey.generate()
    else:
        key = generate_private_key(65537, int(algorithm.value.removeprefix("rsa-")))
    _put(directory, key_path(directory, domain, selector), key, durable=durable)
    return _public_half(key)


def adopt_dkim_key(path: Path, domain: DomainName, selector: Selector) -> None:
    """Copies a private key in PEM to where rspamd signs with it, on this very host. Nothing is done if it is there already.
    Raises KeyUnusable, or another HostError."""
    settings = WorkerSettings()
    if settings.host_file is None:
        raise KeyUnusable("HOST_FILE is not set, so nothing of ours signs on this host.")
    try:
        directory = load_host_file(settings.host_file).dkim_dir
    except HostFileError as error:
        raise KeyUnusable(str(error)) from None
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyUnusable(f"{path} is no private key in PEM without a password.") from None
    if not isinstance(key, PrivateKey):
        raise KeyUnusable(f"{path} is neither an RSA nor an Ed25519 key.")
    place = key_path(directory, domain, selector)
    standing = file_status(place)
    if standing is None:
        _put(directory, place, key, durable=True)
        return
    algorithm = Algorithm.ED25519 if isinstance(key, Ed25519PrivateKey) else Algorithm(f"rsa-{key.key_size}")
    if read_public_half(directory, domain, selector, algorithm) != _public_half(key):
        raise KeyUnusable(f"{place} is another key, and no key is ever replaced under its selector.")


def remove_key(directory: Path, domain: DomainName, selector: Selector, *, durable: bool = True) -> None:
    """None there is fine."""
    with open_group_directory(directory, _gid()) as fd:
        remove_tree(fd, key_path(directory, domain, selector).name)
        if durable:
            sync_directory(fd)


def read_table(directory: Path) -> Table:
    found = file_status(directory / TABLE)
    if found is None or _wrong_owner(found):
        return Table()
    try:
        read = json.loads(found.data)
        domains = {domain: [key["selector"] for key in keys] for domain, keys in read["domains"].items()}
        return Table(int(read["version"]), domains)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Table()


def write_table(directory: Path, version: int, domains: Mapping[str, Sequence[str]], *, durable: bool = True) -> None:
    """From now on, from the next message on, these selectors sign for these domains."""
    listed = {
        domain: [
            {"selector": selector, "path": str(key_path(directory, DomainName(domain), Selector(selector)))}
            for selector in selectors
        ]
        for domain, selectors in domains.items()
        if selectors
    }
    data = json.dumps({"version": version, "domains": listed}, indent=1).encode()
    with open_group_directory(directory, _gid()) as fd:
        write_file(fd, TABLE, data, MODE, gid=_gid(), durable=durable)


def begin_table(directory: Path) -> None:
    """Before rspamd asks for the list for the first time: where no key was ever made, an empty one. Without a list all mail of
    our users would have to wait."""
    with open_group_directory(directory, _gid()):
        empty = not any(directory.iterdir())
    if empty:
        write_table(directory, 0, {})


def _put(directory: Path, path: Path, key: PrivateKey, *, durable: bool) -> None:
    if isinstance(key, Ed25519PrivateKey):
        # rspamd 3.4 reads no other form of it: the bare seed in base64.
        data = b64encode(key.private_bytes_raw())
    else:
        data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open_group_directory(directory, _gid()) as fd:
        try:
            write_new_file(fd, path.name, data, MODE, gid=_gid(), durable=durable)
        except FileExistsError:
            raise KeyUnusable(f"{path} was made by somebody else at this very moment.") from None


def _gid() -> int:
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        raise KeyUnusable(f"There is no group {GROUP}: is rspamd installed?") from None


def _wrong_owner(found: FileStatus) -> str | None:
    gid = _gid()
    if (found.mode, found.uid, found.gid) == (MODE, 0, gid):
        return None
    return f"is {found.mode:04o} {found.uid}:{found.gid}, not {MODE:04o} 0:{gid}"


def _parsed(path: Path, data: bytes, algorithm: Algorithm) -> PrivateKey:
    """Raises KeyUnusable, which never says what it read."""
    key: Any
    try:
        if algorithm is Algorithm.ED25519:
            return Ed25519PrivateKey.from_private_bytes(b64decode(data, validate=True))
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, RSAPrivateKey) and f"rsa-{key.key_size}" == algorithm:
        return key
    raise KeyUnusable(f"{path} is no {algorithm.value} key.")


def _public_half(key: PrivateKey) -> str:
    if isinstance(key, Ed25519PrivateKey):
        octets = key.public_key().public_bytes_raw()
    else:
        octets = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(octets).decode()
