"""`mailhost.sync`: make the mail programs run with the configuration that the row of this host asks for, and prove it.

SECURITY: runs as root. What is read and written is in `mailhost.py`; this file only decides in which order. However often it
runs, and wherever it was cut off, it ends in the same place: files as rendered, programs that have read them.
"""

import asyncio
from typing import Any

from app.mailconfig.hosts import HostFileError, load_host_file
from app.queue.claim import Outcome
from app.queue.contracts import THE_HOST
from app.workers.host import mailhost
from app.workers.host.handlers.users import NOT_CONFIGURED, GiveUp, Host, TryAgain
from app.workers.host.mailhost import MailhostError, Wanted
from app.workers.host.rows import BadRow, read_host

SETTLE = (0.2, 0.5, 1, 2, 4)
"""Seconds between two looks: after a reload the programs need a moment before they listen."""


async def sync_mailhost(host: Host, subject_id: int) -> Outcome:
    """Returns what was made so and proved; its result says in words what differed. Raises GiveUp for what waiting cannot mend,
    TryAgain for the rest."""
    if subject_id != THE_HOST:
        raise GiveUp("A host has one configuration.")
    try:
        if host.host_file is None:
            version = (await read_host(host.database, host.name)).version
            return Outcome(version, False, {"files": NOT_CONFIGURED}, {})
        wanted = await mailhost.read_wanted(host.database, host.name, load_host_file(host.host_file))
        changed = await mailhost.install(wanted, host.clock())
        done = [f"{difference.path} {difference.words}"[:500] for difference in changed]
        if wanted.settings.srs and not changed and await mailhost.ensure_postsrsd(wanted):
            done.append("postsrsd did not answer")
    except (BadRow, MailhostError, HostFileError) as error:
        raise GiveUp(str(error)) from None
    if told := bool(changed) or mailhost.is_due(wanted):
        await _reload(wanted)
    proofs = await _prove(wanted, told=told)
    if mailhost.shows_another_certificate(proofs):
        await _reload(wanted)
        proofs = await _prove(wanted, told=True)
        done.append(f"{wanted.file.tls_certificate} was renewed, and the programs had not read it")
    broken = [f"{name}: {proof['detail']}" for name, proof in proofs.items() if proof["result"] == "failed"]
    if broken:
        raise TryAgain("; ".join(broken))
    files = {"result": "ok", "detail": f"{len(wanted.files)} files are as rendered"}
    return Outcome(
        wanted.version, True, {"files": files, **proofs}, {"changed": done, "hostname": wanted.file.hostname}
    )


async def _reload(wanted: Wanted) -> None:
    if said := await mailhost.reload(wanted):
        raise TryAgain("; ".join(said))


async def _prove(wanted: Wanted, *, told: bool) -> dict[str, dict[str, Any]]:
    """With `told` they have just been told of a change, so what is not so yet may become so."""
    proofs = await mailhost.prove(wanted)
    for pause in SETTLE if told else ():
        if all(proof["result"] == "ok" for proof in proofs.values()):
            break
        await asyncio.sleep(pause)
        proofs = await mailhost.prove(wanted)
    return proofs
