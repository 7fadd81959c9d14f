"""rspamd signs what is ours with every active key, and nothing else; and verifies what comes in. With real DNS, by knot."""

import grp
import itertools
import re
import smtplib
import threading
import time
from base64 import b64encode
from collections.abc import Iterator

import dkim
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from app.addresses import DomainName, Selector
from app.dns.records import dkim_value
from app.models.dkim_keys import Algorithm
from app.workers.host.dkim_files import key_path, make_key, write_table
from tests.stack.accounts import OTHER, PASSWORD, Account, account, stack
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, free_ports, run, wait_until
from tests.stack.sink import Sink

__all__ = ["account", "stack"]

ALICE, CAROL = f"alice@{PRIMARY_DOMAIN}", f"carol@{OTHER}"
REGISTERED, STRANGER = "127.0.0.77", "127.0.0.5"
HOSTNAME = f"mail.{PRIMARY_DOMAIN}"
RSA, ED = Algorithm.RSA_2048, Algorithm.ED25519


class Zone:
    """knot(8) with the zone `test.`, on one port of 127.0.0.1."""

    def __init__(self, processes: Processes) -> None:
        self.directory = processes.directory / "knot"
        self.directory.mkdir()
        self._processes = processes
        (self.port,) = free_ports(1)

    def start(self, *lines: str) -> None:
        head = ["$ORIGIN test.", "$TTL 1", "@ SOA ns a 1 60 60 600 1", "@ NS ns", "ns A 127.0.0.1"]
        (self.directory / "test.zone").write_text("\n".join([*head, *lines, ""]))
        (self.directory / "knot.conf").write_text(
            f"server:\n    listen: 127.0.0.1@{self.port}\n    rundir: {self.directory}\n"
            f"database:\n    storage: {self.directory}\n"
            f"template:\n  - id: default\n    storage: {self.directory}\n    zonefile-load: whole\n"
            "zone:\n  - domain: test\n    file: test.zone\n"
        )
        self.process = self._processes.start(["/usr/sbin/knotd", "-c", self.directory / "knot.conf"])
        self._processes.wait_for(self.process, self.port, self.directory / "none")

    def stop(self) -> None:
        self._processes.stop(self.process)


def txt(name: str, value: str) -> str:
    return f"{name} TXT " + " ".join(f'"{value[i : i + 255]}"' for i in range(0, len(value), 255))


class Site:
    """A mail host of its own, a server elsewhere that keeps what it gets, and the DNS."""

    def __init__(self, mail: MailStack, processes: Processes, zone: Zone) -> None:
        self.mail = mail
        self.zone = zone
        self.sink = Sink(processes, mail.relay_port)
        self.sink.start()
        self.published: dict[str, str] = {}
        self.full: dict[str, str] = {}
        self._numbers = itertools.count()

    def key(self, selector: str, algorithm: Algorithm = RSA, domain: str = PRIMARY_DOMAIN) -> str:
        """Its selector has a number of its own: rspamd may not notice another key under a path that it knows."""
        full = self.full[selector] = f"{selector}-{next(self._numbers)}"
        public = make_key(self.mail.dkim, DomainName(domain), Selector(full), algorithm, durable=False)
        self.published[f"{full}._domainkey.{domain}"] = dkim_value(algorithm, public)
        return selector

    def sign(self, *selectors: str, domain: str = PRIMARY_DOMAIN) -> None:
        full = [self.full[selector] for selector in selectors]
        write_table(self.mail.dkim, 1, {domain: full} if full else {}, durable=False)

    def submit(self, sender: str, data: str | bytes, *, envelope: str | None = None) -> None:
        with self.mail.submission(sender, PASSWORD) as client:
            client.sendmail(envelope or sender, ["x@example.org"], data)

    def on_service_port(self, data: str) -> None:
        with smtplib.SMTP("127.0.0.1", self.mail.settings.service_port, "localhost", 10) as client:
            client.sendmail(f"returns@{PRIMARY_DOMAIN}", ["x@example.org"], data)

    def received(self, count: int = 1) -> list[bytes]:
        """What has arrived elsewhere, as it was on the wire, and no more of it is kept."""
        arrived = wait_until(lambda: len([p for p in self.sink.directory.iterdir() if p.stat().st_size]) >= count)
        assert arrived, self.mail.mail_log.read_text()[-3000:]
        found = []
        for path in sorted(self.sink.directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            lines = path.read_bytes().replace(b"\r\n", b"\n").split(b"\n")
            while lines[0].startswith((b"X-Client-", b"X-Helo-", b"X-Mail-", b"X-Rcpt-")):
                lines.pop(0)
            found.append(b"\r\n".join(lines))
            path.unlink()
        return found

    def verified(self, raw: bytes) -> dict[str, bool]:
        """By selector, whether the signature verifies against what was published."""

        def ask(name: bytes, timeout: int = 5) -> bytes | None:
            value = self.published.get(name.decode().rstrip("."))
            return value.encode() if value else None

        signatures = [value for name, value in dkim.DKIM(raw).headers if name.lower() == b"dkim-signature"]
        found = {}
        for index, signature in enumerate(signatures):
            selector = re.search(rb"[;\s]s=([^;\s]+)", signature)
            assert selector
            name = selector[1].decode().rpartition("-")[0]
            try:
                found[name] = dkim.DKIM(raw).verify(idx=index, dnsfunc=ask)
            except dkim.ValidationError:
                found[name] = False
        assert len(found) == len(signatures)
        return found


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def zone(processes: Processes) -> Zone:
    return Zone(processes)


@pytest.fixture(scope="module")
def mail_stack(mariadb: MariaDB, zone: Zone) -> Iterator[MailStack]:
    """One of our own, with DNS and a registered network."""
    stack = MailStack()
    stack.resolver_port = zone.port
    stack.networks = (f"{REGISTERED}/32",)
    stack.start(mariadb)
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def made(mail_stack: MailStack, processes: Processes, zone: Zone) -> Site:
    return Site(mail_stack, processes, zone)


@pytest.fixture
def site(made: Site, stack: MailStack, account: Account) -> Site:
    account(ALICE)
    account(CAROL)
    for path in (*made.sink.directory.iterdir(), *(p for p in stack.dkim.iterdir())):
        path.unlink()
    made.published.clear()
    made.sign()
    return made


def text(sender: str, subject: str = "hello", body: str = "text\r\n") -> str:
    return f"From: {sender}\r\nTo: x@example.org\r\nSubject: {subject}\r\nDate: Tue, 24 Nov 2026 03:00:00 +0000\r\n\r\n{body}"


# Who is signed for


def test_a_users_mail_is_signed_with_all_active_keys_at_once(site: Site) -> None:
    site.key("idle")
    site.sign(site.key("old"), site.key("new"), site.key("ed", ED), site.key("big", Algorithm.RSA_3072))
    site.submit(ALICE, text(ALICE))
    (raw,) = site.received()
    assert site.verified(raw) == {"old": True, "new": True, "ed": True, "big": True}
    assert not any(site.verified(raw.replace(b"hello", b"other")).values())


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\r\n\r\n\r\n",
        "no last newline",
        ".\r\n..\r\n. x\r\n",
        "blanks at the end  \t \r\n \r\n",
        "x" * 990 + "\r\n",
        "x" * 3000 + "\r\n",
        "\xfc\r\n",
        "a line\r\n" * 20_000,
    ],
)
def test_what_leaves_is_what_was_signed(site: Site, body: str) -> None:
    """Whatever the next server can do: this one has no 8BITMIME."""
    site.sign(site.key("rsa"), site.key("ed", ED))
    site.sink.start("-8")
    head = text(ALICE).replace("\r\n\r\n", "\r\nX-Folded: a\r\n b\r\n\tc\r\nSubject2: \xfc\r\n\r\n")
    try:
        site.submit(ALICE, (head.removesuffix("text\r\n") + body).encode("latin-1"))
        (raw,) = site.received()
        assert site.verified(raw) == {"rsa": True, "ed": True}
    finally:
        site.sink.start()


def test_nothing_can_be_added_to_what_was_signed(site: Site) -> None:
    site.sign(site.key("rsa"))
    site.submit(ALICE, text(ALICE))
    (raw,) = site.received()
    for line in (b"From: b@example.net", b"Subject: other", b"Reply-To: b@example.net"):
        assert site.verified(line + b"\r\n" + raw) == {"rsa": False}
    assert site.verified(raw + b"more\r\n") == {"rsa": False}


def test_each_domain_by_its_own_keys(site: Site) -> None:
    site.key("rsa")
    site.key("there", domain=OTHER)
    write_table(site.mail.dkim, 1, {PRIMARY_DOMAIN: [site.full["rsa"]], OTHER: [site.full["there"]]}, durable=False)
    site.submit(CAROL, text(CAROL.upper()))
    (raw,) = site.received()
    assert site.verified(raw) == {"there": True}
    assert f"d={OTHER};".encode() in raw
    site.sign("rsa")
    site.submit(CAROL, text(CAROL))
    assert site.verified(site.received()[0]) == {}


def test_the_service_is_signed_for(site: Site) -> None:
    site.sign(site.key("rsa"))
    site.on_service_port(text(f"accounts@{PRIMARY_DOMAIN}"))
    (raw,) = site.received()
    assert site.verified(raw) == {"rsa": True}
    assert b"Authentication-Results" not in raw


def test_a_registered_network_is_signed_for_in_our_name_alone(site: Site) -> None:
    site.sign(site.key("rsa"))
    for sender, expected in ((ALICE, {"rsa": True}), ("a@example.net", {}), (f"a@sub.{PRIMARY_DOMAIN}", {})):
        with site.mail.smtp(source=REGISTERED) as client:
            client.sendmail(sender, ["x@example.org"], text(sender))
        assert site.verified(site.received()[0]) == expected


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.76"])
@pytest.mark.parametrize("envelope", ["", "a@example.net", f"returns@{PRIMARY_DOMAIN}"])
def test_nobody_is_signed_for_by_their_address(site: Site, source: str, envelope: str) -> None:
    """rspamd's own default would."""
    site.sign(site.key("rsa"))
    home = site.mail.homes / "alice"
    client = smtplib.SMTP("127.0.0.1", site.mail.settings.smtp_port, "service", 10, source_address=(source, 0))
    forged = text(ALICE).replace("To:", "MTA-Name: service\r\nX-Daemon-Name: service\r\nUser: alice\r\nTo:")
    with client:
        client.sendmail(envelope, [ALICE], forged)
    assert b"DKIM-Signature" not in site.mail.wait_for_mail(home)[0].read_bytes()


def test_neither_sendmail_nor_a_bounce_is_signed(site: Site) -> None:
    site.sign(site.key("rsa"))
    argv = ["sendmail", "-C", site.mail.postfix_config, "-f", ALICE, "x@example.org"]
    run(argv, stdin=text(ALICE))
    assert site.verified(site.received()[0]) == {}


# When it cannot be


def test_no_message_leaves_unsigned_when_a_key_cannot_be_used(site: Site) -> None:
    site.sign(site.key("rsa"), site.key("ed", ED))
    site.submit(ALICE, text(ALICE))
    assert len(site.verified(site.received()[0])) == 2
    key_path(site.mail.dkim, PRIMARY_DOMAIN, Selector(site.full["ed"])).unlink()
    with pytest.raises(smtplib.SMTPDataError) as refused:
        site.submit(ALICE, text(ALICE))
    assert (refused.value.smtp_code, refused.value.smtp_error[:5]) == (451, b"4.7.1")
    site.submit(CAROL, text(CAROL))  # has no key
    assert site.verified(site.received()[0]) == {}


def restart_rspamd(site: Site) -> None:
    site.mail.stop(site.mail.rspamd)
    site.mail.start_rspamd()
    site.mail.wait_for_rspamd()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}", b'{"domains": {"cacert.test": []}}', None])
def test_broken_list_changes_nothing_until_a_restart(site: Site, content: bytes | None) -> None:
    site.sign(site.key("rsa"))
    restart_rspamd(site)  # each of its processes has read it then
    table = site.mail.dkim / "keys.json"
    if content is None:
        table.unlink()
    else:
        table.write_bytes(content)
    site.submit(ALICE, text(ALICE))
    assert site.verified(site.received()[0]) == {"rsa": True}
    restart_rspamd(site)
    with pytest.raises(smtplib.SMTPDataError) as refused:
        site.submit(ALICE, text(ALICE))
    assert refused.value.smtp_code == 451
    assert site.mail.send(ALICE) == 250  # what is not ours to sign goes on
    site.sign("rsa")
    site.submit(ALICE, text(ALICE))
    assert site.verified(site.received()[0]) == {"rsa": True}


# Rotation


def test_no_message_of_a_rotation_fails_to_verify(site: Site) -> None:
    """Ten of them under load: each message has at least one signature, and every one verifies."""
    site.sign(site.key("r0"))
    over = threading.Event()
    sent: list[int] = []
    failed: list[Exception] = []

    def load() -> None:
        with site.mail.submission(ALICE, PASSWORD) as client:
            while not over.is_set():
                try:
                    client.sendmail(ALICE, ["x@example.org"], text(ALICE))
                    sent.append(1)
                except smtplib.SMTPException as error:
                    failed.append(error)
                    return

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 11):
            site.key(f"r{number}", ED if number % 2 else RSA)
            site.sign(f"r{number - 1}", f"r{number}")
            time.sleep(0.1)
            site.sign(f"r{number}")
            time.sleep(0.05)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failed
    raws = site.received(len(sent))
    assert len(raws) == len(sent) > 50
    verdicts = [site.verified(raw) for raw in raws]
    assert all(verdict and all(verdict.values()) for verdict in verdicts)
    assert len({selector for verdict in verdicts for selector in verdict}) == 11


# What comes in


KEY = generate_private_key(65537, 2048)
PRIVATE = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PUBLIC = b64encode(KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


@pytest.fixture
def dns(site: Site) -> Iterator[Zone]:
    site.zone.start(
        'example TXT "v=spf1 ip4:127.0.0.5 -all"',
        '_dmarc.example TXT "v=DMARC1; p=reject"',
        txt("sel._domainkey.example", dkim_value(RSA, PUBLIC)),
        'fail TXT "v=spf1 -all"',
        '_dmarc.fail TXT "v=DMARC1; p=quarantine"',
        "nothing A 127.0.0.1",
    )
    yield site.zone
    site.zone.stop()


def incoming(site: Site, data: bytes, sender: str, *, source: str = STRANGER) -> tuple[list[str], bytes]:
    """The fields Authentication-Results as they were delivered, unfolded; and the whole."""
    home = site.mail.homes / "alice"
    before = set(home.glob("Maildir/new/*"))
    with site.mail.smtp(source=source) as client:
        client.sendmail(sender, [ALICE], data)
    (path,) = set(site.mail.wait_for_mail(home, len(before) + 1)) - before
    raw = path.read_bytes()
    header = re.sub(rb"\n[ \t]+", b" ", raw.replace(b"\r\n", b"\n").partition(b"\n\n")[0]).decode("latin-1")
    return [line for line in header.split("\n") if re.match(r"(?i)authentication-results\s*:", line)], raw


def letter(sender: str, more: str = "") -> bytes:
    return f"From: {sender}\r\nTo: {ALICE}\r\nSubject: s\r\nMessage-ID: <a@b.c>\r\n{more}\r\nhi\r\n".encode()


def signed(data: bytes) -> bytes:
    made: bytes = dkim.sign(data, b"sel", b"example.test", PRIVATE, include_headers=[b"from", b"to", b"subject"])
    return made + data


def results(field: str) -> dict[str, str]:
    name, _, value = field.partition(":")
    host, *each = value.split(";")
    assert (name, host.strip()) == ("Authentication-Results", HOSTNAME)
    return {method: word for one in each for method, _, word in [one.strip().split()[0].partition("=")]}


def test_what_comes_in_is_verified(site: Site, dns: Zone) -> None:
    good = signed(letter("a@example.test"))
    (field,), _ = incoming(site, good, "a@example.test")
    assert results(field) == {"dkim": "pass", "spf": "pass", "dmarc": "pass", "arc": "none"}
    assert "header.d=example.test" in field
    assert "smtp.mailfrom=example.test" in field
    (field,), _ = incoming(site, good + b"more\r\n", "a@example.test", source="127.0.0.6")
    assert results(field) == {"dkim": "fail", "spf": "fail", "dmarc": "fail", "arc": "none"}
    (field,), _ = incoming(site, letter("a@fail.test"), "a@fail.test")
    assert results(field) == {"dkim": "none", "spf": "fail", "dmarc": "fail", "arc": "none"}
    (field,), _ = incoming(site, letter("a@nothing.test"), "a@nothing.test")
    assert results(field) == {"dkim": "none", "spf": "none", "dmarc": "none", "arc": "none"}


def forwarded(data: bytes) -> bytes:
    """As a list server of example.test hands it on, which saw it verify (RFC 8617)."""
    seen = b"Authentication-Results: example.test; spf=pass smtp.mailfrom=nothing.test\r\n"
    chain = dkim.arc_sign(
        seen + data, b"sel", b"example.test", PRIVATE, b"example.test", include_headers=[b"from", b"to"]
    )
    return b"".join(chain) + data


def test_whole_arc_chain(site: Site, dns: Zone) -> None:
    whole = forwarded(letter("a@nothing.test"))
    (field,), raw = incoming(site, whole, "list@example.test")
    assert results(field) == {"dkim": "none", "spf": "pass", "dmarc": "none", "arc": "pass"}
    assert b"ARC-Seal: " in raw
    (field,), _ = incoming(site, whole + b"more\r\n", "list@example.test")
    assert results(field)["arc"] == "fail"


def test_broken_arc_chain(site: Site, dns: Zone) -> None:
    tags = "i=1; a=rsa-sha256; d=example.test; s=sel; t=1; b=AAAA"
    chain = (
        f"ARC-Seal: {tags}; cv=none\r\nARC-Message-Signature: {tags}; h=from; bh=AAAA\r\n"
        "ARC-Authentication-Results: i=1; example.test; spf=pass\r\n"
    )
    (field,), _ = incoming(site, letter("a@example.test", chain), "a@example.test")
    assert results(field)["arc"] == "fail"


FORGED = [
    f"Authentication-Results: {HOSTNAME}; dkim=pass",
    f"authentication-RESULTS: {HOSTNAME.upper()}; dkim=pass",
    f"Authentication-Results:\r\n {HOSTNAME};\r\n dkim=pass",
    f"Authentication-Results:{HOSTNAME};dkim=pass",
    f"Authentication-Results : {HOSTNAME}; dkim=pass",
    f"Authentication-Results: (c (d;) e) {HOSTNAME}; dkim=pass",
    f'Authentication-Results: "{HOSTNAME}"; dkim=pass',
    f"Authentication-Results: {HOSTNAME} 1; dkim=pass",
    f"Authentication-Results: {HOSTNAME}(x); dkim=pass",
    f"Authentication-Results:\r\n \t\r\n\t{HOSTNAME} ; dkim=pass",
    f"Authentication-Results: {PRIMARY_DOMAIN}; dkim=pass",
    f"Authentication-Results: mail2.{PRIMARY_DOMAIN}; dkim=pass",
    f"Authentication-Results: {HOSTNAME}.; dkim=pass",
    f"Authentication-Results: {HOSTNAME}",
    f"Authentication-Results: \t\x0b{HOSTNAME}; dkim=pass",
    f"Authentication-Results: =?utf-8?q?{HOSTNAME}?=; dkim=pass",
]
FOREIGN = [
    "Authentication-Results: mx.example.net; dkim=pass",
    f"Authentication-Results: {PRIMARY_DOMAIN}.example.net; dkim=pass",
    f"Authentication-Results: not{PRIMARY_DOMAIN}; spf=pass",
    f"Authentication-Results: mx.example.org 1; spf=pass ({HOSTNAME})",
]


def test_forged_results_are_removed_and_foreign_ones_stay(site: Site, dns: Zone) -> None:
    fields, _ = incoming(site, letter("a@nothing.test", "\r\n".join([*FORGED, *FOREIGN, ""])), "a@nothing.test")
    assert fields[1:] == FOREIGN
    assert results(fields[0])["dkim"] == "none"


@pytest.mark.parametrize("sender", ['"a); dkim=pass header.d=bank.test (x"@nothing.test', "a@nothing.test"])
def test_a_sender_adds_no_result(site: Site, dns: Zone, sender: str) -> None:
    home = site.mail.homes / "alice"
    client = smtplib.SMTP("127.0.0.1", site.mail.settings.smtp_port, "x", 10, source_address=(STRANGER, 0))
    with client:
        assert client.docmd("EHLO", "[x);dkim=pass(]")[0] == 250
        assert client.docmd("MAIL", f"FROM:<{sender}>")[0] == 250
        client.rcpt(ALICE)
        assert client.data(letter("a@nothing.test"))[0] == 250
    raw = site.mail.wait_for_mail(home)[0].read_text()
    field = re.sub(r"\n[ \t]+", " ", raw.partition("Authentication-Results:")[2]).split("\n")[0]
    assert field.count("dkim=") == 1
    assert "dkim=none" in field
    assert "bank.test" not in field


def test_an_attached_message_is_left_alone(site: Site, dns: Zone) -> None:
    """Else the signature of the whole would break."""
    inner = f"From: b@example.net\r\nAuthentication-Results: {HOSTNAME}; dkim=pass\r\n\r\ninner\r\n"
    head = letter("a@example.test").partition(b"\r\n\r\n")[0]
    body = f"--b\r\nContent-Type: message/rfc822\r\n\r\n{inner}--b--\r\n".encode()
    data = head + b'\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n' + body
    (field,), raw = incoming(site, signed(data), "a@example.test")
    assert results(field)["dkim"] == "pass"
    assert f"Authentication-Results: {HOSTNAME}; dkim=pass".encode() in raw


def test_dns_that_is_away_refuses_nothing_and_holds_up_no_user(site: Site) -> None:
    site.sign(site.key("rsa"))
    before = time.monotonic()
    site.submit(ALICE, text(ALICE))
    site.on_service_port(text(f"accounts@{PRIMARY_DOMAIN}"))
    assert time.monotonic() - before < 1.5
    assert [site.verified(raw) for raw in site.received(2)] == [{"rsa": True}] * 2
    before = time.monotonic()
    (field,), _ = incoming(site, letter("a@away.test"), "a@away.test")
    assert results(field)["spf"] == "temperror"
    assert time.monotonic() - before < 9


def test_files_are_rspamds_alone(site: Site) -> None:
    site.sign(site.key("rsa"))
    gid = grp.getgrnam("_rspamd").gr_gid
    assert (site.mail.dkim.stat().st_mode & 0o777, site.mail.dkim.stat().st_gid) == (0o750, gid)
    for path in site.mail.dkim.iterdir():
        status = path.stat()
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 0, gid), path
