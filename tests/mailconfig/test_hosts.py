import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.mailconfig.hosts import HostFile, HostFileError, HostSettings, load_host_file

MINIMAL: dict[str, Any] = {
    "host": "mail",
    "hostname": "mail.cacert.test",
    "tls_certificate": "/etc/ssl/mail.pem",
    "tls_key": "/etc/ssl/mail.key",
    "postfix_password": "one",
    "dovecot_password": "two",
}
PATHS = [name for name, field in HostFile.model_fields.items() if "Path" in str(field.annotation)]
# What speaks in one of the files: main.cf, master.cf, map files, dovecot.conf, dovecot-sql.conf.ext, or SQL.
HOSTILE = ["\n", "\r", "\x00", "\x7f", '"', "'", "`", "\\", "$", "%", "#", " ", "\t", "{", "<", ";", ",", "ü", "\u2028"]


def test_minimal_file_means_debian() -> None:
    file = HostFile(**MINIMAL)
    assert file.trusted_networks == ()
    assert str(file.homes) == "/home"
    assert len(PATHS) == 24


@pytest.mark.parametrize("special", HOSTILE)
@pytest.mark.parametrize("name", ["host", "hostname", "relay_host", "database_host", *PATHS])
def test_no_special_character_in_a_name_or_path(name: str, special: str) -> None:
    good = "/srv/mail" if name in PATHS else "mail.cacert.test"
    HostFile(**{**MINIMAL, name: good})
    for text in (good + special, special + good, good[:5] + special + good[5:]):
        with pytest.raises(ValidationError, match=rf"^\d+ validation errors? for HostFile\n{name}"):
            HostFile(**{**MINIMAL, name: text})


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("path", ["", "relative", "/", "/etc/../root", "/etc/.hidden", "-c", "/etc/-c/.."])
def test_path_is_absolute_and_plain(name: str, path: str) -> None:
    with pytest.raises(ValidationError, match=name):
        HostFile(**{**MINIMAL, name: path})


@pytest.mark.parametrize("special", ["\n", "\r", "\x00", '"', "'", "`", "\\", "$", "%", "#", " ", "\t", "ü"])
@pytest.mark.parametrize("name", ["postfix_password", "dovecot_password", "srs_secret"])
def test_password_that_a_file_would_read_otherwise(name: str, special: str) -> None:
    for password in (special, "good" + special, special + "good"):
        with pytest.raises(ValidationError, match=name) as refused:
            HostFile(**{**MINIMAL, name: password})
        assert "good" not in str(refused.value)


def test_password_is_never_shown() -> None:
    file = HostFile(**{**MINIMAL, "postfix_password": "visible?"})
    assert "visible" not in repr(file) + str(file) + str(file.model_dump()) + file.model_dump_json()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trusted_networks", ["127.0.0.1/8"]),  # host bits: somebody meant something else
        ("trusted_networks", ["0.0.0.0/0\nx"]),
        ("trusted_networks", ["all"]),
        ("listen", ["*"]),
        ("listen", ["mail.cacert.test"]),
        ("relay_host", "localhost"),
        ("relay_port", 0),
        ("database_port", 65536),
        ("uid_first", 0),
        ("uid_first", 999),
        ("uid_last", 2**31),
        ("returns_uid", 0),
        ("returns_uid", 99),
        ("srs_secret", "two words"),
        ("host", "Mail"),
        ("host", "-"),
        ("host", "a" * 65),
        ("unknown", 1),
    ],
)
def test_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        HostFile(**{**MINIMAL, name: value})


def test_uid_range_ascends() -> None:
    with pytest.raises(ValidationError, match="uid_last is below uid_first"):
        HostFile(**MINIMAL, uid_first=5000, uid_last=4999)


def test_networks_and_addresses_are_parsed() -> None:
    file = HostFile(
        **MINIMAL, trusted_networks=("192.0.2.0/24", "2001:db8::/32"), listen=("::1",), relay_host="192.0.2.1"
    )
    assert file.trusted_networks[1] == ipaddress.ip_network("2001:db8::/32")
    assert file.relay_host == ipaddress.ip_address("192.0.2.1")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"smtp_port": 0}, "smtp_port"),
        ({"smtp_port": 65536}, "smtp_port"),
        ({"smtp_port": "25"}, "smtp_port"),
        ({"smtp_port": "25 -o mynetworks=0.0.0.0/0"}, "smtp_port"),
        ({"smtp_port": True}, "smtp_port"),
        ({"smtp_port": None}, "smtp_port"),
        ({"imap_port": 993}, "two of the ports are the same"),
        ({"pop3_enabled": "yes"}, "pop3_enabled"),
        ({"srs": 1}, "srs"),
        ({"submission_port": 25}, "two of the ports are the same"),
        ({"srs_secret": "x"}, "srs_secret"),
        ({"message_size_limit": 65_535}, "message_size_limit"),
        ({"message_size_limit": 2**30 + 1}, "message_size_limit"),
        ({"mynetworks": "0.0.0.0/0"}, "mynetworks"),
        ({"trusted_networks": ["0.0.0.0/0"]}, "trusted_networks"),
        ({"extra": "x"}, "extra"),
    ],
)
def test_row_of_a_host_is_numbers_and_switches_only(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        HostSettings.model_validate(settings)


def test_empty_row_is_enough() -> None:
    assert HostSettings.model_validate({}).smtp_port == 25


def test_no_text_in_a_row() -> None:
    """A string would need the checks that a file's strings have."""
    assert {field.annotation for field in HostSettings.model_fields.values()} <= {int, bool}


# The host's own file

TEXT = "".join(f'{name} = "{value}"\n' for name, value in MINIMAL.items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "host.toml"
    path.write_text(TEXT)
    path.chmod(0o600)
    return path


def test_file_is_read(path: Path) -> None:
    path.write_text(TEXT + 'trusted_networks = ["192.0.2.0/24"]\nreturns_uid = 500\ndns = false\n')
    file = load_host_file(path)
    assert file.host == "mail"
    assert file.postfix_password.get_secret_value() == "one"
    assert (str(file.trusted_networks[0]), file.returns_uid, file.dns) == ("192.0.2.0/24", 500, False)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o610])
def test_file_that_others_can_read_or_write(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(HostFileError, match=f"^{path} holds secrets"):
        load_host_file(path)


def test_file_of_somebody_else(path: Path) -> None:
    os.chown(path, 65534, 0)
    with pytest.raises(HostFileError, match="holds secrets"):
        load_host_file(path)


def test_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(HostFileError, match=r"none\.toml: No such file or directory$"):
        load_host_file(tmp_path / "none.toml")
    with pytest.raises(HostFileError, match=r": Is a directory$"):
        load_host_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (TEXT + "surprise = 1\n", "surprise: Extra inputs are not permitted"),
        (TEXT + '"s3cr3t s3cr3t" = 1\n', "a key that is none: Extra inputs are not permitted"),
        (TEXT.replace("host = ", "hots = "), "host: Field required; hots: Extra inputs are not permitted"),
        (TEXT.replace('"one"', '"s3cr3t s3cr3t"'), "postfix_password: Value error, takes 1 to 128 printable"),
        (TEXT.replace('"one"', "5"), "postfix_password: "),
        (
            TEXT + 'trusted_networks = ["s3cr3t"]\n',
            "host.toml: trusted_networks.0: Input is not a valid IPv4 network; trusted_networks.0: ",
        ),
        (TEXT + "uid_first = 300000\nuid_last = 200000\n", "Value error, uid_last is below uid_first"),
        (TEXT.replace('"one"', "s3cr3t"), "is no TOML: see line 5, column 20."),
        (TEXT + 'postfix_password = "s3cr3t"\n', "is no TOML: see line 7, column 28."),
        ('host = "s3cr3t', "is no TOML: see end of document."),
        ("host = '\xfc'", "is no TOML: it is not UTF-8."),
    ],
)
def test_file_with_a_mistake(path: Path, text: str, complaint: str) -> None:
    """One line that names the place, and never shows a value."""
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(HostFileError) as refused:
        load_host_file(path)
    assert complaint in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/",
        "http://user:password@127.0.0.1/",
        "http://127.0.0.1/?command=",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/%2e",
        "http://127.0.0.1/x\nssl = no",
        "http://$variable/",
        "http:///",
        "",
    ],
)
def test_a_url_that_would_mean_more_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        HostFile(**MINIMAL, auth_policy_url=url, auth_policy_key="key")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8825/dovecot/auth-policy", "https://[::1]/x", "http://api.test/"])
def test_a_plain_url_is_taken(url: str) -> None:
    assert HostFile(**MINIMAL, auth_policy_url=url, auth_policy_key="key").auth_policy_url == url


@pytest.mark.parametrize("half", [{"auth_policy_url": "http://127.0.0.1/"}, {"auth_policy_key": "key"}])
def test_a_policy_server_wants_its_key(half: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="go together"):
        HostFile(**MINIMAL, **half)
