"""The links that set a password without the old one. API and service process make the same one, by a key in a file.

So no usable form of a link need be kept: the row has the token's SHA-256, the mail is made when it is sent, and one that is
sent twice carries the same link.
"""

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from app.credentials.tokens import KeysUnusable, write_new

_BYTES = 32
_REMEDY = f"`cacert-mail keys create` makes one of {_BYTES} random bytes where there is none."


def create_link_key(path: Path) -> bool:
    """Write 32 random bytes, for owner and group to read, unless the file exists; tell whether they were written.

    Raises OSError. Whoever reads it can make every link that is open, given the ids of the rows.
    """
    try:
        write_new(path, secrets.token_bytes(_BYTES), mode=0o640)
    except FileExistsError:
        return False
    return True


def load_link_key(path: Path) -> bytes:
    """Return the 32 bytes. Raises KeysUnusable."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(_BYTES + 1)
    except OSError as error:
        raise KeysUnusable(f"{path} cannot be read ({error.strerror}). {_REMEDY}") from None
    if mode & 0o027:
        raise KeysUnusable(f"{path} is not its owner's, and one group's to read, alone: remove it, it may be known.")
    if len(key) != _BYTES:
        raise KeysUnusable(f"{path} does not hold {_BYTES} bytes; remove it. {_REMEDY}")
    return key


def link_token(key: bytes, reset_id: int) -> str:
    """Return the token of a link, 256 bits in base64url: HMAC-SHA256 of `password-reset:<id>`."""
    digest = hmac.digest(key, b"password-reset:%d" % reset_id, "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def token_hash(token: str) -> str:
    """Return the SHA-256 of a token in hex. No slow hash: nobody guesses 256 bits.

    Rows are found by it, in no constant time: how far a comparison came tells about the hash, and not about the token.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
