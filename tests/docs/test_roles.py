"""docs/roles.md: every command of the page is run as it stands, through the nginx of the page, against a real API."""

import asyncio
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from app.addresses import DomainName
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import RANKS, Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from app.web.docs import role_table
from tests.conftest import ACTOR, HOST
from tests.stack.processes import Processes, free_ports
from tests.web.certificates import certificate

PAGE = (Path(__file__).parents[2] / "docs/roles.md").read_text()
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def block(containing: str) -> str:
    (found,) = [text for _, text in BLOCKS if containing in text]
    return found


def test_the_tables_are_those_of_the_code() -> None:
    assert role_table() in PAGE
    ranks = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d) \|$", PAGE, re.MULTILINE))
    assert ranks == {role.value: str(rank) for role, rank in RANKS.items()}
    assert [Role(name) for name in ranks]


@dataclass
class Site:
    url: str
    direct: str
    directory: Path
    environment: dict[str, str]
    ran: list[str]

    def run(self, containing: str, **environment: str) -> str:
        text = block(containing)
        self.ran.append(text)
        done = subprocess.run(
            ["sh", "-euc", text],
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def answer(self, containing: str, **environment: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run(containing, **environment))
        return answer


async def _fill(database_url: str) -> tuple[str, str]:
    database = Database(database_url)
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, DomainName("cacert.org"), DomainKind.PRIMARY)
        await create_host(change, HOST)
        credentials = await create_principal(change, "Administrator", Role.PRIMARY)
    await database.close()
    return credentials


@pytest.fixture(scope="module")
def site(sqlite_template: Path, key_directory: Path) -> Iterator[Site]:
    missing = [package for name, package in (("curl", "curl"), ("nginx", "nginx-light")) if not shutil.which(name)]
    if missing:
        pytest.fail(f"The page needs these Debian packages: {' '.join(missing)}", pytrace=False)
    processes = Processes()
    try:
        directory = processes.directory
        shutil.copy(sqlite_template, directory / "site.db")
        port, tls_port = free_ports(2)
        url = f"https://127.0.0.1:{tls_port}"
        settings = dict(re.findall(r"^ {4}([A-Z_]+)=(\S+)$", PAGE, re.MULTILINE))
        assert settings.keys() == {"CERTIFICATE_PROXIES", "TRUSTED_PROXIES"}
        environment = {
            "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/site.db",
            "KEY_DIRECTORY": str(key_directory),
            "LINK_KEY_FILE": str(key_directory / "link.key"),
            "ISSUER": url,
            "PORT": str(port),
            "WAKE_DIRECTORY": str(directory),
        }
        client_id, secret = asyncio.run(_fill(environment["DATABASE_URL"]))
        api = processes.start([sys.executable, "-m", "app.cli.main", "api"], **environment, **settings)
        processes.wait_for(api, port, directory / "python.out")
        pem, _, key = certificate("127.0.0.1")
        (directory / "server.crt").write_text(pem)
        (directory / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (directory / "nginx.conf").write_text(_nginx(directory, port, tls_port))
        nginx = processes.start(["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"])
        processes.wait_for(nginx, tls_port, directory / "nginx.out")
        told = {
            "URL": url,
            "CLIENT_ID": client_id,
            "CLIENT_SECRET": secret,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(directory),
            "CURL_CA_BUNDLE": str(directory / "server.crt"),
            "DATABASE_URL": environment["DATABASE_URL"],
        }
        yield Site(url, f"http://127.0.0.1:{port}", directory, told, [])
    finally:
        processes.close()


def _nginx(directory: Path, port: int, tls_port: int) -> str:
    """The page's server, at another port, with other files, and what surrounds it in nginx.conf."""
    server = block("server {")
    for theirs, ours in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{tls_port} ssl;"),
        ("http://127.0.0.1:8825", f"http://127.0.0.1:{port}"),
        ("/etc/ssl/mail.example.org.crt", f"{directory}/server.crt"),
        ("/etc/ssl/private/mail.example.org.key", f"{directory}/server.key"),
    ):
        assert server.count(theirs) == 1
        server = server.replace(theirs, ours)
    paths = "".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; master_process off; pid {directory}/nginx.pid; error_log stderr;"
    return f"{main}\nevents {{}}\nhttp {{ access_log off; {paths}\n{server}}}\n"


def test_the_page(site: Site) -> None:
    administrator = (site.environment["CLIENT_ID"], site.environment["CLIENT_SECRET"])
    with httpx.Client(base_url=site.direct, auth=administrator, trust_env=False) as client:
        assert client.post("/v1/users", json={"address": "bob@cacert.org"}).status_code == 202

        website = site.answer('"role": "website"')
        bob = site.answer('"role": "secondary"')
        assert (website["role"], len(website["secret"])) == ("website", 43)
        assert (bob["user_id"], bob["networks"]) == (1, ["192.0.2.0/24", "2001:db8::/48"])
        restricted = site.answer('"networks": ["192.0.2.10"]', PRINCIPAL=website["id"])
        assert restricted["networks"] == ["192.0.2.10/32"]

        webmail = client.post("/v1/principals", json={"role": "webmail", "name": "Webmail"}).json()
        principal = {"PRINCIPAL": webmail["id"]}
        rotated = site.answer("overlap_seconds", **principal)
        for secret in (webmail["secret"], rotated["secret"]):
            assert client.get("/v1/me", auth=(webmail["id"], secret)).status_code == 200
        revoked = site.answer("/revoke", KEY=str(webmail["keys"][0]["id"]), **principal)
        assert [key["ends_at"] is None for key in revoked["keys"]] == [False, True]
        printed = site.run("cacert-mail principal rotate", **principal)
        assert re.fullmatch(rf"CLIENT_ID={webmail['id']}\nCLIENT_SECRET=\S{{43}}\n", printed)

        site.run("openssl req")
        registered = site.answer("-fingerprint -sha256", **principal)
        assert registered["keys"][-1]["kind"] == "certificate"
        me = site.answer('--key webmail.key "$URL/v1/me"')
        assert (me["id"], me["key_id"]) == (webmail["id"], registered["keys"][-1]["id"])
        token = site.answer("grant_type=client_credentials", **principal)["access_token"]

        owner = site.answer("/owner-tokens")
        bearer = {"Authorization": f"Bearer {owner['access_token']}"}
        assert client.get("/v1/users/1", headers=bearer, auth=None).json()["address"] == "bob@cacert.org"

    left_out = {text for language, text in BLOCKS if language == "sh"} - set(site.ran)
    assert not left_out, "a block nobody runs"
    _attack(site, webmail["id"], token)


def _attack(site: Site, client_id: str, token: str) -> None:
    """What a client can send through nginx, or past it, in the name of somebody who has a certificate."""
    certificate_file = (site.directory / "webmail.crt").read_text()
    forged = {"Client-Cert": certificate_file.replace("\n", "%0A")}
    bearer = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=site.url, verify=_context(site.directory), trust_env=False) as through_nginx:
        assert through_nginx.get("/v1/me", headers=bearer).status_code == 401, "a stolen token"
        assert through_nginx.get("/v1/me", headers=forged).status_code == 401, "nginx overwrites it"
        assert through_nginx.get("/v1/me", headers=forged | bearer).status_code == 401
        other, _, key = certificate("webmail")
        (site.directory / "other.crt").write_text(other)
        (site.directory / "other.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with httpx.Client(base_url=site.url, verify=_context(site.directory, "webmail"), trust_env=False) as right:
        assert right.get("/v1/me", headers=bearer).json()["id"] == client_id
    with httpx.Client(base_url=site.url, verify=_context(site.directory, "other"), trust_env=False) as wrong:
        assert wrong.get("/v1/me").status_code == 401, "of the same name, and somebody else's"
        assert wrong.get("/v1/me", headers=bearer).status_code == 401


def _context(directory: Path, client: str | None = None) -> ssl.SSLContext:
    """Believes our nginx, and shows it this client's certificate."""
    context = ssl.create_default_context(cafile=directory / "server.crt")
    if client is not None:
        context.load_cert_chain(directory / f"{client}.crt", directory / f"{client}.key")
    return context
