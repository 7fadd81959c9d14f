"""A certificate authority that is made for a day, and what it signs."""

import contextlib
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_certificates(directory: Path, *, names: list[str]) -> None:
    """A test CA in `ca.pem`, and `cert.pem` with `key.pem` for the names and 127.0.0.1, valid for a day."""
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cacert-mail test CA")])
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    dated = x509.CertificateBuilder().issuer_name(subject).not_valid_before(now - timedelta(hours=1))
    dated = dated.not_valid_after(now + timedelta(days=1))
    ca = (
        dated.subject_name(subject)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    certificate = (
        dated.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(
            x509.SubjectAlternativeName(
                [*map(x509.DNSName, names), x509.IPAddress(IPv4Address("127.0.0.1"))],
            ),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    with contextlib.suppress(FileNotFoundError):
        (directory / "key.pem").unlink()
    (directory / "key.pem").touch(mode=0o600)
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
