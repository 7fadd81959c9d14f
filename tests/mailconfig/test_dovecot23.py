"""What Dovecot's own programs say to the rendering. How it behaves is tested in tests/stack."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.addresses import DomainName
from app.mailconfig.dovecot23 import render_dovecot
from app.mailconfig.hosts import HostFile, HostSettings
from tests.mailconfig.test_hosts import MINIMAL
from tests.stack.mail import make_certificates, write

DOMAIN = DomainName("cacert.test")


def render(directory: Path, settings: HostSettings | None = None, **file: Any) -> str:
    """Writes the configuration and returns what `doveconf -n` understood. Any warning fails."""
    make_certificates(directory, names=["mail.cacert.test"])
    paths = {
        "tls_certificate": directory / "cert.pem",
        "tls_key": directory / "key.pem",
        "dovecot_config_dir": directory,
    }
    rendered = HostFile(**{**MINIMAL, **paths, **file})
    write(render_dovecot(settings or HostSettings(), rendered, DOMAIN), directory)
    done = subprocess.run(
        ["doveconf", "-n", "-c", directory / "dovecot.conf"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def value(directory: Path, *names: str) -> list[str]:
    argv: list[str | Path] = ["doveconf", "-h", "-c", directory / "dovecot.conf", *names]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    "file",
    [{}, {"listen": ("127.0.0.1", "::1"), "dovecot_log": "/var/log/dovecot.log"}, {"database_host": "192.0.2.3"}],
)
@pytest.mark.parametrize("pop3", [True, False])
def test_dovecot_accepts_it_without_a_warning(tmp_path: Path, file: dict[str, Any], pop3: bool) -> None:
    render(tmp_path, HostSettings(pop3_enabled=pop3), **file)


def test_pop3_can_be_switched_off(tmp_path: Path) -> None:
    render(tmp_path)
    assert value(tmp_path, "protocols") == ["imap lmtp pop3"]
    assert "service pop3-login" not in render(tmp_path, HostSettings(pop3_enabled=False))
    assert value(tmp_path, "protocols") == ["imap lmtp"]


def test_no_password_in_the_clear(tmp_path: Path) -> None:
    render(tmp_path)
    names = ("ssl", "disable_plaintext_auth", "ssl_min_protocol", "login_trusted_networks")
    assert value(tmp_path, *names) == ["required", "yes", "TLSv1.2", ""]


def test_the_administrators_own_file_has_the_last_word(tmp_path: Path) -> None:
    render(tmp_path)
    assert value(tmp_path, "auth_failure_delay", "mail_fsync") == ["2 secs", "optimized"]
    (tmp_path / "local.conf").write_text("auth_failure_delay = 0\n")
    render(tmp_path)
    assert value(tmp_path, "auth_failure_delay") == ["0"]


def test_no_login_is_remembered(tmp_path: Path) -> None:
    render(tmp_path)
    assert value(tmp_path, "auth_cache_size") == ["0"]


def test_only_the_uids_of_mailboxes(tmp_path: Path) -> None:
    render(tmp_path, uid_first=5000, uid_last=6000)
    names = ("first_valid_uid", "last_valid_uid", "first_valid_gid", "last_valid_gid")
    assert value(tmp_path, *names) == ["5000", "6000", "5000", "6000"]


def test_settings_arrive(tmp_path: Path) -> None:
    shown = render(
        tmp_path, HostSettings(imap_port=1143, imaps_port=1993, pop3s_port=1995, lmtp_port=1024, quota_port=1234)
    )
    for port in (1143, 1993, 1995, 1024, 1234):
        assert f"port = {port}\n" in shown
    assert value(tmp_path, "auth_default_realm", "recipient_delimiter") == [DOMAIN, "+"]


def test_lmtp_and_quota_listen_on_loopback_only(tmp_path: Path) -> None:
    shown = render(tmp_path)
    for port in (24, 12340):
        listener = next(block for block in shown.split("inet_listener") if f"port = {port}\n" in block)
        assert "address = 127.0.0.1\n" in listener


def test_only_root_reads_the_password() -> None:
    files = render_dovecot(HostSettings(), HostFile(**{**MINIMAL, "dovecot_password": "s3cr3t"}), DOMAIN)
    assert {name for name, file in files.items() if "s3cr3t" in file.text} == {"dovecot-sql.conf.ext"}
    assert files["dovecot-sql.conf.ext"].mode == 0o600
    assert files["dovecot.conf"].mode == 0o644


def test_database_by_socket_or_by_tcp() -> None:
    by_socket = render_dovecot(HostSettings(), HostFile(**MINIMAL), DOMAIN)["dovecot-sql.conf.ext"].text
    assert "connect = host=/run/mysqld/mysqld.sock dbname=cacertusers user=dovecot password=two\n" in by_socket
    by_tcp = render_dovecot(HostSettings(), HostFile(**MINIMAL, database_host="192.0.2.3"), DOMAIN)[
        "dovecot-sql.conf.ext"
    ]
    assert "connect = host=192.0.2.3 port=3306 dbname=" in by_tcp.text


def test_each_query_is_for_this_host_alone() -> None:
    text = render_dovecot(HostSettings(), HostFile(**{**MINIMAL, "host": "mx-2"}), DOMAIN)["dovecot-sql.conf.ext"].text
    queries = [line for line in text.splitlines() if "_query = " in line]
    assert len(queries) == 3
    assert all("host = 'mx-2'" in query for query in queries)


POLICY = {"auth_policy_url": "http://127.0.0.1:8825/dovecot/auth-policy", "auth_policy_key": "p0l1cy-key"}


def test_logins_are_asked_about_only_when_the_hosts_file_says_where(tmp_path: Path) -> None:
    render(tmp_path)
    assert value(tmp_path, "auth_policy_server_url") == [""]
    render(tmp_path, **POLICY)
    names = ("server_url", "server_api_header", "reject_on_fail", "check_before_auth", "check_after_auth", "log_only")
    assert value(tmp_path, *(f"auth_policy_{name}" for name in names)) == [
        POLICY["auth_policy_url"],
        "X-API-Key: p0l1cy-key",
        "no",
        "yes",
        "yes",
        "no",
    ]
    render(tmp_path, HostSettings(auth_policy_reject_on_fail=True), **POLICY)
    assert value(tmp_path, "auth_policy_reject_on_fail") == ["yes"]


def test_only_root_reads_the_key_and_the_nonce() -> None:
    files = render_dovecot(HostSettings(), HostFile(**{**MINIMAL, **POLICY}), DOMAIN)
    assert {name for name, file in files.items() if "p0l1cy-key" in file.text} == {"auth-policy.conf.ext"}
    assert {name for name, file in files.items() if "auth_policy_hash_nonce" in file.text} == {"auth-policy.conf.ext"}
    assert files["auth-policy.conf.ext"].mode == 0o600


def test_hosts_with_one_key_hash_alike_and_others_do_not() -> None:
    def nonce(**file: Any) -> str:
        text = render_dovecot(HostSettings(), HostFile(**{**MINIMAL, **POLICY, **file}), DOMAIN)[
            "auth-policy.conf.ext"
        ].text
        return next(line for line in text.splitlines() if line.startswith("auth_policy_hash_nonce = "))

    assert nonce() == nonce(host="mx-2") != nonce(auth_policy_key="another")
    assert "p0l1cy" not in nonce()
