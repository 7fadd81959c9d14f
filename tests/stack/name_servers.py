"""Real name servers: two with one zone, each changed by itself, and one with an HTTP API."""

import signal
import sqlite3
import subprocess
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from secrets import token_bytes, token_hex
from typing import NamedTuple

import dns.exception
import dns.message
import dns.query
import dns.rdatatype
import dns.tsigkeyring
import dns.update
import httpx

from app.dns.records import Record
from tests.stack.processes import Processes, free_ports

POWERDNS = "127.0.0.33"
SERVERS = {"ns1": "127.0.0.31", "ns2": "127.0.0.32"}

_CONFIG = """
server:
    listen: {address}@{port}
    rundir: {directory}
database:
    storage: {directory}
key:
  - id: {key_name}
    algorithm: hmac-sha256
    secret: {key_secret}
acl:
  - id: tests
    key: {key_name}
    action: update
zone:
  - domain: {zone}
    file: {directory}/zone
    zonefile-sync: 0
    journal-content: none
    acl: tests
"""


def _zone(names: Sequence[str]) -> str:
    lines = ["@ 3600 IN SOA ns1 hostmaster 1 3600 600 86400 60"]
    for name in names:
        lines += [f"@ 3600 IN NS {name}", f"{name} 3600 IN A {SERVERS[name]}"]
    return "\n".join([*lines, ""])


class Tsig(NamedTuple):
    """What an update is signed with (RFC 8945)."""

    key_name: str
    key_secret: str


class NameServers:
    """Two Knots, or those of SERVERS that are named. `close` ends them."""

    address = SERVERS["ns1"]
    tsig = Tsig("publisher", b64encode(token_bytes(32)).decode())

    def __init__(self, zone: str, names: Sequence[str] = tuple(SERVERS), port: int | None = None) -> None:
        self.zone = zone
        self._text = _zone(names)
        self.processes = Processes()
        self.port = port or free_ports(1)[0]
        self.running = {name: self._start(name) for name in names}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        address = SERVERS[name]
        directory = self.processes.directory / name
        if not directory.exists():
            directory.mkdir()
            (directory / "zone").write_text(self._text)
        config = directory / "knot.conf"
        config.write_text(
            _CONFIG.format(address=address, port=self.port, directory=directory, zone=self.zone, **self.tsig._asdict())
        )
        process = self.processes.start(["/usr/sbin/knotd", "-c", config])
        self._wait_for(process, address)
        return process

    def _wait_for(self, process: subprocess.Popen[bytes], address: str) -> None:
        query = dns.message.make_query(self.zone, "SOA")
        for _ in range(200):
            assert process.poll() is None, (self.processes.directory / "knotd.out").read_text()
            try:
                if dns.query.udp(query, address, port=self.port, timeout=0.05).answer:
                    return
            except (dns.exception.Timeout, OSError):
                continue
        raise AssertionError("knotd does not answer")

    def update(self) -> dns.update.UpdateMessage:
        """An empty one, which will be signed."""
        keyring = dns.tsigkeyring.from_text(dict([self.tsig]))
        return dns.update.UpdateMessage(self.zone, keyring=keyring, keyalgorithm="hmac-sha256.")

    def send(self, server: str, update: dns.update.UpdateMessage) -> None:
        response = dns.query.tcp(update, SERVERS[server], port=self.port, timeout=5)
        assert response.rcode() == 0, response

    @property
    def publisher(self) -> str:
        """Of a `DNS_FILE`, that of the first server."""
        name, secret = self.tsig
        members = {"kind": "rfc2136", "server": SERVERS["ns1"], "key_name": name, "key_secret": secret}
        return "".join(f'{name} = "{value}"\n' for name, value in members.items()) + f"port = {self.port}\n"

    def enter(self, server: str, record: Record | None, name: str) -> None:
        """In place of what is there."""
        update = self.update()
        update.delete(f"{name}.", "TXT")
        if record is not None:
            update.add(f"{record.name}.", record.ttl, "TXT", record.rdata)
        self.send(server, update)

    def add(self, server: str, record: Record) -> None:
        """Beside what is there."""
        update = self.update()
        update.add(f"{record.name}.", record.ttl, "TXT", record.rdata)
        self.send(server, update)

    def stop(self, server: str = "ns1") -> None:
        self.processes.stop(self.running[server], signal.SIGKILL)

    def start_again(self, server: str = "ns1") -> None:
        """With what it had been told."""
        self.running[server] = self._start(server)

    def close(self) -> None:
        self.processes.close()


def texts_at(address: str, port: int, name: str) -> list[str]:
    """The TXT records of the name, each as one string."""
    answer = dns.query.tcp(dns.message.make_query(name, "TXT"), address, port=port, timeout=5).answer
    found = [rdata for rrset in answer if rrset.rdtype == dns.rdatatype.TXT for rdata in rrset]
    return sorted(b"".join(rdata.strings).decode() for rdata in found)


_SCHEMA = Path("/usr/share/pdns-backend-sqlite3/schema/schema.sqlite3.sql")
_POWERDNS_CONFIG = """
local-address={address}
local-port={port}
webserver=yes
webserver-address={address}
webserver-port={http}
webserver-allow-from=127.0.0.0/8
api=yes
api-key={key}
launch=gsqlite3
gsqlite3-database={directory}/zones.db
socket-dir={directory}
cache-ttl=0
query-cache-ttl=0
negquery-cache-ttl=0
zone-cache-refresh-interval=0
"""


class PowerDnsServer:
    """One with this zone, whose only name server it is. `close` ends it."""

    address = POWERDNS

    def __init__(self, zone: str) -> None:
        self.processes = Processes()
        directory = self.processes.directory
        self.key = token_hex(16)
        self.port, self.http = free_ports(2)
        with sqlite3.connect(directory / "zones.db") as database:
            database.executescript(_SCHEMA.read_text())
        config = _POWERDNS_CONFIG.format(
            address=POWERDNS, port=self.port, http=self.http, key=self.key, directory=directory
        )
        (directory / "pdns.conf").write_text(config)
        self.start_again()
        address = {"name": f"ns1.{zone}.", "type": "A", "ttl": 3600, "records": [{"content": POWERDNS}]}
        body = {"name": f"{zone}.", "kind": "Native", "nameservers": [f"ns1.{zone}."], "soa_edit_api": "DEFAULT"}
        url = f"{self.url}/api/v1/servers/localhost/zones"
        made = httpx.post(url, json={**body, "rrsets": [address]}, headers={"X-API-Key": self.key}, trust_env=False)
        assert made.status_code == 201, made.text

    @property
    def url(self) -> str:
        return f"http://{POWERDNS}:{self.http}"

    @property
    def publisher(self) -> str:
        """Of a `DNS_FILE`."""
        return f'kind = "powerdns"\nurl = "{self.url}"\napi_key = "{self.key}"\n'

    def says(self, name: str) -> list[str]:
        return texts_at(POWERDNS, self.port, name)

    def start_again(self) -> None:
        """With what it had been told."""
        directory = self.processes.directory
        self._process = self.processes.start(
            ["/usr/sbin/pdns_server", f"--config-dir={directory}", "--daemon=no", "--guardian=no"]
        )
        for _ in range(200):
            assert self._process.poll() is None, (directory / "pdns_server.out").read_text()
            try:
                if httpx.get(f"{self.url}/api/v1/servers", headers={"X-API-Key": self.key}, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.02)
        raise AssertionError("PowerDNS does not answer")

    def stop(self) -> None:
        self.processes.stop(self._process, signal.SIGKILL)

    def close(self) -> None:
        self.processes.close()
