"""Access tokens (RFC 9068) and client secrets. The only importer of `jose`, which is trusted with one signature alone.

python-jose 3.5 takes an HMAC by the public key unless told one algorithm, tokens without `aud`, an unknown `crit`, an
`exp` that is a string, and fails on others with what is no JOSEError. So it signs and verifies bytes here; what the
bytes mean is decided in this file, and whatever goes wrong is Unauthenticated.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from jose import jwk, jws  # type: ignore[import-untyped]  # python-jose carries no types

from app.errors import Unauthenticated

LIFETIME = 600
"""Seconds for which a token is good."""

LEEWAY = 30
"""Seconds by which the clocks of two API processes may differ."""

LONGEST = 8192
"""Characters of a token, at most."""

REMEMBERED = 4096
"""Verified tokens that one process remembers."""

OWNER = re.compile(r"owner-([1-9]\d{0,17})", re.ASCII)
"""The subject of an owner's token: the owner of that account."""

_ALGORITHM = "RS256"
_KEY_BITS = 3072
_REQUEST_KEY = "request.key"
_REQUEST_KEY_BYTES = 32
_KID = re.compile(r"\d{8}T\d{12}Z-[A-Za-z0-9_-]{16}", re.ASCII)
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_SCOPE = re.compile(r"(?:[!#-\[\]-~]+(?: [!#-\[\]-~]+)*)?")
_LONGEST_CLAIM = 255
_LONGEST_SCOPE = 2048
_DETAIL = "The access token is malformed, expired or not one of ours."


class KeysUnusable(Exception):
    """The key directory cannot be used as it is. The text says which file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says. `scope` is None if the token was not narrowed, and empty if it allows nothing."""

    subject: str
    client_id: str
    """Whose request it was issued at: the subject itself, but for an owner's token."""
    token_id: str
    issued_at: datetime
    expires_at: datetime
    scope: frozenset[str] | None
    key_id: int
    """Of the client's secret or certificate that it was obtained with: the token ends with it."""
    generation: int
    """What the subject's own access had come to: an owner's token ends with the next password. 0 for a client."""
    certificate: str | None
    """SHA-256 in hex of the client certificate that must come with it (RFC 8705, section 3)."""


class TokenKeys:
    """The signing keys, held in memory for the life of the process: the newest signs, all verify.

    For one event loop: nothing in it blocks for longer than an RSA signature, about 2 ms.
    """

    def __init__(self, keys: dict[str, rsa.RSAPrivateKey]) -> None:
        self._signing_kid = max(keys)
        self._signing_key = jwk.construct(keys[self._signing_kid], _ALGORITHM)
        self._public_keys = {kid: jwk.construct(key.public_key(), _ALGORITHM) for kid, key in keys.items()}
        self._jwks = {
            "keys": [{**_public_jwk(keys[k]), "alg": _ALGORITHM, "use": "sig", "kid": k} for k in sorted(keys)]
        }
        self._verified: OrderedDict[tuple[bytes, str, str], Claims] = OrderedDict()

    def issue(
        self,
        principal_id: str,
        *,
        key_id: int,
        scope: frozenset[str] | None,
        issuer: str,
        audience: str,
        now: datetime,
        client_id: str | None = None,
        generation: int = 0,
        certificate: str | None = None,
    ) -> tuple[str, int]:
        """Return a token for the principal, and the seconds for which it is good.

        Whether key, generation and certificate are still what they were is for the caller of `verify` to compare.

        `scope` of None leaves the claim out. Raises ValueError on what `verify` would refuse.
        """
        issued_at = int(_seconds(now))
        claims = {
            "iss": _text(issuer),
            "aud": _text(audience),
            "sub": _text(principal_id),
            "client_id": _text(client_id or principal_id),
            "jti": secrets.token_urlsafe(16),
            "iat": issued_at,
            "exp": issued_at + LIFETIME,
            "key": key_id,
            "generation": generation,
        }
        if certificate is not None:
            claims["cnf"] = {"x5t#S256": _base64url(bytes.fromhex(certificate))}
        if scope is not None:
            claims["scope"] = " ".join(sorted(scope))
            if _scope(claims["scope"]) != scope:
                raise ValueError("a scope holds a blank, a quote or nothing")
        headers = {"typ": "at+jwt", "kid": self._signing_kid}
        payload = json.dumps(claims, separators=(",", ":")).encode("ascii")
        token: str = jws.sign(payload, self._signing_key, headers=headers, algorithm=_ALGORITHM)
        return token, LIFETIME

    def verify(self, token: str, *, issuer: str, audience: str, now: datetime) -> Claims:
        """Return what the token says, or raise Unauthenticated, always with the same words.

        A token that was verified before costs a SHA-256; its times are looked at each time.
        """
        moment = _seconds(now)
        try:
            _require(type(token) is str and len(token) <= LONGEST and _COMPACT.fullmatch(token) is not None)
            name = hashlib.sha256(token.encode("ascii")).digest(), issuer, audience
            claims = self._verified.pop(name, None) or self._read(token, issuer, audience)
            _require(claims.issued_at.timestamp() <= moment + LEEWAY)
            _require(moment < claims.expires_at.timestamp())
        except Exception:
            # Hostile input reaches json and python-jose here, which raise a dozen types between them, RecursionError
            # and OverflowError among them. None may become a 500, and none may tell the caller how far it came.
            raise Unauthenticated(_DETAIL) from None
        self._verified[name] = claims
        if len(self._verified) > REMEMBERED:
            self._verified.popitem(last=False)
        return claims

    def _read(self, token: str, issuer: str, audience: str) -> Claims:
        header = _json_object(token.partition(".")[0])
        # RFC 8725, section 3.1 and RFC 7515, section 4.1.11: nothing in a header chooses the key or the algorithm, and
        # what we never write (crit, jku, jwk, x5u, x5c, zip, b64) is not ours.
        _require(header.keys() == {"alg", "typ", "kid"} and all(type(value) is str for value in header.values()))
        _require(header["alg"] == _ALGORITHM)
        _require(header["typ"].lower().removeprefix("application/") == "at+jwt")  # RFC 9068, section 4
        key = self._public_keys[header["kid"]]
        jws.verify(token, key, algorithms=[_ALGORITHM])
        claims = _json_object(token.split(".")[1])

        _require(_text(claims["iss"]) == issuer)
        # A string and no list: a token meant for others as well could be replayed by one of them.
        _require(_text(claims["aud"]) == audience)
        _require("nbf" not in claims)  # Never written by us, and to ignore it would break RFC 7519, section 4.1.5.
        subject, token_id = _text(claims["sub"]), _text(claims["jti"])
        client_id = _text(claims["client_id"])
        # RFC 9068, section 2.2: they are equal where a client acts for itself. It acts for no one but an owner else.
        _require(client_id == subject or OWNER.fullmatch(subject) is not None)
        issued_at, expires_at = claims["iat"], claims["exp"]
        key_id, generation = claims["key"], claims["generation"]
        _require(type(issued_at) is int and type(expires_at) is int and 0 < expires_at - issued_at <= LIFETIME)
        _require(type(generation) is int and generation >= 0)
        _require(type(key_id) is int and key_id >= 0)
        return Claims(
            subject=subject,
            client_id=client_id,
            token_id=token_id,
            issued_at=datetime.fromtimestamp(issued_at, UTC),
            expires_at=datetime.fromtimestamp(expires_at, UTC),
            scope=_scope(claims["scope"]) if "scope" in claims else None,
            key_id=key_id,
            generation=generation,
            certificate=_confirmation(claims["cnf"]) if "cnf" in claims else None,
        )

    def jwks(self) -> dict[str, Any]:
        """Return the public keys as a JWK Set (RFC 7517, section 5)."""
        return {"keys": [dict(key) for key in self._jwks["keys"]]}


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _seconds(now: datetime) -> float:
    if now.tzinfo is None:
        raise ValueError("now must be aware")
    return now.timestamp()


def _text(value: object) -> str:
    if type(value) is not str or not 0 < len(value) <= _LONGEST_CLAIM:
        raise ValueError("a claim must be a string of 1 to 255 characters")
    return value


def _scope(value: object) -> frozenset[str]:
    """Read a scope (RFC 6749, section 3.3), and "" as one that allows nothing."""
    if type(value) is not str or len(value) > _LONGEST_SCOPE or not _SCOPE.fullmatch(value):
        raise ValueError("a scope must be tokens with one blank between them")
    return frozenset(value.split())


def _confirmation(value: object) -> str:
    """Read `cnf` (RFC 8705, section 3.1): the hash of a certificate, and nothing else that would have to be confirmed."""
    if type(value) is not dict or value.keys() != {"x5t#S256"}:
        raise ValueError("cnf must be x5t#S256 alone")
    digest = base64.urlsafe_b64decode(_text(value["x5t#S256"]) + "=")
    _require(len(digest) == 32)
    return digest.hex()


def _json_object(segment: str) -> dict[str, Any]:
    text = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)).decode("utf-8")
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    _require(type(value) is dict)
    return value  # type: ignore[no-any-return]  # looked at one line above


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that names a member twice: two readers could read two different tokens (RFC 7519, section 4)."""
    members = dict(pairs)
    _require(len(members) == len(pairs))
    return members


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _public_jwk(key: rsa.RSAPrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    return {"kty": "RSA", "n": _base64url_number(numbers.n), "e": _base64url_number(numbers.e)}


def _base64url_number(number: int) -> str:
    return _base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def create_signing_key(directory: Path, *, now: datetime | None = None) -> str:
    """Write a new RSA key of 3072 bits to `<directory>/<kid>.pem` and return its kid, a time and part of a thumbprint.

    A crash leaves the whole file or none, and no file is ever replaced. Raises KeysUnusable or OSError.
    """
    _make_directory(directory)
    key = rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS)
    canonical = json.dumps(_public_jwk(key), sort_keys=True, separators=(",", ":")).encode("ascii")
    thumbprint = _base64url(hashlib.sha256(canonical).digest())  # RFC 7638, section 3
    kid = f"{(now or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%S%fZ}-{thumbprint[:16]}"
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new(directory / f"{kid}.pem", pem)
    return kid


def create_request_key(directory: Path) -> bool:
    """Write 32 random bytes to `<directory>/request.key` unless it exists, and tell whether they were written."""
    _make_directory(directory)
    try:
        write_new(directory / _REQUEST_KEY, secrets.token_bytes(_REQUEST_KEY_BYTES))
    except FileExistsError:
        return False
    return True


def load_request_key(directory: Path) -> bytes:
    """Return the 32 bytes of `request.key`. Raises KeysUnusable."""
    _check_directory(directory)
    key = _read_private(directory / _REQUEST_KEY)
    if len(key) != _REQUEST_KEY_BYTES:
        raise _unusable(directory / _REQUEST_KEY, f"does not hold {_REQUEST_KEY_BYTES} bytes; remove it")
    return key


def load_keys(directory: Path) -> TokenKeys:
    """Read every `*.pem` of the directory. Raises KeysUnusable if one of them is not fit, or there is none."""
    _check_directory(directory)
    # A name that starts with a dot was left by a crash in the middle of writing.
    paths = sorted(path for path in directory.glob("*.pem") if not path.name.startswith("."))
    if not paths:
        raise _unusable(directory, "holds no signing key")
    return TokenKeys({path.stem: _load_private_key(path) for path in paths})


def _load_private_key(path: Path) -> rsa.RSAPrivateKey:
    if not _KID.fullmatch(path.stem):
        raise _unusable(path, "has a name that does not say when the key was made; remove it")
    try:
        key = load_pem_private_key(_read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _unusable(path, "is not a PKCS#8 private key without a passphrase; remove it") from None
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < 2048:
        raise _unusable(path, "is not an RSA key of 2048 bits or more; remove it")
    return key


def _unusable(path: Path, what: str) -> KeysUnusable:
    return KeysUnusable(f"{path} {what}. `cacert-mail keys create`, run as the user of the API, makes what is missing.")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        _check_directory(directory)


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except OSError as error:
        raise _unusable(directory, f"cannot be opened ({error.strerror})") from None
    if not stat.S_ISDIR(mode) or mode & 0o077:
        raise _unusable(directory, "must be a directory that its owner alone may enter; `chmod 700` it")


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(65536)
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    if mode & 0o077:
        raise _unusable(path, "can be read or written by others than its owner; remove it, since it may be known")
    return content


def write_new(path: Path, content: bytes, mode: int = 0o600) -> None:
    """The whole file or none, and never in place of another: raises FileExistsError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, path)  # Unlike a rename, this fails where the name is taken.
    finally:
        beside.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def client_secret() -> str:
    """Return a new secret of 256 random bits, in base64url."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """Return the SHA-256 of a client secret in hex. No slow hash: nobody guesses 256 random bits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def secret_matches(secret: str, stored_hash: str | None) -> bool:
    """Tell whether the secret has this hash, in the same time where there is none (an unknown client)."""
    wanted = (stored_hash or "0" * 64).encode("utf-8", "surrogatepass")
    same = hmac.compare_digest(hash_secret(secret).encode("ascii"), wanted)
    return same and stored_hash is not None
