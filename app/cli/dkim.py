"""`cacert-mail dkim adopt`: takes over a DKIM key that signs already, through the API. For root on the mail host; a dry run
unless told.

The row goes through the HTTP API like everybody's; root copies the private half to its place, and shows it to nobody. What is
checked first is the DNS: the record must be, word for word, the one that the service process will look for, so that on the day
of the move neither the record nor a signature changes.
"""

import asyncio
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from app.addresses import DomainName, Selector
from app.cli.imports import WAIT, connect
from app.config import DnsSettings, WorkerSettings
from app.dns.ask import DnsUnclear, all_say, ask_all, find_servers
from app.dns.records import Record, dkim_record
from app.errors import CacertMailError
from app.models.dkim_keys import Algorithm
from app.workers.host.dkim_files import adopt_dkim_key

READY_SECONDS = 60


def adopt(domain: DomainName, selector: Selector, file: Path, *, apply: bool) -> str:
    """What was done, or would be. A second run goes on where the first was cut off. Raises CacertMailError, HostError."""
    settings = WorkerSettings()
    algorithm, public_key = public_half(file)
    record = dkim_record(selector, domain, algorithm, public_key)
    asyncio.run(_refuse_other_record(record))
    with connect() as client:
        key = _find(client, domain, selector)
        if key is not None:
            _refuse_other_key(key, settings.mail_host, record)
        if not apply:
            return (
                f"{record.name} is in the DNS as it should be, and "
                + ("the key is known already." if key is not None else "the key would be taken over.")
                + " Nothing was changed: this was a dry run. --apply does it."
            )
        # The file first: once there is a row, the worker looks for it, and would make another key.
        adopt_dkim_key(file, domain, selector)
        if key is None:
            key = _make(client, settings.mail_host, domain, selector, algorithm, public_key)
        key = _until_ready(client, key)
    if not key["ready"]:
        job = key["job"]
        why = (job and job["error"]) or "the worker has not come to it yet; is it running?"
        raise CacertMailError(f"The key is in the database, but not ready: {why}")
    return f"{record.name} was taken over. {key['next_step']}"


def public_half(file: Path) -> tuple[Algorithm, str]:
    """Of a private key in PEM: its algorithm, and what `p=` has of it. Raises CacertMailError, and never says what it read."""
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CacertMailError(f"{file} is no private key in PEM without a password.") from None
    if isinstance(key, Ed25519PrivateKey):
        return Algorithm.ED25519, b64encode(key.public_key().public_bytes_raw()).decode()
    if isinstance(key, RSAPrivateKey) and f"rsa-{key.key_size}" in list(Algorithm):
        octets = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Algorithm(f"rsa-{key.key_size}"), b64encode(octets).decode()
    raise CacertMailError(f"{file} is none of {', '.join(Algorithm)}: such a key is not taken over, but replaced.")


async def _refuse_other_record(record: Record) -> None:
    settings = DnsSettings()
    try:
        answers = await ask_all(await find_servers(record.name, settings), record.name, record.type, settings)
    except DnsUnclear as error:
        raise CacertMailError(str(error)) from None
    difference = all_say(answers, [record.value])
    if difference is not None:
        raise CacertMailError(
            f"The DNS does not have exactly this key. {difference}\nIf the key is the same and only the words differ, enter "
            f"this, wait until every name server has it, and try again:\n{record.zone_line}"
        )


def _find(client: httpx.Client, domain: DomainName, selector: Selector) -> dict[str, Any] | None:
    answer = client.get(f"/v1/domains/{domain}/dkim-keys/{selector}")
    if answer.status_code == 404:
        _said(client.get(f"/v1/domains/{domain}"))
        return None
    return _said(answer)


def _refuse_other_key(key: dict[str, Any], host: str, record: Record) -> None:
    if key["host"] != host or key["record"] is None or key["record"]["value"] != record.value:
        raise CacertMailError(
            f"{record.name} is known already, and not as this key of this host: it is {key['state']}, of {key['host']}."
        )


def _make(
    client: httpx.Client, host: str, domain: DomainName, selector: Selector, algorithm: Algorithm, public_key: str
) -> dict[str, Any]:
    body = {
        "host": host,
        "selector": selector,
        "algorithm": algorithm,
        "public_key": public_key,
        "activate": True,
    }
    return _said(client.post(f"/v1/domains/{domain}/dkim-keys", json=body, headers=WAIT))


def _until_ready(client: httpx.Client, key: dict[str, Any]) -> dict[str, Any]:
    url = f"/v1/domains/{key['domain']}/dkim-keys/{key['selector']}"
    end = time.monotonic() + READY_SECONDS
    while not key["ready"] and time.monotonic() < end and (key["job"] is None or key["job"]["state"] != "dead"):
        key = _said(client.get(url, headers=WAIT))
    return key


def _said(answer: httpx.Response) -> dict[str, Any]:
    """The body. Raises CacertMailError with what the API says."""
    body: dict[str, Any] = answer.json()
    if answer.is_error:
        raise CacertMailError(body.get("detail", f"The API answers with status {answer.status_code}."))
    return body
