"""Idempotency-Key: the same request, sent again, makes nothing twice and answers with what the first one made.

The row is the first insert of the change's own transaction. So two at once are one insert and one duplicate: the second
waits for the first to commit (a second on MariaDB; on SQLite writers queue anyway), and a change that fails leaves no row.
"""

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import and_, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.requests import Request

from app.db import duplicate_of, is_lock_timeout
from app.errors import BadField, KeyInUse, KeyReused
from app.models.idempotency_keys import idempotency_keys
from app.services.changes import Change

_KEY = re.compile(r"[\x21-\x7e]{1,128}\Z")


def idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None or request.method != "POST":
        return None
    if not _KEY.match(key):
        raise BadField("Idempotency-Key takes 1 to 128 visible ASCII characters, best a random UUID.")
    return key


async def request_hash(request: Request, secret: bytes) -> str:
    """An HMAC: a body may hold a password, and a plain hash of it could be guessed against."""
    said = b"\n".join((request.method.encode(), request.url.path.encode(), await request.body()))
    return hmac.new(secret, said, hashlib.sha256).hexdigest()


async def once(change: Change, key: str, said: str, make: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
    """Calls `make` unless this key was used before. Returns what was made, and True; or its id or name, and False."""
    mine = and_(idempotency_keys.c.principal_id == change.actor.principal_id, idempotency_keys.c.key == key)
    try:
        await change.connection.execute(
            insert(idempotency_keys),
            {"principal_id": change.actor.principal_id, "key": key, "request_hash": said, "created_at": change.now},
        )
    except IntegrityError as error:
        if duplicate_of(error) is None:
            raise
        row = (await change.connection.execute(select(idempotency_keys).where(mine))).one()
        if not hmac.compare_digest(row.request_hash, said):
            raise KeyReused("This Idempotency-Key belongs to another request of yours.") from None
        return (row.subject_name if row.subject_id is None else row.subject_id), False
    except DBAPIError as error:
        if is_lock_timeout(error):
            raise KeyInUse("A request with this Idempotency-Key is at work right now.") from None
        raise
    made = await make()
    subject = getattr(made, "id", made)
    column = "subject_id" if isinstance(subject, int) else "subject_name"
    await change.connection.execute(update(idempotency_keys).where(mine).values({column: subject}))
    return made, True
