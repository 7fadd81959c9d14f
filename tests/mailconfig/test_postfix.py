"""What Postfix's own programs say to the rendering. How it behaves is tested in tests/stack."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from app.addresses import DomainName
from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.postfix import local_aliases_map, recipients_map, render_postfix, virtual_aliases_map
from tests.mailconfig.test_hosts import MINIMAL
from tests.stack.mail import write

DOMAIN = DomainName("cacert.test")


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short path that every user may enter."""
    with TemporaryDirectory(prefix="cm-", dir="/dev/shm") as name:
        path = Path(name)
        path.chmod(0o755)
        for part in ("etc", "queue", "data"):
            (path / part).mkdir()
        shutil.chown(path / "data", "postfix")
        yield path


def render(directory: Path, settings: HostSettings | None = None, **file: Any) -> dict[str, str]:
    """Writes the configuration and returns what `postconf -n` understood. Any warning fails."""
    paths = {"config": directory / "etc", "queue": directory / "queue", "data": directory / "data"}
    values = {**MINIMAL, **{f"postfix_{part}_dir": path for part, path in paths.items()}, **file}
    write(render_postfix(settings or HostSettings(), HostFile(**values), DOMAIN), directory / "etc")
    done = subprocess.run(["postconf", "-c", directory / "etc", "-n"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert subprocess.run(["postconf", "-c", directory / "etc", "-M"], capture_output=True, check=True).stderr == b""
    return dict(line.split(" =", 1) for line in done.stdout.splitlines())


VARIANTS: list[dict[str, Any]] = [
    {},
    {"listen": ("127.0.0.1",), "dns": False, "relay_host": "192.0.2.1", "relay_port": 2525},
    {"listen": ("127.0.0.1", "::1"), "trusted_networks": ("192.0.2.0/24", "2001:db8::/32")},
    {"database_host": "db.cacert.test", "relay_host": "relay.cacert.test"},
    {"returns_uid": 500, "returns_maildir": "/srv/returns"},
    {"hand_made_aliases": "/etc/aliases"},
]


@pytest.mark.parametrize("srs", [False, True])
@pytest.mark.parametrize("file", VARIANTS)
def test_postfix_accepts_it_without_a_warning(directory: Path, file: dict[str, Any], srs: bool) -> None:
    render(directory, HostSettings(srs=srs), mail_log=directory / "log", **file)
    done = subprocess.run(["postfix", "-c", directory / "etc", "check"], capture_output=True, text=True, check=False)
    log = (directory / "log").read_text() if (directory / "log").exists() else ""
    assert (done.returncode, done.stdout + done.stderr + log) == (0, "")


def test_every_setting_exists(directory: Path) -> None:
    """A misspelt one is no error to Postfix: it only never appears among those that it knows."""
    settings = HostSettings(srs=True)
    render(
        directory,
        settings,
        mail_log=directory / "log",
        dns=False,
        listen=("127.0.0.1",),
        relay_host="192.0.2.1",
        returns_uid=500,
    )
    written = re.findall(r"^(\w+) =", (directory / "etc/main.cf").read_text(), re.MULTILINE)
    known = subprocess.run(["postconf", "-d"], capture_output=True, text=True, check=True).stdout
    ours = set(written) - {line.split(" ")[0] for line in known.splitlines()}
    assert ours == {
        "recipients",
        "recipient_checks",
        "returns",
        "srs_forward",
        "srs_reverse",
        "service_relay_restrictions",
    } | {
        f"submission_{part}_restrictions"
        for part in ("client", "login", "sender", "relay", "recipient", "data", "end_of_data")
    }
    assert len(written) == len(set(written))
    both = (directory / "etc/main.cf").read_text() + (directory / "etc/master.cf").read_text()
    assert {name for name in ours if not re.search(rf"\${name}\b", both)} == set(), "each is used"
    options = re.findall(r"^ +-o (\w+)=", both, re.MULTILINE)
    assert set(options) <= {line.split(" ")[0] for line in known.splitlines()}


def test_nobody_is_trusted_by_default(directory: Path) -> None:
    assert render(directory)["mynetworks"].strip() == ""
    networks = ("192.0.2.0/24", "2001:db8::/32")
    assert render(directory, trusted_networks=networks)["mynetworks"] == " 192.0.2.0/24, [2001:db8::]/32"


def test_nothing_is_executed_and_no_file_written_for_an_alias_or_a_home(directory: Path) -> None:
    found = render(directory)
    for name in ("allow_mail_to_commands", "allow_mail_to_files", "forward_path"):
        assert found[name] == ""


def test_no_service_is_chrooted(directory: Path) -> None:
    render(directory)
    done = subprocess.run(["postconf", "-c", directory / "etc", "-F"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"/chroot = (.)", done.stdout)) == {"n"}


def test_origin_is_a_local_destination(directory: Path) -> None:
    """Else an alias's bare target would leave the host."""
    render(directory)
    argv: list[str | Path] = ["postconf", "-c", directory / "etc", "-x", "-h", "myorigin", "mydestination"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    origin, destinations = done.stdout.splitlines()
    assert origin == DOMAIN
    assert DOMAIN in destinations.split(", ")


def test_settings_arrive(directory: Path) -> None:
    settings = HostSettings(
        smtp_port=2525,
        submission_port=5870,
        submissions_port=4650,
        lmtp_port=2424,
        quota_port=1234,
        policy_port=1235,
        message_size_limit=100_000,
    )
    found = render(directory, settings)
    assert found["mailbox_transport"] == " lmtp:inet:127.0.0.1:2424"
    assert found["message_size_limit"] == " 100000"
    assert "inet:127.0.0.1:1234" in found["recipient_checks"]
    assert found["smtpd_recipient_restrictions"] == " $recipient_checks"
    assert "inet:127.0.0.1:1235" in found["submission_recipient_restrictions"]
    services = subprocess.run(["postconf", "-c", directory / "etc", "-M"], capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in services.stdout.splitlines() if " inet " in line} == {"2525", "5870", "4650"}


def test_only_postfix_reads_the_password() -> None:
    files = render_postfix(HostSettings(), HostFile(**{**MINIMAL, "postfix_password": "s3cr3t"}), DOMAIN)
    secret = {name for name, file in files.items() if "s3cr3t" in file.text}
    assert secret == set(files) - {"main.cf", "master.cf"}
    assert len(secret) == 7
    for name, file in files.items():
        assert (file.group, file.mode) == (("postfix", 0o640) if name in secret else ("root", 0o644))
    assert not [name for name, file in files.items() if "two" in file.text.split()]


def test_database_by_socket_or_by_tcp() -> None:
    by_socket = render_postfix(HostSettings(), HostFile(**MINIMAL), DOMAIN)["recipients.cf"].text
    assert "hosts = unix:/run/mysqld/mysqld.sock\n" in by_socket
    by_tcp = HostFile(**MINIMAL, database_host="192.0.2.3", database_port=3307)
    assert "hosts = inet:192.0.2.3:3307\n" in render_postfix(HostSettings(), by_tcp, DOMAIN)["recipients.cf"].text


def test_recipients_map_is_the_one_that_is_configured(directory: Path) -> None:
    found = render(directory)
    file = HostFile(**MINIMAL, postfix_config_dir=directory / "etc")
    assert found["virtual_mailbox_maps"] == " $recipients"
    assert f"recipients = {recipients_map(file)}\n" in (directory / "etc/main.cf").read_text()


def test_no_setting_is_given_to_strangers_that_is_the_users(directory: Path) -> None:
    """What lets a signed-in user send is said on their two ports only."""
    found = render(directory)
    assert "smtpd_sasl_auth_enable" not in found
    assert "permit_sasl_authenticated" not in found["smtpd_relay_restrictions"]
    argv: list[str | Path] = ["postconf", "-c", directory / "etc", "-P"]
    options = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    on = {line.split("/")[0] for line in options if "/smtpd_sasl_auth_enable = yes" in line}
    assert on == {"587", "465"}
    assert {line.split("/")[0] for line in options if line.endswith("/smtpd_tls_security_level = encrypt")} == on
    assert [line for line in options if "wrappermode" in line] == ["465/inet/smtpd_tls_wrappermode = yes"]


def test_every_query_is_safe_outside_ascii() -> None:
    for name, file in render_postfix(HostSettings(), HostFile(**MINIMAL), DOMAIN).items():
        if name not in ("main.cf", "master.cf"):
            [query] = [line for line in file.text.splitlines() if line.startswith("query = ")]
            assert len(re.findall(r"CONVERT\('(%s|%u@%d)' USING ascii\)", query)) == 1, query
            assert query.count("%") == query.count("%s") + query.count("%u") + query.count("%d"), query


def test_maps_are_those_that_are_configured(directory: Path) -> None:
    found = render(directory)
    file = HostFile(**MINIMAL, postfix_config_dir=directory / "etc")
    assert found["virtual_alias_maps"] == f" {virtual_aliases_map(file)}"
    assert found["alias_maps"].split() == ["lmdb:/etc/cacert-mail/aliases/aliases", local_aliases_map(file)]
    assert found["alias_database"] == ""
    text = (directory / "etc/main.cf").read_text()
    maps = set(re.findall(r"proxy:mysql:[^ ,\n]+", text))
    assert set(found["proxy_read_maps"].strip().split(", ")) == maps
    assert {Path(name.rpartition(":")[2]).name for name in maps} == {
        path.name for path in (directory / "etc").glob("*.cf")
    } - {"main.cf", "master.cf"}
    render(directory, hand_made_aliases="/etc/aliases")
    assert "    lmdb:/etc/aliases\n" in (directory / "etc/main.cf").read_text()


def test_without_a_reader_there_is_no_returns(directory: Path) -> None:
    assert "returns" not in render(directory)["local_recipient_maps"]
    assert "virtual" not in subprocess.check_output(
        ["postconf", "-c", directory / "etc", "-M", "returns/unix"], text=True, stderr=subprocess.DEVNULL
    )
    assert render(directory, returns_uid=500)["local_recipient_maps"].endswith(" $returns")
