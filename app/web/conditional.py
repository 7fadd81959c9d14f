"""ETag, If-Match, If-None-Match (RFC 9110, section 13). A tag is `"<version>.<revision>"`.

The version is what should be, the revision counts what the worker wrote about it. Reading compares both; writing compares
the version alone, since the worker's progress is nobody's edit.
"""

import re

from starlette.requests import Request

from app.errors import BadField

_TAG = re.compile(r'(?:W/)?"(\d{1,9})(?:\.\d{1,15})?"')


def etag(version: int, revision: int | None) -> str:
    return f'"{version}.{revision or 0}"'


def not_modified(request: Request, tag: str) -> bool:
    given = request.headers.get("if-none-match")
    return given is not None and (
        given.strip() == "*" or tag in (part.strip().removeprefix("W/") for part in given.split(","))
    )


def expected_version(request: Request) -> int | None:
    """The version in If-Match; None when there is no such header, or `*`."""
    given = request.headers.get("if-match", "*").strip()
    if given == "*":
        return None
    found = _TAG.fullmatch(given)
    if found is None:
        raise BadField('If-Match takes one ETag as we sent it, such as "3.1".')
    return int(found.group(1))
