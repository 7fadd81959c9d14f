"""`cacert-mail import`: takes over what an old host has, through the API. For root on the mail host; a dry run unless told.

The rows go through the HTTP API like everybody's. Root does file work only: it looks at homes, writes the list of those that
keep their owner, and takes lines out of a hand-made alias file once the API has them.
"""

import asyncio
import csv
import grp
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import typer

from app.addresses import LocalPart, MailAddress, OutsideAddress
from app.config import ImportSettings, WorkerSettings
from app.credentials.passwords import check_hash
from app.errors import BadAddress, CacertMailError
from app.workers.host.adopted import LOWEST, Adopted, read_adopted, write_adopted
from app.workers.host.commands import run
from app.workers.host.fs import Home, HostError, UnsafePath, open_homes, open_own_directory, stat_in_place, write_file

COLUMNS = ("address", "password_hash", "display_name", "contact_address", "external_id", "quota_bytes", "state")
"""What a table may have; only `address` must be there. `state` is `active` or `suspended`."""

WAIT = {"Prefer": "wait=20"}


class Refused(Exception):
    """A line that cannot be taken over as it is; the text is for whoever reads the report."""


@dataclass(slots=True)
class Tally:
    done: int = 0
    there: int = 0
    refused: int = 0


@dataclass(slots=True)
class Site:
    """The API, as the client of the settings."""

    client: httpx.Client
    primary: str = field(init=False)

    def __post_init__(self) -> None:
        found = self.ask("GET", "/v1/domains", params={"kind": "primary"})["items"]
        if not found:
            raise CacertMailError("There is no primary domain yet: POST /v1/domains with kind `primary` adds it.")
        self.primary = found[0]["name"]

    def ask(self, method: str, url: str, *, ok: Sequence[int] = (), **options: Any) -> dict[str, Any]:
        """Raises Refused with what the API says."""
        answer = self.client.request(method, url, **options)
        body: dict[str, Any] = answer.json()
        if answer.is_error and answer.status_code not in ok:
            raise Refused(body.get("detail", f"status {answer.status_code}"))
        return body


def connect() -> httpx.Client:
    """Never by a proxy of the environment: the secret is in each request."""
    settings = ImportSettings()
    return httpx.Client(
        base_url=settings.api_url,
        auth=(settings.client_id, settings.client_secret.get_secret_value()),
        timeout=40,
        trust_env=False,
        verify=True if settings.api_ca_file is None else str(settings.api_ca_file),
    )


# Users


def import_users(file: Path, *, apply: bool) -> Tally:
    """Prints a line for each line of the table. A second run goes on where the first was cut off, and makes nothing twice."""
    settings = WorkerSettings()
    tally = Tally()
    kept = {entry.uid: str(entry.address) for entry in read_adopted(settings.adopted_homes).values()}
    with connect() as client, open_homes(settings.host_root, make=False) as homes:
        site = Site(client)
        for number, row in _table(file):
            address = row["address"]
            try:
                home = _home_of(MailAddress(address), site.primary)
                found = _old_home(settings, stat_in_place(homes, home), homes.path_of(home))
                if found is not None and kept.setdefault(found.st_uid, address) != address:
                    raise Refused(
                        f"uid {found.st_uid} is {kept[found.st_uid]}'s already: two mailboxes cannot share one."
                    )
                said = _import_user(site, settings, row, found, apply=apply)
                tally.there += said.startswith("is there")
                tally.done += not said.startswith("is there")
            except (Refused, HostError, CacertMailError) as error:
                tally.refused += 1
                said = f"refused: {error}"
            typer.echo(f"line {number}: {_shown(address)}: {said}")
    return tally


def _table(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Tab-separated as `mariadb --batch` prints it, or commas; the first line has the names of the columns."""
    with file.open(encoding="utf-8", newline="") as text:
        first = text.readline()
        text.seek(0)
        rows = csv.DictReader(text, delimiter="\t" if "\t" in first or "," not in first else ",", strict=True)
        names = rows.fieldnames or []
        unknown = [name for name in names if name not in COLUMNS]
        if "address" not in names or unknown:
            raise CacertMailError(
                f"{file} begins with a line of column names: {', '.join(COLUMNS)}; `address` must be among them"
                + (f", and {unknown[0]!r} cannot." if unknown else ".")
            )
        for row in rows:
            if None in row or None in row.values():
                raise CacertMailError(f"{file}, line {rows.line_num}: it has more or fewer fields than the first line.")
            yield rows.line_num, {name: "" if value == "NULL" else value for name, value in row.items()}


def _home_of(address: MailAddress, primary: str) -> Home:
    return Home(None if address.domain == primary else address.domain, address.local_part)


def _old_home(settings: WorkerSettings, found: os.stat_result | None, path: str) -> os.stat_result | None:
    """Whose owner is kept; None if nothing stands there. Raises Refused for one that nobody could keep."""
    if found is None:
        return None
    if not stat.S_ISDIR(found.st_mode):
        raise Refused(f"{path} is no directory.")
    if settings.uid_first <= found.st_uid <= settings.uid_last:
        return None  # one of ours, from an earlier run
    if found.st_uid < LOWEST or found.st_gid < LOWEST:
        raise Refused(
            f"{path} belongs to {found.st_uid}:{found.st_gid}, and both must be {LOWEST} at least. Give it a user and a "
            "group of its own first."
        )
    return found


def _import_user(
    site: Site, settings: WorkerSettings, row: dict[str, str], home: os.stat_result | None, *, apply: bool
) -> str:
    address = MailAddress(row["address"])
    body = {name: value for name, value in row.items() if value and name != "state"} | {"address": address}
    if "password_hash" in body:
        check_hash(body["password_hash"])
    if "contact_address" in body:
        OutsideAddress(body["contact_address"])
    if "quota_bytes" in body:
        if not row["quota_bytes"].isascii() or not row["quota_bytes"].isdigit():
            raise Refused("quota_bytes is no number.")
        body["quota_bytes"] = int(row["quota_bytes"])  # type: ignore[assignment]  # JSON takes a number here
    if row.get("state", "") not in ("", "active", "suspended"):
        raise Refused(f"state takes active or suspended, not {_shown(row['state'])}.")
    kept = "" if home is None else f", its home keeps uid {home.st_uid} and gid {home.st_gid}"
    status = site.ask("GET", f"/v1/addresses/{address}")
    if status["status"] not in ("free", "user"):
        raise Refused(status["detail"])
    if not apply:
        return f"is there already{kept}" if status["status"] == "user" else f"would be created{kept}"
    if status["status"] == "free":
        user = site.ask("POST", "/v1/users", json=body)
        said = "created"
    else:
        user = site.ask("GET", f"/v1/users/{address}")
        said = "is there already"
    if home is not None:
        _adopt(settings, Adopted(user["id"], address, home.st_uid, home.st_gid))
    user = _until_ready(site, user, f"/v1/users/{user['id']}")
    if row.get("state") == "suspended" and user["state"] == "active":
        user = site.ask("PATCH", f"/v1/users/{user['id']}", json={"state": "suspended"}, headers=WAIT)
    if not user["ready"]:
        raise Refused(f"it is in the database as user {user['id']}, but not ready: {_why(user)}")
    return f"{said}{kept}"


def _adopt(settings: WorkerSettings, entry: Adopted) -> None:
    entries = read_adopted(settings.adopted_homes)
    if entries.get(entry.user_id) != entry:
        write_adopted(settings.adopted_homes, [*(e for e in entries.values() if e.user_id != entry.user_id), entry])


def _until_ready(site: Site, body: dict[str, Any], url: str) -> dict[str, Any]:
    """The worker may have looked before root had said whose the home is, or that a line is gone: then it is asked again."""
    end = time.monotonic() + 60
    while not body["ready"] and time.monotonic() < end:
        job = body["job"]
        if job is not None and job["state"] == "dead":
            site.ask("POST", f"{job['url']}/retry", ok=(409,))
        body = site.ask("GET", url, headers=WAIT)
        if (
            body["job"] is not None
            and body["job"]["state"] == "dead"
            and job is not None
            and body["job"]["id"] != job["id"]
        ):
            break  # asked again, and refused again
    return body


def _why(body: dict[str, Any]) -> str:
    job = body["job"]
    return (job and job["error"]) or "the worker has not come to it yet; is it running?"


def _shown(text: str) -> str:
    """What stands in a file may be made to look like something else on a terminal."""
    return text if text.isprintable() and text.isascii() else ascii(text)


# Aliases


@dataclass(frozen=True, slots=True)
class Entry:
    """One alias of a hand-made file, and the lines on which it stands, from 1."""

    name: str
    value: str
    lines: range


def import_aliases(file: Path, *, apply: bool) -> Tally:
    """Makes an alias of each that can be one; those that were made are taken out of the file, and a copy of it is kept."""
    tally = Tally()
    with connect() as client:
        site = Site(client)
        entries = read_entries(file.read_text("utf-8", "surrogateescape"))
        waiting: list[tuple[Entry, list[str]]] = []
        for entry in entries:
            try:
                waiting.append((entry, destinations_of(entry, site.primary)))
            except (Refused, BadAddress) as error:
                tally.refused += 1
                typer.echo(f"line {entry.lines.start}: {_shown(entry.name)}: stays: {error}")
        made = _make_aliases(site, waiting, tally, apply=apply)
        if apply and made:
            _take_out(file, [entry for entry, _ in made])
            for entry, body in made:
                alias = _until_ready(site, body, f"/v1/aliases/{body['id']}")
                if not alias["ready"]:
                    typer.echo(f"line {entry.lines.start}: {entry.name}: not ready: {_why(alias)}")
    return tally


def _make_aliases(
    site: Site, waiting: list[tuple[Entry, list[str]]], tally: Tally, *, apply: bool
) -> list[tuple[Entry, dict[str, Any]]]:
    """Round by round, since one may lead to another that comes later in the file."""
    made: list[tuple[Entry, dict[str, Any]]] = []
    while waiting:
        left: list[tuple[Entry, list[str]]] = []
        reasons: dict[str, str] = {}
        to_come = {f"{entry.name}@{site.primary}" for entry, _ in waiting}
        for entry, destinations in waiting:
            try:
                said, body = _make_alias(site, entry, destinations, to_come, apply=apply)
            except (Refused, BadAddress) as error:
                left.append((entry, destinations))
                reasons[entry.name] = str(error)
                continue
            tally.there += said.startswith("is there")
            tally.done += not said.startswith("is there")
            typer.echo(f"line {entry.lines.start}: {entry.name}: {said}")
            if body is not None:
                made.append((entry, body))
        if len(left) == len(waiting):
            for entry, _ in left:
                tally.refused += 1
                typer.echo(f"line {entry.lines.start}: {entry.name}: stays: {reasons[entry.name]}")
            break
        waiting = left
    return made


def _make_alias(
    site: Site, entry: Entry, destinations: list[str], to_come: set[str], *, apply: bool
) -> tuple[str, dict[str, Any] | None]:
    address = MailAddress(f"{entry.name}@{site.primary}")
    status = site.ask("GET", f"/v1/addresses/{address}")
    leads = f", leads to {', '.join(destinations)}"
    if status["status"] == "alias":
        body = site.ask("GET", f"/v1/aliases/{address}")
        if sorted(body["destinations"]) != sorted(destinations) or body["kind"] != "receive_only":
            raise Refused(
                f"There is an alias {address} already, and it leads elsewhere: {', '.join(body['destinations'])}."
            )
        return f"is there already{leads}", body
    if status["status"] not in ("free", "reserved"):
        raise Refused(status["detail"])
    if not apply:
        for destination in destinations:
            there = site.ask("GET", f"/v1/addresses/{destination}", ok=(422,)).get("status", "outside")
            if (
                destination.endswith(f"@{site.primary}")
                and there not in ("user", "alias")
                and destination not in to_come
            ):
                raise Refused(f"There is no account and no alias {destination}.")
        return f"would be created{leads}", None
    wanted = {
        "address": address,
        "kind": "receive_only",
        "destinations": destinations,
        "note": "from the old alias file",
    }
    return f"created{leads}", site.ask("POST", "/v1/aliases", json=wanted)


def read_entries(text: str) -> list[Entry]:
    """The logical lines of an alias file. Source: aliases(5)."""
    found: list[tuple[list[str], int, int]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line[0].isspace() and found:
            parts, first, _ = found[-1]
            found[-1] = ([*parts, line.strip()], first, number)
        elif not line[0].isspace():
            found.append(([line.strip()], number, number))
    entries: list[Entry] = []
    for parts, first, last in found:
        name, colon, value = " ".join(parts).partition(":")
        if colon:
            entries.append(Entry(name.strip().strip('"').lower(), value.strip(), range(first, last + 1)))
    return entries


def destinations_of(entry: Entry, primary: str) -> list[str]:
    """As addresses. Raises Refused for a program, a file, a list in a file, and BadAddress for what is none."""
    LocalPart(entry.name)
    found: list[str] = []
    for part in entry.value.split(","):
        text = part.strip().removeprefix("\\")
        if not text:
            continue
        if text.startswith(('"', "|", "/", ":")):
            raise Refused(
                f"{_shown(text[:60])} is a program, a file or a list in a file; an alias leads to addresses alone."
            )
        address = OutsideAddress(text if "@" in text else f"{text}@{primary}")
        found.append(address.lower() if address.domain == primary else str(address))
    if not found:
        raise Refused("It leads nowhere.")
    return list(dict.fromkeys(found))


def _take_out(file: Path, entries: Sequence[Entry]) -> None:
    """Writes the file without these, once a copy of it stands beside it, and has postalias build its map."""
    text = file.read_bytes()
    gone = {number for entry in entries for number in entry.lines}
    lines = text.split(b"\n")
    kept = b"\n".join(line for number, line in enumerate(lines, 1) if number not in gone)
    with open_own_directory(file.parent) as directory:
        copy = f"{file.name}.before-{time.strftime('%Y%m%dT%H%M%S')}"
        write_file(directory, copy, text, 0o644, gid=grp.getgrnam("root").gr_gid)
        write_file(directory, file.name, kept, 0o644, gid=grp.getgrnam("root").gr_gid)
    config = WorkerSettings().postfix_config
    if config is None:
        typer.echo("POSTFIX_CONFIG is not set: run `newaliases`, or the lines that are gone stay in force.")
    else:
        output = asyncio.run(run(["/usr/sbin/postalias", "-c", str(config), "--", f"lmdb:{file}"]))
        if output.returncode != 0 or output.stderr:
            raise UnsafePath(f"postalias says of {file}: {output.stderr.decode(errors='replace').strip()[-400:]}")
    typer.echo(f"{len(entries)} aliases were taken out of {file}; {file.parent / copy} is a copy of what it was.")
