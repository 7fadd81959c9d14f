"""docs/website.md: every code block of the page is run as it stands, against a real API, worker and service.

Between a program and the API stands a small proxy, which is the bad network: it can lose an answer, answer 503 by itself
as a load balancer does, or let something happen between two requests.
"""

import asyncio
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from app.addresses import DomainName
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import ROLE_PERMISSIONS, Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from tests.conftest import ACTOR, HOST
from tests.stack.processes import Processes, free_ports

PAGE = Path(__file__).parents[2] / "docs/website.md"
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "curl": ("mailbox.sh", ["sh"]),
    "php": ("mailbox.php", ["php"]),
    "python": ("mailbox.py", [sys.executable]),
}


def block(containing: str) -> str:
    (found,) = [text for _, text in BLOCKS if containing in text]
    return found


def test_no_block_of_the_page_is_left_out() -> None:
    run_here = ["cacert-mail principal create", '"$URL/v1/me"', *(f"{name} create" for name, _ in PROGRAMS.values())]
    assert sorted(block(text) for text in run_here) == sorted(text for _, text in BLOCKS)
    rest = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^ {4}(curl|php|python3?|sh|cacert-mail) |```", rest, re.MULTILINE), "a block nobody runs"


class Proxy(BaseHTTPRequestHandler):
    """Hands on to `port`, through what `faults` says of a method: each is called once, and may answer itself."""

    port: ClassVar[int]
    faults: ClassVar[dict[str, list[Callable[["Proxy", bytes], bool]]]] = {}
    seen: ClassVar[list[tuple[str, str, str | None]]] = []
    protocol_version = "HTTP/1.1"

    def forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(self.command, self.path, body or None, {**dict(self.headers), "Connection": "close"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer, text

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.path, self.headers.get("Idempotency-Key")))
        self.close_connection = True
        faults = self.faults.get(self.command, [])
        if faults and faults.pop(0)(self, body):
            return
        answer, text = self.forward(body)
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() != "connection":
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = serve  # noqa: N815  as http.server wants them

    def log_message(self, *arguments: object) -> None:
        pass


def lose_answer(proxy: Proxy, body: bytes) -> bool:
    """It was done, and nobody is told."""
    proxy.forward(body)
    return True


def unavailable(proxy: Proxy, body: bytes) -> bool:
    """It was not done."""
    proxy.send_response_only(503)
    for name, value in (("Retry-After", "1"), ("Content-Length", "0"), ("Connection", "close")):
        proxy.send_header(name, value)
    proxy.end_headers()
    return True


@dataclass
class Site:
    url: str
    proxy: str
    home: Path
    client: httpx.Client
    credentials: dict[str, str]
    directory: Path
    programs: dict[str, list[str]] = field(default_factory=dict)

    def run(
        self, language: str, *arguments: str, expect: int = 0, network: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.programs[language], *arguments],
            env={"PATH": os.environ["PATH"], "URL": network or self.url, **self.credentials, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=self.directory,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    def create(self, language: str, member: str, address: str, **options: Any) -> subprocess.CompletedProcess[str]:
        name = [] if language == "curl" else [f"Name of {member}"]
        return self.run(language, "create", member, address, *name, **options)

    def found(self, address: str, **parameters: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.client.get("/v1/users", params={"address": address, **parameters}).json()[
            "items"
        ]
        return items

    def one(self, address: str, **parameters: str) -> dict[str, Any]:
        (user,) = self.found(address, **parameters)
        return user


async def _fill(database_url: str) -> None:
    database = Database(database_url)
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, DomainName("cacert.org"), DomainKind.PRIMARY)
        await create_host(change, HOST)
    await database.close()


@pytest.fixture(scope="module")
def site(sqlite_template: Path, key_directory: Path) -> Iterator[Site]:
    missing = [
        name
        for name, package in (("curl", "curl"), ("php", "php-cli"))
        if shutil.which(package.partition("-")[0]) is None
    ]
    if missing:
        pytest.fail(f"The page's programs need these Debian packages: {' '.join(missing)}", pytrace=False)
    modules = subprocess.run(["php", "-m"], capture_output=True, text=True, check=True).stdout.splitlines()
    if "curl" not in modules:
        pytest.fail("The page's PHP needs the Debian package php-curl", pytrace=False)
    processes = Processes()
    server: ThreadingHTTPServer | None = None
    try:
        directory = processes.directory
        shutil.copy(sqlite_template, directory / "site.db")
        (directory / "host").mkdir(mode=0o755)
        port, proxy_port = free_ports(2)
        url = f"http://127.0.0.1:{port}"
        environment = {
            "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/site.db",
            "KEY_DIRECTORY": str(key_directory),
            "LINK_KEY_FILE": str(key_directory / "link.key"),
            "ISSUER": url,
            "PORT": str(port),
            "WAKE_DIRECTORY": str(directory),
            "MAIL_HOST": HOST,
            "HOST_ROOT": str(directory / "host"),
            "LOCK_FILE": str(directory / "worker.lock"),
        }
        asyncio.run(_fill(environment["DATABASE_URL"]))
        for name in ("worker", "service", "api"):
            process = processes.start([sys.executable, "-m", "app.cli.main", name], **environment)
        processes.wait_for(process, port, directory / "python.out")
        printed = subprocess.run(
            ["sh", "-euc", block("cacert-mail principal create")],
            env={"PATH": f"{BIN}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        credentials = dict(line.split("=", 1) for line in printed.splitlines())
        assert set(credentials) == {"CLIENT_ID", "CLIENT_SECRET"}
        Proxy.port = port
        server = ThreadingHTTPServer(("127.0.0.1", proxy_port), Proxy)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        auth = (credentials["CLIENT_ID"], credentials["CLIENT_SECRET"])
        with httpx.Client(base_url=url, auth=auth, timeout=40, trust_env=False) as client:
            site = Site(url, f"http://127.0.0.1:{proxy_port}", directory / "host/home", client, credentials, directory)
            for language, (name, interpreter) in PROGRAMS.items():
                (directory / name).write_text(block(f"{name} create"))
                site.programs[language] = [*interpreter, str(directory / name)]
            yield site
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
        processes.close()


@pytest.fixture(autouse=True)
def good_network() -> Iterator[None]:
    Proxy.faults.clear()
    Proxy.seen.clear()
    yield
    assert not any(Proxy.faults.values()), "a fault that nobody met"


def test_who_am_i(site: Site) -> None:
    done = subprocess.run(
        ["sh", "-euc", block('"$URL/v1/me"')],
        env={"PATH": os.environ["PATH"], "URL": site.url, **site.credentials},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["permissions"] == sorted(ROLE_PERMISSIONS[Role.WEBSITE])


def test_language_of_each_block_is_said() -> None:
    assert [language for language, _ in BLOCKS] == ["sh", "sh", "sh", "php", "python"]


@pytest.mark.parametrize("language", PROGRAMS)
class TestProgram:
    def test_life_of_a_mailbox(self, site: Site, language: str) -> None:
        address, member = f"life.{language}@cacert.org", f"life {language}"
        created = site.create(language, member, address)
        user = site.one(address)
        assert (user["external_id"], user["state"], user["ready"]) == (member, "active", True)
        assert user["proofs"]["maildir"]["result"] == "ok"
        assert (site.home / f"life.{language}/Maildir/new").is_dir()
        assert str(user["id"]) in created.stdout
        assert created.stderr == ""
        # Again, by another run: nothing is made twice, and it is no error.
        assert str(user["id"]) in site.create(language, member, address).stdout
        assert site.one(address)["version"] == 1

        site.run(language, "suspend", str(user["id"]), "Asked for it")
        suspended = site.one(address)
        assert (suspended["state"], suspended["suspended_reason"], suspended["ready"]) == (
            "suspended",
            "Asked for it",
            True,
        )

        refused = site.run(language, "delete", str(user["id"]), "somebody else", expect=1)
        assert "not deleted" in refused.stderr
        assert site.one(address)["state"] == "suspended"

        site.run(language, "delete", str(user["id"]), member)
        deleted = site.one(address, state="deleted")
        assert (deleted["id"], deleted["ready"], deleted["purge_at"] is not None) == (user["id"], True, True)
        assert not (site.home / f"life.{language}").exists()
        site.run(language, "delete", str(user["id"]), member)
        # Neither that person nor another one gets it by accident.
        site.create(language, member, address, expect=1)
        other = site.create(language, f"another {language}", address, expect=1)
        assert "deleted account" in other.stdout + other.stderr
        assert site.found(address) == []

    def test_password(self, site: Site, language: str) -> None:
        address = f"password.{language}@cacert.org"
        if language == "curl":
            site.create(language, address, address)
            assert not site.one(address)["has_password"]
            return
        weak = site.create(language, address, address, expect=1, PASSWORD="12345678")
        assert "422" in weak.stderr
        assert "too short" in weak.stderr
        site.create(language, address, address, PASSWORD="seven green lanterns over the harbour")
        assert site.one(address)["has_password"]

    def test_address_of_somebody_else(self, site: Site, language: str) -> None:
        address = f"taken.{language}@cacert.org"
        site.create(language, f"first {language}", address)
        refused = site.create(language, f"second {language}", address, expect=1)
        assert "is taken" in refused.stdout + refused.stderr
        assert site.one(address)["external_id"] == f"first {language}"

    def test_second_address_for_the_same_person(self, site: Site, language: str) -> None:
        site.create(language, f"greedy {language}", f"one.{language}@cacert.org")
        site.create(language, f"greedy {language}", f"two.{language}@cacert.org", expect=1)
        assert site.found(f"two.{language}@cacert.org") == []

    def test_wrong_secret(self, site: Site, language: str) -> None:
        refused = site.create(
            language, f"wrong {language}", f"wrong.{language}@cacert.org", expect=1, CLIENT_SECRET="wrong"
        )
        assert "is wrong, or the client is disabled" in refused.stderr
        assert site.found(f"wrong.{language}@cacert.org") == []

    def test_lost_answer_and_503(self, site: Site, language: str) -> None:
        """The same is sent with the same key, until it is answered; one mailbox was made, and that is no conflict."""
        address = f"lost.{language}@cacert.org"
        Proxy.faults["POST"] = [unavailable, lose_answer, unavailable]
        created = site.create(language, f"lost {language}", address, network=site.proxy)
        assert "409" not in created.stderr
        posts = [key for method, _, key in Proxy.seen if method == "POST"]
        assert len(posts) == 4
        assert len(set(posts)) == 1
        assert posts[0] is not None
        assert [method for method, *_ in Proxy.seen] == ["POST"] * 4, "no detour by a 409"
        user = site.one(address)
        assert (user["version"], user["ready"]) == (1, True)

    def test_changed_in_between(self, site: Site, language: str) -> None:
        """412: it looks again, sees that it is still the right one, and deletes it."""
        address, member = f"between.{language}@cacert.org", f"between {language}"
        site.create(language, member, address)
        user_id = site.one(address)["id"]

        def somebody_changes(proxy: Proxy, body: bytes) -> bool:
            site.client.patch(f"/v1/users/{user_id}", json={"display_name": "Changed"}).raise_for_status()
            return False

        Proxy.faults["DELETE"] = [somebody_changes]
        site.run(language, "delete", str(user_id), member, network=site.proxy)
        assert [method for method, *_ in Proxy.seen] == ["GET", "DELETE", "GET", "DELETE"]
        assert site.one(address, state="deleted")["display_name"] == "Changed"

    def test_given_to_somebody_else_in_between(self, site: Site, language: str) -> None:
        """412, and after another look it is nobody whom it should delete."""
        address, member = f"moved.{language}@cacert.org", f"moved {language}"
        site.create(language, member, address)
        user_id = site.one(address)["id"]

        def somebody_changes(proxy: Proxy, body: bytes) -> bool:
            change = {"external_id": f"new owner {language}"}
            site.client.patch(f"/v1/users/{user_id}", json=change).raise_for_status()
            return False

        Proxy.faults["DELETE"] = [somebody_changes]
        site.run(language, "delete", str(user_id), member, network=site.proxy, expect=1)
        assert site.one(address)["state"] == "active"

    def test_lost_answer_to_a_delete(self, site: Site, language: str) -> None:
        address, member = f"gone.{language}@cacert.org", f"gone {language}"
        site.create(language, member, address)
        Proxy.faults["DELETE"] = [lose_answer]
        site.run(language, "delete", str(site.one(address)["id"]), member, network=site.proxy)
        assert site.one(address, state="deleted")["version"] == 2

    def test_host_cannot(self, site: Site, language: str) -> None:
        """Something that is not ours lies where the home should be: accepted, and an administrator is asked for."""
        (site.home / f"stuck.{language}").write_text("not a home")
        accepted = site.create(language, f"stuck {language}", f"stuck.{language}@cacert.org")
        assert "administrator" in accepted.stderr
        user = site.one(f"stuck.{language}@cacert.org")
        assert (user["ready"], user["job"]["state"]) == (False, "dead")
        if language != "curl":
            assert user["job"]["error"] in accepted.stderr
