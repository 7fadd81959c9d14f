"""Lists: `limit`, `cursor`, `next_cursor`, and `Link: rel="next"` (RFC 8288).

Keyset paging: the cursor is the last key of the page, so that a page costs the same wherever it stands.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query
from pydantic import AfterValidator, BaseModel, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from app.web.answers import encode

MAX_LIMIT = 500

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items on a page.")]


def _decode(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor.encode("ascii") + b"==").decode("ascii")
    except (binascii.Error, UnicodeError):
        raise ValueError("A cursor is what `next_cursor` of an earlier page said.") from None


def _decode_number(cursor: str) -> str:
    text = _decode(cursor)
    if not text.isdigit() or len(text) > 18:
        raise ValueError("A cursor is what `next_cursor` of an earlier page said.")
    return text


_DESCRIPTION = "`next_cursor` of the page before."
_Cursor = Annotated[str, StringConstraints(max_length=400)]
NumberCursor = Annotated[Annotated[_Cursor, AfterValidator(_decode_number)] | None, Query(description=_DESCRIPTION)]
NameCursor = Annotated[Annotated[_Cursor, AfterValidator(_decode)] | None, Query(description=_DESCRIPTION)]


def page_response(
    request: Request, items: Sequence[BaseModel | dict[str, Any]], last_key: int | str | None, limit: int
) -> Response:
    """`last_key` is the key of the last item; there is a next page when the page is full."""
    headers = {}
    next_cursor = None
    if last_key is not None and len(items) == limit:
        next_cursor = base64.urlsafe_b64encode(str(last_key).encode("ascii")).decode("ascii").rstrip("=")
        # A relative reference: what the caller called us by is none of our business.
        url = request.url.include_query_params(cursor=next_cursor)
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return Response(encode({"items": items, "next_cursor": next_cursor}), 200, headers, "application/json")
