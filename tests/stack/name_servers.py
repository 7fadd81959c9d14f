"""Two real name servers with one zone, each changed by itself."""

import signal
import subprocess
from base64 import b64encode
from collections.abc import Sequence
from secrets import token_bytes
from typing import NamedTuple

import dns.exception
import dns.message
import dns.query
import dns.tsigkeyring
import dns.update

from app.dns.records import Record
from tests.stack.processes import Processes, free_ports

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

    tsig = Tsig("publisher", b64encode(token_bytes(32)).decode())

    def __init__(self, zone: str, names: Sequence[str] = tuple(SERVERS)) -> None:
        self.zone = zone
        self._text = _zone(names)
        self.processes = Processes()
        (self.port,) = free_ports(1)
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

    def stop(self, server: str) -> None:
        self.processes.stop(self.running[server], signal.SIGKILL)

    def start_again(self, server: str) -> None:
        """With what it had been told."""
        self.running[server] = self._start(server)

    def close(self) -> None:
        self.processes.close()
