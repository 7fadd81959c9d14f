"""Self-signed client certificates."""

import base64
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

START = datetime(2026, 1, 1, tzinfo=UTC)


def certificate(
    name: str, *, not_before: datetime = START, not_after: datetime = START + timedelta(days=3650)
) -> tuple[str, bytes, ec.EllipticCurvePrivateKey]:
    """PEM, DER and the private key."""
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name)]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(not_before, not_after - timedelta(days=1)))
        .not_valid_after(not_after)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode(), made.public_bytes(Encoding.DER), key


def as_rfc9440(der: bytes) -> str:
    return f":{base64.b64encode(der).decode()}:"


def as_nginx(pem: str) -> str:
    """`$ssl_client_escaped_cert`: percent signs for all but the unreserved characters (RFC 3986)."""
    return quote(pem, safe="")
