"""`cacert-mail dkim adopt`: against a real API, and name servers that have the key, another one, or none."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from app.cli.dkim import public_half
from app.dns.records import dkim_record
from app.models.dkim_keys import Algorithm
from tests.conftest import HOST
from tests.stack.name_servers import SERVERS, NameServers
from tests.web.site import Site, site

__all__ = ["site"]

DOMAIN = "cacert.org"
KEYS = f"/v1/domains/{DOMAIN}/dkim-keys"
ROOT = Path(__file__).parents[2]

HOST_FILE = """host = "{host}"
hostname = "mail.cacert.org"
tls_certificate = "/etc/ssl/mail.pem"
tls_key = "/etc/ssl/mail.key"
postfix_password = "x"
dovecot_password = "x"
dkim_dir = "{directory}/dkim"
"""


@pytest.fixture(scope="module")
def names() -> Iterator[NameServers]:
    made = NameServers(DOMAIN)
    yield made
    made.close()


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, auth=(site.client_id, site.secret), timeout=30) as client:
        yield client


def pem(key: Any, form: PrivateFormat = PrivateFormat.PKCS8, password: bytes | None = None) -> bytes:
    how = NoEncryption() if password is None else BestAvailableEncryption(password)
    return bytes(key.private_bytes(Encoding.PEM, form, how))


def key_file(site: Site, name: str, data: bytes) -> Path:
    path = site.processes.directory / f"{name}.pem"
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def adopt(site: Site, names: NameServers, selector: str, file: Path, *options: str, **changed: str) -> tuple[int, str]:
    directory = site.processes.directory
    (directory / "host.toml").write_text(HOST_FILE.format(host=HOST, directory=directory))
    (directory / "host.toml").chmod(0o600)
    environment = {
        "PATH": os.environ["PATH"],
        "API_URL": site.url,
        "CLIENT_ID": site.client_id,
        "CLIENT_SECRET": site.secret,
        "MAIL_HOST": HOST,
        "HOST_FILE": str(directory / "host.toml"),
        "DNS_RESOLVERS": SERVERS["ns1"],
        "DNS_PORT": str(names.port),
        "DNS_SECONDS": "1",
    }
    arguments = ["dkim", "adopt", "--domain", DOMAIN, "--selector", selector, "--key", str(file), *options]
    done = subprocess.run(
        [sys.executable, "-m", "app.cli.main", *arguments],
        env=environment | changed,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "PRIVATE" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def enter(names: NameServers, selector: str, file: Path, servers: tuple[str, ...] = ("ns1", "ns2")) -> str:
    """What it should be, everywhere."""
    record = dkim_record(selector, DOMAIN, *public_half(file))
    for server in servers:
        names.enter(server, record, record.name)
    return record.value


@pytest.mark.parametrize(
    ("selector", "form"), [("mail", PrivateFormat.PKCS8), ("old", PrivateFormat.TraditionalOpenSSL)]
)
def test_a_key_is_taken_over(
    site: Site, names: NameServers, client: httpx.Client, selector: str, form: PrivateFormat
) -> None:
    file = key_file(site, selector, pem(generate_private_key(65537, 2048), form))
    before = file.read_bytes()
    value = enter(names, selector, file)

    status, said = adopt(site, names, selector, file)
    assert (status, "dry run" in said, "would be taken over" in said) == (0, True, True), said
    assert client.get(f"{KEYS}/{selector}").status_code == 404
    place = site.processes.directory / "dkim" / f"{selector}._domainkey.{DOMAIN}"
    assert not place.exists()

    for _ in range(2):  # run again, it ends in the same place
        status, said = adopt(site, names, selector, file, "--apply")
        assert (status, "was taken over" in said) == (0, True), said
    key = client.get(f"{KEYS}/{selector}").json()
    assert (key["state"], key["host"], key["algorithm"], key["activate"]) == ("unpublished", HOST, "rsa-2048", True)
    assert key["record"]["value"] == value
    status_of = place.stat()
    assert (stat.S_IMODE(status_of.st_mode), status_of.st_uid) == (0o640, 0)
    assert file.read_bytes() == before, "it stays where it was"
    events = client.get("/v1/audit-events", params={"action": "dkim-keys.create"}).json()["items"]
    assert [event["after"]["selector"] for event in events].count(selector) == 1
    status, said = adopt(site, names, selector, file)
    assert (status, "known already" in said) == (0, True)


def test_what_the_dns_does_not_have_is_refused(site: Site, names: NameServers, client: httpx.Client) -> None:
    file = key_file(site, "other", pem(generate_private_key(65537, 2048)))
    shown = key_file(site, "shown", pem(generate_private_key(65537, 2048)))

    def refused(says: str) -> None:
        status, said = adopt(site, names, "other", file, "--apply")
        assert status == 1, said
        assert says in said
        assert client.get(f"{KEYS}/other").status_code == 404
        assert not (site.processes.directory / "dkim" / f"other._domainkey.{DOMAIN}").exists()

    refused("no such record")
    enter(names, "other", shown)
    refused("The DNS does not have exactly this key")
    enter(names, "other", file, ("ns1",))
    refused("ns2.cacert.org")
    # The same key in other words: it says what to enter.
    record = dkim_record("other", DOMAIN, *public_half(file))
    for server in SERVERS:
        names.enter(
            server, type(record)(record.name, "TXT", record.value.replace("k=rsa;", "h=sha256; k=rsa;")), record.name
        )
    refused(record.zone_line)
    enter(names, "other", file)
    assert adopt(site, names, "other", file, "--apply")[0] == 0


def test_what_is_no_such_key_is_refused(site: Site, names: NameServers) -> None:
    for data in (
        b"",
        b"-----BEGIN PRIVATE KEY-----\nMIIEv\n-----END PRIVATE KEY-----\n",
        pem(generate_private_key(65537, 2048), password=b"secret"),
        pem(generate_private_key(65537, 2304)),
        os.urandom(2000),
    ):
        file = key_file(site, "bad", data)
        status, said = adopt(site, names, "mail", file)
        assert status == 1, said
        assert str(file) in said or ".pem" in said
    status, said = adopt(site, names, "mail", site.processes.directory / "none.pem")
    assert (status, "none.pem" in said) == (1, True)


@pytest.mark.parametrize("selector", ["../x", "a_b", "a\nb", "", "ä"])
def test_a_selector_that_is_not_ldh_is_refused(site: Site, names: NameServers, selector: str) -> None:
    status, said = adopt(site, names, selector, Path("/dev/null"))
    assert (status, "selector is labels" in said) == (2, True), said


def test_what_the_api_says_is_said(site: Site, names: NameServers, client: httpx.Client) -> None:
    file = key_file(site, "third", pem(Ed25519PrivateKey.generate()))
    assert public_half(file)[0] is Algorithm.ED25519
    enter(names, "third", file)
    status, said = adopt(site, names, "third", file, CLIENT_SECRET="wrong")
    assert (status, "Traceback" in said) == (1, False), said
    assert client.post(KEYS, json={"selector": "third", "algorithm": "ed25519"}).is_success
    status, said = adopt(site, names, "third", file, "--apply")
    assert (status, "known already, and not as this key" in said) == (1, True), said
    assert not (site.processes.directory / "dkim" / f"third._domainkey.{DOMAIN}").exists()
