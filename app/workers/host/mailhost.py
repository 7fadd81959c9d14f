"""The configuration of this host's programs: what it should be, how it differs, and how it gets there.

SECURITY: runs as root, in the worker and behind `cacert-mail mailhost`. Takes `hosts.settings` from a row that an attacker may
have written: the model checks it again. Everything else comes from the host's own file, which root alone writes. It writes
only the files that `render_all` names, and at first an empty list of DKIM keys; beside and then renamed, after the programs'
own checkers have seen them. It keeps what was there, and through the programs makes Postfix, Dovecot and rspamd read them.
"""

import asyncio
import difflib
import grp
import os
import signal
import socket
import ssl
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.addresses import DomainName
from app.db import Database
from app.errors import BadAddress
from app.mailconfig.everything import render_all
from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.rendering import ConfigFile
from app.workers.host.commands import run
from app.workers.host.dkim_files import begin_table
from app.workers.host.fs import (
    FileStatus,
    HostError,
    copy_aside,
    file_status,
    open_own_directory,
    remove_tree,
    write_file,
)
from app.workers.host.rows import BadRow, read_host

DUE = "reload-due"
"""A file in the state directory: written before the first change, removed when the programs run with the last one."""


class MailhostError(HostError):
    """What keeps the configuration from being made so; the text is for administrators."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The configuration of this host as it should be. `version` is that of its row."""

    version: int
    settings: HostSettings
    file: HostFile
    primary_domain: DomainName

    @property
    def files(self) -> dict[Path, ConfigFile]:
        return render_all(self.settings, self.file, self.primary_domain)


@dataclass(frozen=True, slots=True)
class Difference:
    path: Path
    words: str


async def read_wanted(database: Database, host: str, file: HostFile) -> Wanted:
    """Raises BadRow for a row that the model refuses, MailhostError for a file that is another host's."""
    if file.host != host:
        raise MailhostError(f"HOST_FILE is of the host {file.host}, and MAIL_HOST says {host}.")
    row = await read_host(database, host)
    if row.primary_domain is None:
        raise MailhostError("There is no primary domain yet: POST /v1/domains with kind `primary` adds it.")
    try:
        return Wanted(row.version, HostSettings.model_validate(row.settings), file, DomainName(row.primary_domain))
    except (ValidationError, BadAddress) as error:
        raise BadRow(f"The settings of host {host} cannot be: {error}") from None


def compare(files: Mapping[Path, ConfigFile]) -> list[Difference]:
    """How the installed files differ from these, in words. Of a file that holds a secret only that it differs."""
    found: list[Difference] = []
    for path, wanted in files.items():
        installed = file_status(path)
        if installed is None:
            found.append(Difference(path, "is missing"))
            continue
        said: list[str] = []
        if installed.data != wanted.text.encode():
            said.append(
                "differs" if _is_secret(wanted) else _described(installed.data.decode(errors="replace"), wanted.text)
            )
        if (shown := _owners(installed)) != (right := f"{wanted.mode:04o} root:{wanted.group}"):
            said.append(f"is {shown}, not {right}")
        if said:
            found.append(Difference(path, "; ".join(said)))
    return found


def _is_secret(file: ConfigFile) -> bool:
    return not file.mode & 0o004


def _owners(status: FileStatus) -> str:
    try:
        group = grp.getgrgid(status.gid).gr_name
    except KeyError:
        group = str(status.gid)
    return f"{status.mode:04o} {'root' if status.uid == 0 else status.uid}:{group}"


SHOWN = 20
"""Lines of a difference that are told; the rest is counted."""


def _described(installed: str, wanted: str) -> str:
    lines = [
        f"has {line[1:]!r}" if line.startswith("-") else f"lacks {line[1:]!r}"
        for line in difflib.unified_diff(installed.splitlines(), wanted.splitlines(), n=0, lineterm="")
        if line[:1] in "+-" and not line.startswith(("---", "+++")) and line[1:].strip()
    ]
    more = f", and {len(lines) - SHOWN} more lines" if len(lines) > SHOWN else ""
    return (", ".join(lines[:SHOWN]) or "differs in blank lines") + more


async def check(wanted: Wanted) -> None:
    """Has the programs' own checkers look at the files, in a directory of ours. Raises MailhostError with what they say."""
    state = wanted.file.state_dir
    stage = state / "check"
    staged = wanted.file.model_copy(
        update={
            "postfix_config_dir": stage / "postfix",
            "dovecot_config_dir": stage / "dovecot",
            "rspamd_config_dir": stage / "rspamd",
        }
    )
    with open_own_directory(state) as state_fd:
        remove_tree(state_fd, "check")
        try:
            with open_own_directory(stage):
                for path, file in render_all(wanted.settings, staged, wanted.primary_domain).items():
                    if path.is_relative_to(stage):
                        _write(path, file)
            await _ask_checkers(staged)
        finally:
            remove_tree(state_fd, "check")


async def _ask_checkers(file: HostFile) -> None:
    postfix, dovecot = str(file.postfix_config_dir), str(file.dovecot_config_dir / "dovecot.conf")
    rspamd = str(file.rspamd_config_dir / "rspamd.conf")
    # postconf warns of parameters that nothing uses, which is how a mistyped name shows.
    for argv in (
        ["/usr/sbin/postconf", "-c", postfix, "-n"],
        ["/usr/sbin/postconf", "-c", postfix, "-M"],
        ["/usr/sbin/postfix", "-c", postfix, "check"],
        ["/usr/bin/doveconf", "-c", dovecot, "-n"],
        ["/usr/bin/rspamadm", "configtest", "-c", rspamd],
    ):
        output = await run(argv, seconds=60)
        if output.returncode != 0 or (output.stderr and "postconf" in argv[0]):
            said = (output.stderr or output.stdout).decode(errors="replace").strip()
            raise MailhostError(f"{' '.join(argv)} says: {said[-800:]}")
    for table in sorted(file.postfix_config_dir.glob("*.cf")):
        if table.name in ("main.cf", "master.cf"):
            continue
        argv = ["/usr/sbin/postmap", "-c", postfix, "-q", "nobody@nowhere.invalid", f"mysql:{table}"]
        output = await run(argv)
        if output.stderr:
            raise MailhostError(
                f"The query of {table.name} fails: {output.stderr.decode(errors='replace').strip()[-400:]}"
            )


async def install(wanted: Wanted, now: datetime) -> list[Difference]:
    """Makes the installed files the wanted ones; returns what differed. The programs are not told: see `reload`.

    Nothing is written unless all checkers agree. What was there is kept below `before/` in the state directory. postsrsd comes
    first: Postfix gets no configuration that asks it before it answers, since mail from elsewhere would have to wait.
    """
    files = wanted.files
    changed = compare(files)
    if not changed:
        return []
    await check(wanted)
    begin_table(wanted.file.dkim_dir)
    cut_off = is_due(wanted)
    with open_own_directory(wanted.file.state_dir) as state:
        write_file(state, DUE, b"", 0o600)
        for difference in changed:
            copy_aside(state, f"before/{now:%Y%m%dT%H%M%S}", difference.path)
    of_postsrsd = {wanted.file.postsrsd_defaults, wanted.file.postsrsd_secret_file}
    for difference in changed:
        if difference.path in of_postsrsd:
            _write(difference.path, files[difference.path])
    if wanted.settings.srs:
        await ensure_postsrsd(wanted, anew=cut_off or any(difference.path in of_postsrsd for difference in changed))
    for difference in changed:
        if difference.path not in of_postsrsd:
            _write(difference.path, files[difference.path])
    return changed


def _write(path: Path, file: ConfigFile) -> None:
    with open_own_directory(path.parent) as directory:
        write_file(directory, path.name, file.text.encode(), file.mode, gid=grp.getgrnam(file.group).gr_gid)


def write_below(root: Path, path: Path, file: ConfigFile) -> None:
    """As it would be installed, but below another directory. Groups are set by root alone."""
    place = root.joinpath(*path.parts[1:])
    for directory in (*reversed(place.parents[: len(path.parts) - 1]),):
        with open_own_directory(directory):
            pass
    gid = grp.getgrnam(file.group).gr_gid if os.geteuid() == 0 else -1
    with open_own_directory(place.parent) as fd:
        write_file(fd, place.name, file.text.encode(), file.mode, gid=gid)


def is_due(wanted: Wanted) -> bool:
    """Whether the programs may still run with older files."""
    return file_status(wanted.file.state_dir / DUE) is not None


async def reload(wanted: Wanted) -> list[str]:
    """Has the programs read their files. Returns a sentence for each that could not, such as one that does not run."""
    file = wanted.file
    said: list[str] = []
    commands = {
        "Postfix": ["/usr/sbin/postfix", "-c", str(file.postfix_config_dir), "reload"],
        "Dovecot": ["/usr/bin/doveadm", "-c", str(file.dovecot_config_dir / "dovecot.conf"), "reload"],
    }
    for name, argv in commands.items():
        output = await run(argv)
        if output.returncode != 0:
            words = output.stderr.decode(errors="replace").strip()[-300:] or "it does not run"
            said.append(f"{name} could not be told: {words}")
    if (reason := _tell_rspamd(file.rspamd_run_dir / "control.sock")) is not None:
        said.append(f"rspamd could not be told: {reason}")
    if not said:
        with open_own_directory(file.state_dir) as state:
            remove_tree(state, DUE)
    return said


def _tell_rspamd(control: Path) -> str | None:
    """In the foreground it writes no pid, so whoever listens on its socket is asked for (SO_PEERCRED, unix(7)), and gets a
    SIGHUP. Returns why not."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(control))
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if Path(f"/proc/{pid}/comm").read_text().strip() != "rspamd":
                return f"{control} is not rspamd's."
            os.kill(pid, signal.SIGHUP)
        except OSError as error:
            return f"{control}: {error.strerror}"
    return None


async def ensure_postsrsd(wanted: Wanted, *, anew: bool = False) -> bool:
    """Has postsrsd answer as its files say, by a restart if it does not, or if `anew` is set: it reads them only then.

    Returns whether it was restarted. Raises MailhostError, with what to do.
    """
    if not anew and (await prove_srs(wanted))["result"] == "ok":
        return False
    trouble = await _restart_postsrsd()
    for pause in _STARTING:
        await asyncio.sleep(pause)
        proof = await prove_srs(wanted)
        if proof["result"] == "ok":
            return True
    raise MailhostError(
        f"postsrsd does not do SRS: {proof['detail']}. {trouble or 'Its log says why: journalctl -u postsrsd.'} Then the "
        "next sweep goes on by itself, or POST /v1/jobs/{job}/retry at once. Postfix was told nothing new until then."
    )


_STARTING = (0, 0.1, 0.2, 0.5, 1, 2)
"""Seconds between two questions: it needs a moment before it listens."""


def _has_systemd() -> bool:
    """As sd_booted(3) asks."""
    return Path("/run/systemd/system").is_dir()


async def _restart_postsrsd() -> str | None:
    """A sentence when that was not possible."""
    if not _has_systemd():
        return "systemd does not run here, so nobody but you can restart postsrsd: do it."
    output = await run(["/usr/bin/systemctl", "--no-ask-password", "restart", "postsrsd.service"])
    if output.returncode == 0:
        return None
    said = " ".join(output.stderr.decode(errors="replace").split())[-300:]
    return f"systemctl restart postsrsd says: {said} Install it (apt-get install postsrsd) or mend it."


# Proof


_ELSEWHERE = "sender@elsewhere.invalid"


async def prove_srs(wanted: Wanted) -> dict[str, Any]:
    """That postsrsd answers as Postfix will ask it: a sender from elsewhere becomes one of ours, which leads back."""
    forward, reverse = wanted.settings.srs_forward_port, wanted.settings.srs_reverse_port
    try:
        rewritten = await _ask_table(forward, _ELSEWHERE)
        if not rewritten.startswith("SRS0=") or not rewritten.endswith(f"@{wanted.primary_domain}"):
            return {"result": "failed", "detail": f"port {forward} makes {rewritten[:200]} of {_ELSEWHERE}"}
        back = await _ask_table(reverse, rewritten)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        return {"result": "failed", "detail": f"port {forward} or {reverse}: {str(error) or type(error).__name__}"}
    if back != _ELSEWHERE:
        return {"result": "failed", "detail": f"port {reverse} makes {back[:200]} of {rewritten[:200]}"}
    return {"result": "ok", "detail": f"answers on {forward}, {reverse}, and a rewritten sender leads back"}


async def _ask_table(port: int, key: str) -> str:
    """One question of tcp_table(5). Raises ValueError for anything but 200, OSError, TimeoutError."""
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"get {key}\n".encode("ascii"))
            answer = (await reader.readline()).decode("ascii", "replace").strip()
        finally:
            writer.transport.abort()
    code, _, text = answer.partition(" ")
    if code != "200":
        raise ValueError(f"{port} answers {answer[:200] or 'nothing'}")
    return text


@dataclass(frozen=True, slots=True)
class Port:
    program: str
    number: int
    tls: bool


def ports(settings: HostSettings) -> Sequence[Port]:
    """Every port on which somebody else is served, and whether TLS begins at once."""
    found = [
        Port("postfix", settings.smtp_port, False),
        Port("postfix", settings.submission_port, False),
        Port("postfix", settings.submissions_port, True),
        Port("dovecot", settings.imap_port, False),
        Port("dovecot", settings.imaps_port, True),
    ]
    if settings.pop3_enabled:
        found.append(Port("dovecot", settings.pop3s_port, True))
    return found


async def prove(wanted: Wanted) -> dict[str, dict[str, Any]]:
    """That the programs listen, greet, and show the certificate that stands in its file; with `srs`, that postsrsd answers."""
    proofs: dict[str, dict[str, Any]] = {}
    try:
        certificate = _certificate(wanted.file)
    except MailhostError as error:
        proofs["certificate"] = {"result": "failed", "detail": str(error)}
        certificate = None
    address = str(wanted.file.listen[0]) if wanted.file.listen else "127.0.0.1"
    asked = ports(wanted.settings)
    answers = await asyncio.gather(*(_ask_port(address, port) for port in asked))
    for program in ("postfix", "dovecot"):
        wrong = [
            f"port {port.number}: {answer}"
            for port, answer in zip(asked, answers, strict=True)
            if port.program == program and isinstance(answer, str)
        ]
        listens = ", ".join(str(port.number) for port in asked if port.program == program)
        proofs[program] = (
            {"result": "failed", "detail": "; ".join(wrong)[:500]}
            if wrong
            else {"result": "ok", "detail": f"answers on {listens}"}
        )
    shown = {answer for answer in answers if isinstance(answer, bytes) and answer}
    if certificate is not None:
        old = [port.number for port, answer in zip(asked, answers, strict=True) if port.tls and answer != certificate]
        proofs["certificate"] = (
            {
                "result": "failed",
                "detail": f"port {old[0]} shows another certificate than {wanted.file.tls_certificate}",
            }
            if old and shown
            else {"result": "ok", "detail": f"every port shows that of {wanted.file.tls_certificate}"}
        )
    if wanted.settings.srs:
        proofs["srs"] = await prove_srs(wanted)
    return proofs


def shows_another_certificate(proofs: Mapping[str, Mapping[str, Any]]) -> bool:
    """It was renewed, and the programs have not read it yet."""
    return "shows another certificate" in str(proofs.get("certificate", {}).get("detail"))


def _certificate(file: HostFile) -> bytes:
    """The first of the chain, in DER, once it is seen to fit the key. Raises MailhostError."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file.tls_certificate, file.tls_key)
        text = file.tls_certificate.read_text("ascii")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise MailhostError(f"{file.tls_certificate} and {file.tls_key} cannot be used: {error}") from None
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERTIFICATE-----") : text.index(end) + len(end)])


async def _ask_port(address: str, port: Port) -> bytes | str:
    """The certificate that it shows (empty without TLS), or in words what is wrong."""
    context = None
    if port.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # It is compared with the file.
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(address, port.number, ssl=context)
            try:
                greeting = await reader.readline()
                shown: bytes = writer.get_extra_info("ssl_object").getpeercert(True) if port.tls else b""
            finally:
                writer.transport.abort()  # close() would wait for the program's own end of TLS, half a minute at most
    except (OSError, TimeoutError, ValueError) as error:
        return str(error) or type(error).__name__
    return shown if greeting.startswith((b"220", b"* OK", b"+OK")) else "it does not greet"
