"""A private Postfix and Dovecot with the very configuration that production gets."""

import contextlib
import imaplib
import os
import poplib
import shutil
import smtplib
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import make_msgid
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from app.addresses import DomainName
from app.mailconfig.dovecot23 import render_dovecot
from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.postfix import recipients_map, render_postfix
from app.mailconfig.rendering import ConfigFile
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, free_ports, run, wait_until

PRIMARY_DOMAIN = DomainName("cacert.test")
HOST = "mail"
"""The row in `hosts`."""

_TEST_ONLY = """
# A refused login is not made to wait, nor everybody after it from the same address: in tests all come from 127.0.0.1.
auth_failure_delay = 0
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
mail_fsync = never
"""


class MailStack:
    """One mail host on loopback. `start` wants a MariaDB that has its schema and grants; `close` ends it."""

    def start(self, mariadb: MariaDB) -> None:
        self._processes = Processes()
        try:
            self._start(mariadb)
        except BaseException:
            self._processes.close()
            raise

    def _start(self, mariadb: MariaDB) -> None:
        self.directory = self.host_root = base = self._processes.directory
        self.homes = base / "home"
        """Where the mailboxes are made, each with its own owner. Belongs to root."""
        self.postfix_config = base / "postfix"
        self.dovecot_config = base / "dovecot/dovecot.conf"
        self.mail_log = base / "mail.log"
        self.dovecot_log = base / "dovecot.log"
        self.ca_file = base / "ca.pem"
        for directory in (self.homes, self.postfix_config, self.dovecot_config.parent, base / "queue", base / "data"):
            directory.mkdir()
        shutil.chown(base / "data", "postfix")
        (base / "data").chmod(0o700)

        smtp, imap, imaps, pop3s, lmtp, quota, self.relay_port = free_ports(7)
        self.settings = HostSettings(
            smtp_port=smtp, imap_port=imap, imaps_port=imaps, pop3s_port=pop3s, lmtp_port=lmtp, quota_port=quota
        )
        self.file = HostFile(
            host=HOST,
            hostname=DomainName(f"{HOST}.{PRIMARY_DOMAIN}"),
            listen=(IPv4Address("127.0.0.1"),),
            relay_host=IPv4Address("127.0.0.1"),  # mail to elsewhere goes to `relay_port`, or stays in the queue
            relay_port=self.relay_port,
            dns=False,
            tls_certificate=base / "cert.pem",
            tls_key=base / "key.pem",
            database_socket=mariadb.socket,
            postfix_password=SecretStr(mariadb.passwords["postfix"]),
            dovecot_password=SecretStr(mariadb.passwords["dovecot"]),
            homes=self.homes,
            mail_log=self.mail_log,
            dovecot_log=self.dovecot_log,
            postfix_config_dir=self.postfix_config,
            postfix_queue_dir=base / "queue",
            postfix_data_dir=base / "data",
            dovecot_config_dir=self.dovecot_config.parent,
            dovecot_base_dir=base / "run",
            dovecot_state_dir=base / "state",
        )
        self.recipients_map = recipients_map(self.file)
        write(render_postfix(self.settings, self.file, PRIMARY_DOMAIN), self.postfix_config)
        write({"aliases": ConfigFile("")}, self.postfix_config)
        check = subprocess.Popen(  # makes the queue's directories; 0.12 s, so beside the rest
            ["postfix", "-c", self.postfix_config, "check"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        make_certificates(base, names=[self.file.hostname, "localhost"])
        files = render_dovecot(self.settings, self.file, PRIMARY_DOMAIN, extra=_TEST_ONLY)
        write(files, self.dovecot_config.parent)
        self._dovecot = self._processes.start(["/usr/sbin/dovecot", "-F", "-c", self.dovecot_config])
        run(["postalias", "-c", self.postfix_config, f"lmdb:{self.postfix_config}/aliases"])
        if check.wait() != 0:
            raise RuntimeError(f"postfix check refuses {self.postfix_config}:\n{self.mail_log.read_text()}")
        self._postfix = self._processes.start(
            ["/usr/lib/postfix/sbin/master", "-c", self.postfix_config, "-d"], MAIL_CONFIG=str(self.postfix_config)
        )
        for port in (imap, imaps, pop3s, lmtp, quota):
            self._processes.wait_for(self._dovecot, port, self.dovecot_log)
        self._processes.wait_for(self._postfix, smtp, self.mail_log)
        self.tls = ssl.create_default_context(cafile=str(self.ca_file))

    def close(self) -> None:
        """Ends Postfix and Dovecot and deletes everything."""
        self._processes.close()

    def reload(self) -> None:
        """Both read their configuration anew. Postfix wants it after each restart of MariaDB too."""
        run(["postfix", "-c", self.postfix_config, "reload"])
        self.doveadm("reload")

    def empty(self) -> None:
        """No home, no queued mail, nothing in Dovecot's cache: for the next test. Rows are `MariaDB.empty`'s."""
        self.doveadm("auth", "cache", "flush")
        run(["postsuper", "-c", self.postfix_config, "-d", "ALL"])
        for home in self.homes.iterdir():
            shutil.rmtree(home)

    def doveadm(self, *arguments: str, expect: int = 0) -> str:
        return run(["doveadm", "-c", self.dovecot_config, *arguments], expect=expect)

    def postmap(self, *keys: str, table: str = "") -> dict[str, str]:
        """What the map (by default that of all recipients) answers for the keys that it knows. Raises `RuntimeError`
        when it cannot say."""
        argv: list[str | Path] = ["postmap", "-c", self.postfix_config, "-q", "-", table or self.recipients_map]
        done = subprocess.run(argv, input="\n".join(keys), capture_output=True, text=True, check=False)
        if done.returncode > 1 or done.stderr:
            raise RuntimeError(done.stderr)
        return dict(line.split("\t", 1) for line in done.stdout.splitlines())

    def smtp(self, *, source: str = "127.0.0.5") -> smtplib.SMTP:
        """A connection that has said EHLO. Any address in 127.0.0.0/8 is another client."""
        client = smtplib.SMTP("127.0.0.1", self.settings.smtp_port, "client.test", 10, source_address=(source, 0))
        client.ehlo()
        return client

    def send(
        self,
        to: str,
        subject: str = "hello",
        body: str = "text\n",
        *,
        sender: str = "s@example.net",
        source: str = "127.0.0.5",
    ) -> int:
        """Hands a message to port 25; the first reply code that refuses it, or 250. It is delivered a little later."""
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = sender, to, subject
        message["Message-ID"] = make_msgid(domain="example.net")
        message.set_content(body)
        data = message.as_bytes(policy=SMTP)
        with self.smtp(source=source) as client:
            for code, _ in (client.mail(sender, [f"size={len(data)}"]), client.rcpt(to)):
                if code != 250:
                    return code
            return client.data(data)[0]

    def wait_for_mail(self, home: Path, count: int = 1, *, seconds: float = 10) -> list[Path]:
        """The files of a home's INBOX, once there are `count` of them. Raises `TimeoutError` with the logs' end."""

        def messages() -> list[Path]:
            return [*home.glob("Maildir/new/*"), *home.glob("Maildir/cur/*")]

        if not wait_until(lambda: len(messages()) >= count, seconds=seconds):
            logs = "".join(log.read_text(errors="replace")[-3000:] for log in (self.mail_log, self.dovecot_log))
            raise TimeoutError(f"{len(messages())} of {count} messages in {home}:\n{logs}")
        return messages()

    def imap(self, address: str, password: str, *, source: str = "127.0.0.1") -> imaplib.IMAP4_SSL:
        """Signed in by IMAPS. Raises `imaplib.IMAP4.error` when refused."""
        client = _ImapFrom(source, self.settings.imaps_port, self.tls)
        try:
            client.login(address, password)
        except BaseException:
            client.shutdown()
            raise
        return client

    def pop3(self, address: str, password: str) -> poplib.POP3_SSL:
        """Signed in by POP3S. Raises `poplib.error_proto` when refused."""
        client = poplib.POP3_SSL("127.0.0.1", self.settings.pop3s_port, context=self.tls, timeout=10)
        try:
            client.user(address)
            client.pass_(password)
        except BaseException:
            client.close()
            raise
        return client


class _ImapFrom(imaplib.IMAP4_SSL):
    """imaplib knows no source address."""

    def __init__(self, source: str, port: int, context: ssl.SSLContext) -> None:
        self._source, self._context = source, context
        super().__init__("127.0.0.1", port, ssl_context=context, timeout=10)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        plain = socket.create_connection((self.host, self.port), timeout, (self._source, 0))
        return self._context.wrap_socket(plain, server_hostname=self.host)


def write(files: Mapping[str, ConfigFile], directory: Path) -> None:
    """As the worker would, but for one thing: they are a minute old. Postfix waits for seconds when one is younger."""
    minute_ago = time.time() - 60
    for name, file in files.items():
        path = directory / name
        path.write_text(file.text)
        path.chmod(file.mode)
        shutil.chown(path, "root", file.group)
        os.utime(path, (minute_ago, minute_ago))


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
