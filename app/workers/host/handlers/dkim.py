"""`dkim.sync`: make the private half of a DKIM key stand, or be gone; have rspamd sign with those that are active; prove it.

SECURITY: runs as root. All rows of this host are read after the claim and parsed by `rows.py`; nothing of the job but its id is
used. Files are `dkim_files.py`'s; what rspamd does is asked by `milter.py`. Only the public half is ever reported.

However often it runs, and wherever it was cut off, it ends in the same place:

    state                                              private half             rspamd signs with it
    generating                                         made, and kept           no
    unpublished, published, retiring, revoked          kept, never made anew    no
    active                                             kept, never made anew    yes
    removed                                            gone                     no

The list of those that sign is made from all rows of the host, and carries the sum of their versions: an older one never
replaces a newer. A domain that has an active key is never left without a line in it, so that its mail waits rather than leaves
unsigned: not because its file is gone, and not because a row is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.addresses import DomainName, Selector
from app.log import log
from app.mailconfig.hosts import HostFile, HostFileError, load_host_file
from app.mailconfig.rspamd import milter_socket
from app.models.dkim_keys import DkimState
from app.queue.claim import Outcome, record_all
from app.queue.contracts import DKIM_SYNC
from app.workers.host.dkim_files import Table, make_key, read_public_half, read_table, remove_key, write_table
from app.workers.host.fs import HostError
from app.workers.host.handlers.users import NOT_CONFIGURED, GiveUp, Host, TryAgain, on_disk
from app.workers.host.milter import RspamdSilent, ask_signers
from app.workers.host.rows import BadRow, DkimKey, DkimKeys, Present, read_dkim_keys, read_present_dkim_keys


@dataclass(frozen=True, slots=True)
class Signing:
    """Which selectors should sign, by domain, and what is wrong with the files of active keys."""

    domains: dict[str, list[Selector]]
    broken: dict[int, str]


async def sync_dkim_key(host: Host, key_id: int) -> Outcome:
    """Returns what was made true and proved. Raises GiveUp for what waiting cannot mend, TryAgain for the rest."""
    keys = await read_dkim_keys(host.database, host.name)
    key = keys.rows.get(key_id)
    if key is None:
        raise GiveUp(f"There is no DKIM key {key_id} of this host.")
    if isinstance(key, BadRow):
        raise GiveUp(str(key))
    if host.host_file is None:
        return Outcome(key.version, False, {"key": NOT_CONFIGURED, "signing": NOT_CONFIGURED}, {})
    present = (await read_present_dkim_keys(host.database, host.name, [key_id])).get(key_id, Present())
    file = own_file(host)
    removed = key.state is DkimState.REMOVED
    try:
        public = None if removed else await on_disk(partial(_ensure_key, host, file.dkim_dir, key, present))
    except OSError as error:
        raise TryAgain(f"{file.dkim_dir}: {error.strerror or error}") from None
    except HostError as error:
        # The others go on signing, or not, as they should.
        await _ensure_table(host, file.dkim_dir, keys)
        proofs = {**(present.proofs or {}), "key": _failed(str(error))}
        outcome = Outcome(present.version, present.stands, proofs, present.result or {})
        await record_all(host.database, host.name, DKIM_SYNC, {key_id: outcome}, host.clock())
        raise GiveUp(str(error)) from None
    await _ensure_table(host, file.dkim_dir, keys)
    if removed:
        await _on_disk(file, partial(remove_key, file.dkim_dir, key.domain, key.selector, durable=host.homes.durable))
    try:
        signers = await ask_signers(milter_socket(file), key.domain)
    except RspamdSilent as error:
        raise TryAgain(str(error)) from None
    signing = judge_signing(key, signers)
    if signing["result"] == "failed":
        raise TryAgain(signing["detail"])
    detail = "its private half is gone" if removed else "rspamd alone can read its private half"
    return Outcome(
        key.version, not removed, {"key": _ok(detail), "signing": signing}, {} if removed else {"public_key": public}
    )


def own_file(host: Host) -> HostFile:
    """Raises GiveUp."""
    try:
        file = load_host_file(host.host_file or Path("/nonexistent"))
    except HostFileError as error:
        raise GiveUp(str(error)) from None
    if file.host != host.name:
        raise GiveUp(f"HOST_FILE is of the host {file.host}, and MAIL_HOST says {host.name}.")
    return file


def _ensure_key(host: Host, directory: Path, key: DkimKey, present: Present) -> str:
    """Its public half. Raises HostError when that cannot be the one that was known, or is to be known, of it."""
    known = key.public_key or present.get("public_key")
    if key.state is DkimState.GENERATING and known is None:
        return make_key(directory, key.domain, key.selector, key.algorithm, durable=host.homes.durable)
    public = read_public_half(directory, key.domain, key.selector, key.algorithm)
    if public is None:
        raise HostError(
            f"{directory}/{key.name} is gone, and no key is made twice under one selector: put it back, or rotate."
        )
    if known is not None and public != known:
        raise HostError(f"{directory}/{key.name} is another key than the one that is known.")
    return public


def plan_signing(directory: Path, keys: DkimKeys, standing: Table) -> Signing:
    """Of a domain's active keys those whose files are well; all, and mail has to wait, if none is."""
    domains: dict[str, list[Selector]] = {}
    well: dict[str, list[Selector]] = {}
    broken: dict[int, str] = {}
    for key in keys.rows.values():
        if isinstance(key, BadRow) or key.state is not DkimState.ACTIVE:
            continue
        domains.setdefault(key.domain, []).append(key.selector)
        try:
            public = read_public_half(directory, key.domain, key.selector, key.algorithm)
            if public is None:
                broken[key.id] = f"{directory}/{key.name} is gone"
            elif key.public_key is not None and public != key.public_key:
                broken[key.id] = f"{directory}/{key.name} is another key than the one that is known"
            else:
                well.setdefault(key.domain, []).append(key.selector)
        except HostError as error:
            broken[key.id] = str(error)
    domains |= well
    if any(isinstance(key, BadRow) for key in keys.rows.values()):
        # It may be the row of a key that signs.
        for domain, selectors in (standing.domains or {}).items():
            domains.setdefault(DomainName(domain), list(map(Selector, selectors)))
    return Signing(domains, broken)


def is_as_planned(standing: Table, signing: Signing) -> bool:
    return standing.domains == signing.domains


async def _ensure_table(host: Host, directory: Path, keys: DkimKeys) -> None:
    """Raises TryAgain when what stands is newer than the rows."""

    def ensure() -> None:
        standing = read_table(directory)
        if standing.version > keys.version:
            raise TryAgain(
                f"{directory}/keys.json is of version {standing.version}, and the database is at {keys.version}. If it was "
                "restored from a backup or made anew, compare the keys with the rows, then remove that file: the next run "
                "makes it again"
            )
        signing = plan_signing(directory, keys, standing)
        for key_id, words in signing.broken.items():
            log.error("dkim_key_unusable", key_id=key_id, error=words)
        if not is_as_planned(standing, signing) or standing.version != keys.version:
            write_table(directory, keys.version, signing.domains, durable=host.homes.durable)

    try:
        await on_disk(ensure)
    except OSError as error:
        raise TryAgain(f"{directory}: {error.strerror or error}") from None
    except HostError as error:
        raise GiveUp(str(error)) from None


async def _on_disk(file: HostFile, work: Any) -> None:
    try:
        await on_disk(work)
    except OSError as error:
        raise TryAgain(f"{file.dkim_dir}: {error.strerror or error}") from None
    except HostError as error:
        raise GiveUp(str(error)) from None


def judge_signing(key: DkimKey, signers: set[Selector]) -> dict[str, Any]:
    """Whether what rspamd did with a message is what the row says."""
    signs, should = key.selector in signers, key.state is DkimState.ACTIVE
    if signs is should:
        return _ok("rspamd signs with it" if signs else "rspamd does not sign with it")
    return _failed(f"rspamd {'signs' if signs else 'does not sign'} with {key.selector} for {key.domain}")


async def compare_keys(host: Host, file: HostFile, keys: DkimKeys, present: Mapping[int, Present]) -> dict[int, str]:
    """Why keys of this host are not as their rows say; nothing is changed. Key 0 is the list itself."""
    found: dict[int, str] = {}
    standing = await on_disk(partial(read_table, file.dkim_dir))
    signing = await on_disk(partial(plan_signing, file.dkim_dir, keys, standing))
    if not is_as_planned(standing, signing):
        found[0] = f"{file.dkim_dir}/keys.json is not what the rows say"
    signers: dict[str, set[Selector]] = {}
    for key_id, key in keys.rows.items():
        if isinstance(key, BadRow):
            found[key_id] = str(key)
            continue
        before = present.get(key_id, Present())
        failed = [str(proof["detail"]) for proof in (before.proofs or {}).values() if proof["result"] == "failed"]
        if key_id in signing.broken:
            found[key_id] = signing.broken[key_id]
        elif before.version != key.version:
            found[key_id] = f"version {before.version} is applied, {key.version} is wanted"
        elif failed:
            found[key_id] = failed[0]
        elif words := await on_disk(partial(_look, file.dkim_dir, key, before)):
            found[key_id] = words
        else:
            try:
                if key.domain not in signers:
                    signers[key.domain] = await ask_signers(milter_socket(file), key.domain)
            except RspamdSilent as error:
                found[key_id] = str(error)
                continue
            proof = judge_signing(key, signers[key.domain])
            if proof["result"] == "failed":
                found[key_id] = proof["detail"]
    return found


def _look(directory: Path, key: DkimKey, present: Present) -> str | None:
    try:
        public = read_public_half(directory, key.domain, key.selector, key.algorithm)
    except HostError as error:
        return str(error)
    if key.state is DkimState.REMOVED:
        return None if public is None else f"{directory}/{key.name} is still there"
    if public is None:
        return f"{directory}/{key.name} is gone"
    return None if public == present.get("public_key") else f"{directory}/{key.name} is another key than was reported"


async def ensure_table(host: Host) -> None:
    """The list alone, as all rows say: also where there is no key whose job would make it. Raises TryAgain, GiveUp."""
    keys = await read_dkim_keys(host.database, host.name)
    await _ensure_table(host, own_file(host).dkim_dir, keys)


def _ok(detail: str) -> dict[str, Any]:
    return {"result": "ok", "detail": detail}


def _failed(detail: str) -> dict[str, Any]:
    return {"result": "failed", "detail": detail[:500]}
