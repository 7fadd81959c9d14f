"""All files together, and what must be there for them."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from app.addresses import DomainName
from app.mailconfig.everything import render_all
from app.mailconfig.hosts import HostFile, HostFileError, HostSettings
from tests.mailconfig.test_hosts import MINIMAL
from tests.stack.certificates import make_certificates

DOMAIN = DomainName("cacert.test")


@pytest.fixture
def file(tmp_path: Path) -> HostFile:
    return host_file(tmp_path)


def host_file(directory: Path, **values: Any) -> HostFile:
    make_certificates(directory, names=["mail.cacert.test"])
    certificate = {"tls_certificate": directory / "cert.pem", "tls_key": directory / "key.pem"}
    return HostFile(**{**MINIMAL, **certificate, **values})


def test_absolute_paths_of_debian(file: HostFile) -> None:
    files = render_all(HostSettings(), file, DOMAIN)
    assert {str(path.parent) for path in files} == {"/etc/postfix", "/etc/dovecot", "/etc/rspamd"}
    assert {path.name for path in files if path.parent.name != "postfix"} == {
        "dovecot.conf",
        "dovecot-sql.conf.ext",
        "rspamd.conf",
        "from.lua",
        "dkim.lua",
        "incoming.lua",
    }
    assert not [path for path, made in files.items() if not made.text.startswith(("# Made by", "-- Made by"))]


def test_the_same_values_give_the_same_files(file: HostFile) -> None:
    assert render_all(HostSettings(), file, DOMAIN) == render_all(HostSettings(), file, DOMAIN)


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key"])
def test_missing_certificate_or_key(file: HostFile, name: str) -> None:
    path: Path = getattr(file, name)
    path.unlink()
    with pytest.raises(HostFileError, match=rf"^{name}: {path}: No such file or directory$"):
        render_all(HostSettings(), file, DOMAIN)
    path.mkdir()
    with pytest.raises(HostFileError, match=rf"^{name}: {path}: Is a directory$"):
        render_all(HostSettings(), file, DOMAIN)
    path.rmdir()
    path.write_text("no PEM")
    with pytest.raises(HostFileError, match=r"^tls_certificate, tls_key: .* are not a PEM certificate and its key$"):
        render_all(HostSettings(), file, DOMAIN)


def test_certificate_and_key_that_do_not_belong_together(file: HostFile, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    make_certificates(tmp_path / "other", names=["mail.cacert.test"])
    file.tls_key.write_bytes((tmp_path / "other/key.pem").read_bytes())
    with pytest.raises(HostFileError, match="are not a PEM certificate and its key"):
        render_all(HostSettings(), file, DOMAIN)


def test_key_with_a_password_asks_nobody(file: HostFile) -> None:
    key = serialization.load_pem_private_key(file.tls_key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file.tls_key.write_bytes(key.private_bytes(encoding, form, locked))
    with pytest.raises(HostFileError, match="are not a PEM certificate and its key"):
        render_all(HostSettings(), file, DOMAIN)


def test_srs_wants_its_secret(file: HostFile, tmp_path: Path) -> None:
    with pytest.raises(HostFileError, match=r"^srs_secret: "):
        render_all(HostSettings(srs=True), file, DOMAIN)
    files = render_all(HostSettings(srs=True), host_file(tmp_path, srs_secret="s3cr3t"), DOMAIN)
    secret = {path: made for path, made in files.items() if "s3cr3t" in made.text}
    assert {(str(path), made.text, made.mode, made.group) for path, made in secret.items()} == {
        ("/etc/cacert-mail/postsrsd/secret", "s3cr3t\n", 0o600, "root")
    }
    without = render_all(HostSettings(), host_file(tmp_path, srs_secret="s3cr3t"), DOMAIN)
    assert set(files) - set(without) == set(secret) | {Path("/etc/cacert-mail/postsrsd/defaults")}


def test_secrets_are_for_those_who_need_them(file: HostFile) -> None:
    """Nothing that everybody may read holds one; rspamd gets none."""
    files = render_all(HostSettings(), file.model_copy(update={"postfix_password": file.dovecot_password}), DOMAIN)
    for path, made in files.items():
        assert ("password" in made.text and made.mode & 0o004) == 0 or path.suffix in (".conf", ".cf"), path
        assert "rspamd" not in str(path) or "password" not in made.text


def test_rspamd_accepts_it(tmp_path: Path) -> None:
    """With all that it can hold."""
    (tmp_path / "suffixes").write_text("test\n")
    places = {f"rspamd_{name}_dir": tmp_path for name in ("config", "run", "state")}
    networks = ("192.0.2.0/24", "2001:db8::/32")
    file = host_file(
        tmp_path, **places, public_suffixes=tmp_path / "suffixes", trusted_networks=networks, resolver="127.0.0.1"
    )
    for path, made in render_all(HostSettings(message_size_limit=2**30), file, DOMAIN).items():
        if path.parent == tmp_path:
            path.write_text(made.text)
    main = tmp_path / "rspamd.conf"
    done = subprocess.run(["rspamadm", "configtest", "-c", main], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "syntax OK\n", "no symbol groups defined\n")
    shown = subprocess.run(["rspamadm", "configdump", "-c", main], capture_output=True, text=True, check=True).stdout
    assert "11334" not in shown
    assert "dkim_signing" not in shown
    assert 'map_add_from_ucl({ "192.0.2.0/24", "2001:db8::/32" }' in (tmp_path / "dkim.lua").read_text()


def test_nothing_is_verified_without_the_dns(file: HostFile) -> None:
    for changed, verifies in (({"dns": False}, False), ({"dns": False, "resolver": "127.0.0.1"}, True), ({}, True)):
        files = render_all(HostSettings(), HostFile.model_validate(file.model_dump() | changed), DOMAIN)
        main = files[Path("/etc/rspamd/rspamd.conf")].text
        assert (Path("/etc/rspamd/incoming.lua") in files) is verifies
        assert ("incoming.lua" in main) is ("spf.lua" in main) is ("effective_tld_names" in main) is verifies


def test_nobody_is_signed_for_by_the_class_of_an_address(file: HostFile) -> None:
    text = render_all(HostSettings(), file, DOMAIN)[Path("/etc/rspamd/dkim.lua")].text
    assert "local NETWORKS = nil" in text
    assert "lua_maps" not in text


def test_rspamd_listens_on_its_socket_only(file: HostFile) -> None:
    text = render_all(HostSettings(), file, DOMAIN)[Path("/etc/rspamd/rspamd.conf")].text
    assert [line.strip() for line in text.splitlines() if "bind_socket" in line] == [
        'bind_socket = "/run/rspamd/milter.sock mode=0666";'
    ]


def test_a_shell_reads_the_defaults_of_postsrsd(tmp_path: Path) -> None:
    file = host_file(tmp_path, srs_secret="x")
    path = tmp_path / "defaults"
    path.write_text(render_all(HostSettings(srs=True, srs_forward_port=1), file, DOMAIN)[file.postsrsd_defaults].text)
    done = subprocess.run(
        ["/bin/sh", "-eu", "-c", f'. {path}; echo "$SRS_DOMAIN $SRS_FORWARD_PORT $SRS_REVERSE_PORT $RUN_AS"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("cacert.test 1 10002 postsrsd\n", "")
