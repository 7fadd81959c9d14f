"""Client certificates, as a proxy of ours hands them on, and who is at the other end of a connection.

uvicorn shows no peer certificate. So the proxy that ended the TLS connection, where the client proved that it holds the
key, writes the certificate into a header: RFC 9440's, or nginx's `$ssl_client_escaped_cert`. Whoever else sends that header
lies. A proxy that hands on X-Forwarded-For hides who sent the header, so this is decided before that is looked at.
"""

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import unquote_to_bytes

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.config import Networks
from app.errors import CacertMailError, ForgedCertificate, Unauthenticated
from app.log import log
from app.web.problems import error_response

_PEM = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of the client at the other end of the proxy's TLS connection, which holds its private key."""

    fingerprint: str
    """SHA-256 of its DER, in hex."""
    not_before: datetime
    not_after: datetime


class Proxies:
    """Plain ASGI. Sets `scope["client_certificate"]`, a Certificate or None, then does as X-Forwarded-For and -Proto say.

    `scope["peer"]` keeps whose connection it is: `scope["client"]` is whom a trusted proxy speaks for.
    """

    def __init__(self, app: ASGIApp, *, header: str, certificate_proxies: Networks, trusted_proxies: str) -> None:
        self._header = header.lower().encode("ascii")
        self._certificate_proxies = certificate_proxies
        self._forwarded = ProxyHeadersMiddleware(app, trusted_proxies) if trusted_proxies else app  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["peer"] = scope["client"][0] if scope.get("client") else ""
            scope["client_certificate"] = None
            given = [value for name, value in scope["headers"] if name == self._header]
            if given:
                try:
                    scope["client_certificate"] = self._read(given, scope["peer"])
                except CacertMailError as error:
                    request = Request(scope)
                    log.warning("certificate_refused", peer=scope["peer"], reason=error.detail)
                    await error_response(request, error)(scope, receive, send)
                    return
        await self._forwarded(scope, receive, send)  # type: ignore[arg-type]  # uvicorn has types of its own for ASGI

    def _read(self, given: list[bytes], peer: str) -> Certificate | None:
        if not within(peer, self._certificate_proxies):
            raise ForgedCertificate("This header is for the proxies that end our TLS connections.")
        if given == [b""]:  # the client showed none
            return None
        try:
            (value,) = given
            return read_certificate(value)
        except (ValueError, x509.InvalidVersion):
            raise Unauthenticated("The client certificate that the proxy handed on cannot be read.") from None


@lru_cache(maxsize=256)
def read_certificate(text: bytes) -> Certificate:
    """From `:base64 of DER:` (RFC 9440) or PEM, with percent signs or without. Raises ValueError."""
    if text.startswith(b":"):
        if not (text.endswith(b":") and len(text) > 1):
            raise ValueError("no byte sequence")
        certificate = x509.load_der_x509_certificate(base64.b64decode(text[1:-1], validate=True))
    else:
        pem = unquote_to_bytes(text) if b"%" in text else text
        if not pem.lstrip().startswith(_PEM) or pem.count(_PEM) != 1:
            raise ValueError("not one certificate")
        certificate = x509.load_pem_x509_certificate(pem)
    der = certificate.public_bytes(Encoding.DER)
    digest = hashlib.sha256(der).hexdigest()
    return Certificate(digest, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def within(address: str, networks: Networks) -> bool:
    """Whether one of the networks has it. An IPv4 client of an IPv6 socket counts as the IPv4 client that it is."""
    try:
        found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in network for network in networks)
