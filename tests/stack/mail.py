"""A private Postfix, Dovecot and rspamd with the very configuration that production gets, and the policy process."""

import imaplib
import json
import os
import poplib
import shutil
import smtplib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import make_msgid
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from app.addresses import DomainName
from app.mailconfig.everything import render_all
from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.postfix import local_aliases_map, recipients_map, virtual_aliases_map
from app.mailconfig.rendering import ConfigFile
from app.mailconfig.rspamd import milter_socket
from app.workers.host.dkim_files import begin_table
from tests.stack.certificates import make_certificates
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, free_ports, run, wait_until

PRIMARY_DOMAIN = DomainName("cacert.test")
HOST = "mail"
"""The row in `hosts`."""
RETURNS_UID = 150_000
"""Of whoever reads bounces to returns@."""

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
    """One mail host on loopback. `start` wants a MariaDB that has its schema and grants, made by the migrations; `close` ends
    it."""

    auth_policy: Mapping[str, str] = {}
    """`auth_policy_url` and `auth_policy_key` of the host's file."""

    resolver_port: int | None = None
    """Of the DNS server on 127.0.0.1 that rspamd asks. None: it verifies nothing."""

    networks: tuple[str, ...] = ()
    """`trusted_networks` of the host's file."""

    def start(self, mariadb: MariaDB, **switches: bool) -> None:
        """`switches` are those of `HostSettings`."""
        self._processes = Processes()
        self._mariadb, self._starts = mariadb, mariadb.starts
        try:
            self._start(mariadb, switches)
        except BaseException:
            self._processes.close()
            raise

    def _start(self, mariadb: MariaDB, switches: Mapping[str, bool]) -> None:
        self.directory = self.host_root = base = self._processes.directory
        self.homes = base / "home"
        """Where the mailboxes are made, each with its own owner. Belongs to root."""
        self.postfix_config = base / "postfix"
        self.dovecot_config = base / "dovecot/dovecot.conf"
        self.mail_log = base / "mail.log"
        self.dovecot_log = base / "dovecot.log"
        self.ca_file = base / "ca.pem"
        self.aliases = base / "aliases"
        """The directory of the worker's alias file. Empty at first: see `build_aliases`."""
        self.returns = base / "returns"
        """Where bounces to returns@ arrive; see `HostFile.returns_maildir`."""
        self.rspamd_log = base / "rspamd.log"
        self.dkim = base / "dkim"
        """Private keys and the list of those that sign: the worker's; empty at first."""
        own = [base / name for name in ("queue", "data", "rspamd", "rspamd-run", "rspamd-state", "returns", "postsrsd")]
        for directory in (self.homes, self.postfix_config, self.dovecot_config.parent, self.aliases, *own):
            directory.mkdir()
        (base / "queue/private").mkdir(mode=0o700)  # before Dovecot wants to listen there
        for directory, owner in (
            (base / "data", "postfix"),
            (base / "queue/private", "postfix"),
            (base / "rspamd-run", "_rspamd"),
            (base / "rspamd-state", "_rspamd"),
        ):
            shutil.chown(directory, owner, owner)
        (base / "data").chmod(0o700)
        self.returns.chmod(0o700)
        os.chown(self.returns, RETURNS_UID, RETURNS_UID)
        begin_table(self.dkim)
        (base / "suffixes").write_text("test\norg\n")  # the world's would take rspamd seconds at each start
        self.rspamd_log.touch()
        shutil.chown(self.rspamd_log, "_rspamd")

        names = [name for name in HostSettings.model_fields if name.endswith("_port")]
        self.relay_port, *numbers = free_ports(1 + len(names))
        self.settings = settings = HostSettings.model_validate({**dict(zip(names, numbers, strict=True)), **switches})
        self.file = HostFile(
            host=HOST,
            hostname=DomainName(f"{HOST}.{PRIMARY_DOMAIN}"),
            listen=(IPv4Address("127.0.0.1"),),
            relay_host=IPv4Address("127.0.0.1"),  # mail to elsewhere goes to `relay_port`, or stays in the queue
            relay_port=self.relay_port,
            dns=False,
            resolver=IPv4Address("127.0.0.1") if self.resolver_port else None,
            resolver_port=self.resolver_port or 53,
            trusted_networks=tuple(map(IPv4Network, self.networks)),
            tls_certificate=base / "cert.pem",
            tls_key=base / "key.pem",
            database_socket=mariadb.socket,
            postfix_password=SecretStr(mariadb.passwords["postfix"]),
            dovecot_password=SecretStr(mariadb.passwords["dovecot"]),
            auth_policy_url=self.auth_policy.get("url"),
            auth_policy_key=SecretStr(self.auth_policy["key"]) if self.auth_policy else None,
            srs_secret=SecretStr("not-that-secret"),
            homes=self.homes,
            aliases_dir=self.aliases,
            returns_maildir=self.returns,
            returns_uid=RETURNS_UID,
            mail_log=self.mail_log,
            dovecot_log=self.dovecot_log,
            rspamd_log=self.rspamd_log,
            state_dir=base / "mailhost",
            postfix_config_dir=self.postfix_config,
            postfix_queue_dir=base / "queue",
            postfix_data_dir=base / "data",
            dovecot_config_dir=self.dovecot_config.parent,
            dovecot_base_dir=base / "run",
            dovecot_state_dir=base / "state",
            rspamd_config_dir=base / "rspamd",
            rspamd_run_dir=base / "rspamd-run",
            rspamd_state_dir=base / "rspamd-state",
            dkim_dir=self.dkim,
            public_suffixes=base / "suffixes",
            postsrsd_defaults=base / "postsrsd/defaults",
            postsrsd_secret_file=base / "postsrsd/secret",
        )
        self.recipients_map = recipients_map(self.file)
        self.local_aliases_map = local_aliases_map(self.file)
        self.virtual_aliases_map = virtual_aliases_map(self.file)
        self._policy_environment = {
            "DATABASE_URL": mariadb.url("policy"),
            "POLICY_PORT": str(settings.policy_port),
            "FROM_PORT": str(settings.from_port),
            "RECIPIENTS_PER_HOUR": "1000000",  # one stack serves all tests of an hour; the limit has tests of its own
            "LOG_LEVEL": "warning",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self.start_policy()  # the slowest
        make_certificates(base, names=[self.file.hostname, "localhost"])
        for path, file in render_all(settings, self.file, PRIMARY_DOMAIN).items():
            write({path.name: file}, path.parent)
        (self.file.dovecot_config_dir / "local.conf").write_text(_TEST_ONLY)
        self.start_rspamd()
        check = subprocess.Popen(  # makes the queue's directories; 0.12 s, so beside the rest
            ["postfix", "-c", self.postfix_config, "check"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._dovecot = self._processes.start(["/usr/sbin/dovecot", "-F", "-c", self.dovecot_config])
        if settings.srs:
            self.start_postsrsd()
        self.build_aliases("")
        if check.wait() != 0:
            raise RuntimeError(f"postfix check refuses {self.postfix_config}:\n{self.mail_log.read_text()}")
        self._postfix = self._processes.start(
            ["/usr/lib/postfix/sbin/master", "-c", self.postfix_config, "-d"], MAIL_CONFIG=str(self.postfix_config)
        )
        for port in (
            settings.imap_port,
            settings.imaps_port,
            settings.pop3s_port,
            settings.lmtp_port,
            settings.quota_port,
        ):
            self._processes.wait_for(self._dovecot, port, self.dovecot_log)
        for port in (settings.smtp_port, settings.submission_port, settings.submissions_port):
            self._processes.wait_for(self._postfix, port, self.mail_log)
        self.wait_for_rspamd()
        self.wait_for_policy()
        self.tls = ssl.create_default_context(cafile=str(self.ca_file))

    def start_policy(self, from_port: int | None = None) -> None:
        """On another port for rspamd, if a test listens on the right one itself."""
        command = [sys.executable, "-m", "app.cli.main", "policy"]
        given = {"FROM_PORT": str(from_port)} if from_port else {}
        self.policy = self._processes.start(command, **self._policy_environment | given)

    def wait_for_policy(self, from_port: int | None = None) -> None:
        for port in (self.settings.policy_port, from_port or self.settings.from_port):
            self._processes.wait_for(self.policy, port, self.mail_log)

    def start_rspamd(self) -> None:
        self.rspamd = self._processes.start(
            [
                "/usr/bin/rspamd",
                "-f",
                "-u",
                "_rspamd",
                "-g",
                "_rspamd",
                "-c",
                self.file.rspamd_config_dir / "rspamd.conf",
            ]
        )

    def wait_for_rspamd(self) -> None:
        self._processes.wait_for(self.rspamd, milter_socket(self.file), self.rspamd_log)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ends one of the daemons, such as `policy` or `rspamd`."""
        self._processes.stop(process)

    def start_postsrsd(self) -> None:
        """As Debian's unit does, which reads the file with a shell; but with its own port and directory."""
        launcher = Path("/usr/share/postsrsd/postsrsd-systemd-launcher").read_text()
        script = launcher.replace("/etc/default/postsrsd", str(self.file.postsrsd_defaults))
        self.postsrsd = self._processes.start(["/bin/sh", "-c", script])
        for port in (self.settings.srs_forward_port, self.settings.srs_reverse_port):
            self._processes.wait_for(self.postsrsd, port, self.mail_log)

    def build_aliases(self, text: str, *, complaints: bool = False) -> None:
        """The alias file as the worker makes it, but with any text. Raises `RuntimeError` for what postalias(1) dislikes."""
        (self.aliases / "aliases").write_text(text)
        argv: list[str | Path] = ["postalias", "-c", self.postfix_config, f"lmdb:{self.aliases}/aliases"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode or (done.stderr and not complaints):
            raise RuntimeError(done.stderr)

    def close(self) -> None:
        """Ends all of them and deletes everything."""
        self._processes.close()

    def reload(self) -> None:
        """Postfix and Dovecot read their configuration anew. Postfix wants it after each restart of MariaDB too."""
        run(["postfix", "-c", self.postfix_config, "reload"])
        self.doveadm("reload")

    def empty(self) -> None:
        """No home, no alias file, no queued mail, nothing in Dovecot's cache: for the next test. Rows are
        `MariaDB.empty`'s."""
        if self._starts != self._mariadb.starts:  # another test, which needs no mail, restarted it
            self._starts = self._mariadb.starts
            self.reload()
        self.doveadm("auth", "cache", "flush")
        run(["postsuper", "-c", self.postfix_config, "-d", "ALL"])
        for directory in (*self.homes.iterdir(), *self.returns.iterdir()):
            shutil.rmtree(directory)
        self.build_aliases("")

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

    def submission(
        self, login: str | None = None, password: str = "", *, tls_first: bool = False, source: str = "127.0.0.5"
    ) -> smtplib.SMTP:
        """A connection where users send, with TLS, and signed in if a login is given. Raises
        `smtplib.SMTPAuthenticationError` when refused."""
        client: smtplib.SMTP
        if tls_first:
            client = smtplib.SMTP_SSL(
                "127.0.0.1", self.settings.submissions_port, context=self.tls, timeout=10, source_address=(source, 0)
            )
        else:
            client = smtplib.SMTP("127.0.0.1", self.settings.submission_port, timeout=10, source_address=(source, 0))
        try:
            if not tls_first:
                client.starttls(context=self.tls)
            client.ehlo()
            if login is not None:
                client.login(login, password)
        except BaseException:
            client.close()
            raise
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

    def wait_for_returns(self, count: int) -> None:
        """Until so many bounces to returns@ have arrived. Raises `TimeoutError`."""
        if not wait_until(lambda: len(list(self.returns.glob("new/*"))) == count):
            raise TimeoutError(f"{count} bounces did not arrive:\n{self.mail_log.read_text()[-3000:]}")

    def imap(self, address: str, password: str, *, source: str = "127.0.0.1") -> imaplib.IMAP4_SSL:
        """Signed in by IMAPS. Raises `imaplib.IMAP4.error` when refused."""
        client = _ImapFrom(source, self.settings.imaps_port, self.tls)
        try:
            client.login(address, password)
        except BaseException:
            client.shutdown()
            raise
        return client

    def pop3(self, address: str, password: str, *, source: str = "127.0.0.1") -> poplib.POP3_SSL:
        """Signed in by POP3S. Raises `poplib.error_proto` when refused."""
        client = _Pop3From(source, self.settings.pop3s_port, self.tls)
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


class _Pop3From(poplib.POP3_SSL):
    """poplib knows none either."""

    def __init__(self, source: str, port: int, context: ssl.SSLContext) -> None:
        self._source = source
        super().__init__("127.0.0.1", port, context=context, timeout=10)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        plain = socket.create_connection((self.host, self.port), timeout, (self._source, 0))
        return self.context.wrap_socket(plain, server_hostname=self.host)


def write(files: Mapping[str, ConfigFile], directory: Path) -> None:
    """As the worker would, but for one thing: they are a minute old. Postfix waits for seconds when one is younger."""
    minute_ago = time.time() - 60
    for name, file in files.items():
        path = directory / name
        path.write_text(file.text)
        path.chmod(file.mode)
        shutil.chown(path, "root", file.group)
        os.utime(path, (minute_ago, minute_ago))


def write_host_file(stack: MailStack, **changed: Any) -> Path:
    """`HOST_FILE` of this host, for a worker. What is changed to None is left out."""
    path = stack.directory / "host.toml"
    values = {name: changed.get(name, value) for name, value in stack.file if changed.get(name, value) is not None}
    path.touch(mode=0o600)
    path.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in values.items()))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value if isinstance(value, bool | int) else str(value))
