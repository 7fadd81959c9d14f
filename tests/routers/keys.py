"""DKIM keys made over HTTP, and what a host's worker and the service process would write of them."""

from base64 import b64encode
from functools import cache
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import update

from app.addresses import DomainName, Selector
from app.db import Database, utc_now
from app.models.dkim_keys import Algorithm, DkimState, dkim_keys
from app.queue.claim import Outcome, record
from app.queue.contracts import DKIM_SYNC
from app.services.changes import Change
from app.services.dkim_keys import get_dkim_key, set_dkim_state
from tests.conftest import ACTOR, PRIMARY

KEYS = f"/v1/domains/{PRIMARY}/dkim-keys"
PROVED = {"key": {"result": "ok", "detail": None}, "signing": {"result": "ok", "detail": None}}


@cache
def public_key(algorithm: Algorithm) -> str:
    """The public half of a new key, as `p=` has it."""
    if algorithm is Algorithm.ED25519:
        octets = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    else:
        rsa = generate_private_key(65537, int(algorithm.removeprefix("rsa-")))
        octets = rsa.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(octets).decode()


async def make_key(client: httpx.AsyncClient, url: str = KEYS, **members: Any) -> dict[str, Any]:
    answer = await client.post(url, json=members)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def apply_key(database: Database, key: dict[str, Any], proofs: Any = PROVED) -> None:
    """As the worker would: its host has done what this version asks."""
    result = {"public_key": public_key(Algorithm(key["algorithm"]))}
    async with database.write.begin() as connection:
        outcome = Outcome(key["version"], True, proofs, result)
        await record(connection, key["host"], DKIM_SYNC, key["id"], outcome, utc_now())


async def bring_to(database: Database, key: dict[str, Any], state: DkimState, **columns: Any) -> int:
    """As the service process would, whatever the state was before. Returns the version."""
    if state is not DkimState.GENERATING:
        columns.setdefault("public_key", public_key(Algorithm(key["algorithm"])))
    async with database.write.begin() as connection:
        row = await get_dkim_key(connection, DomainName(key["domain"]), Selector(key["selector"]))
        return await set_dkim_state(Change(connection, ACTOR, utc_now()), row, state, **columns)


async def prove(database: Database, key: dict[str, Any]) -> None:
    """As the service process would, when a probe came back."""
    async with database.write.begin() as connection:
        await connection.execute(update(dkim_keys).where(dkim_keys.c.id == key["id"]).values(proved_at=utc_now()))
