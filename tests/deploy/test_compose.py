"""docker-compose.yml, .env.example and deploy/container as far as they can be judged without an engine.

PyYAML is no dependency: the file keeps to two blanks a level, so that its structure can be read line by line.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import ApiSettings, ServiceSettings, WorkerSettings

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
CONTAINER = ROOT / "deploy/container"
OWN = {"api": ApiSettings, "service": ServiceSettings, "mail": WorkerSettings, "prepare": ApiSettings}
ENDS_BY_ITSELF = {"prepare", "grants"}
FOR_ENTRY_POINTS = {"MAIL_HOSTNAME", "MAIL_DOMAIN", "POSTFIX_PASSWORD", "DOVECOT_PASSWORD"}


def mapping(text: str, depth: int = 0) -> dict[str, str]:
    """The keys at this depth, each with the text below it."""
    parts = re.split(rf"^{' ' * depth}([a-z_A-Z]+):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


SERVICES = mapping(mapping(COMPOSE)["services"], 2)
VARIABLES = dict(re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))


def environment(service: str) -> dict[str, str]:
    return {
        name: value.strip() for name, value in mapping(mapping(SERVICES[service], 4).get("environment", ""), 6).items()
    }


def test_structure() -> None:
    assert COMPOSE.splitlines()[0].startswith("# Not yet run with a real engine")
    assert set(SERVICES) == {"database", "api", "service", "mail", *ENDS_BY_ITSELF}
    assert "\t" not in COMPOSE
    volumes = set(mapping(mapping(COMPOSE)["volumes"], 2))
    mounted = set(re.findall(r"^      - ([a-z]+):/", COMPOSE, re.MULTILINE))
    assert mounted == volumes
    for path in re.findall(r"^      - \./([^:]+):", COMPOSE, re.MULTILINE):
        assert (ROOT / path).is_file(), path
    for name, text in SERVICES.items():
        keys = mapping(text, 4)
        for waits_for in re.findall(r"^      ([a-z]+):$", keys.get("depends_on", ""), re.MULTILINE):
            assert waits_for in SERVICES
        if name not in ENDS_BY_ITSELF:
            assert {"healthcheck", "restart"} <= set(keys), name
        if name in OWN and name not in ENDS_BY_ITSELF:
            assert '["ALL"]' in keys["cap_drop"], name


@pytest.mark.parametrize("service", OWN)
def test_settings_exist(service: str) -> None:
    known = {name.upper() for name in OWN[service].model_fields}
    assert set(environment(service)) - FOR_ENTRY_POINTS <= known


def test_no_secret_in_a_file() -> None:
    for service in SERVICES:
        for name, value in environment(service).items():
            if "PASSWORD" in name or "PWD" in name:
                assert re.fullmatch(r"\$\{[A-Z]+_PASSWORD:\?set it in \.env\}", value), name
    assert all(value == "" for name, value in VARIABLES.items() if "PASSWORD" in name)
    urls = re.findall(r"://[a-z]+:([^@\n]+)@", COMPOSE)
    assert len(urls) == 4
    assert all(re.fullmatch(r"\$\{[A-Z]+_PASSWORD:\?set it in \.env\}", password) for password in urls)


def test_env_example_names_what_compose_needs() -> None:
    assert set(re.findall(r"\$\{([A-Z_]+)", COMPOSE)) - {"EDITOR"} == set(VARIABLES)


def test_files_of_the_images_exist() -> None:
    dockerfile = (CONTAINER / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE))
    assert set(re.findall(r"target: (\w+)", COMPOSE)) <= stages
    for sources in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source


@pytest.mark.parametrize("path", sorted(CONTAINER.iterdir()), ids=lambda path: path.name)
def test_scripts_can_be_parsed(path: Path) -> None:
    shebang, _, text = path.read_text().partition("\n")
    if "python" in shebang:
        ast.parse(text)
    elif shebang.startswith("#!"):
        subprocess.run([shebang.removeprefix("#!"), "-n", path], check=True, timeout=10)
    assert not shebang.startswith("#!") or os.access(path, os.X_OK)


def test_postfix_and_dovecot_read_what_the_mail_container_writes(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("")
    variables = {"MAIL_DOMAIN": "example.org", "MAIL_HOSTNAME": "mail.example.org", "MAIL_HOST": "mail"}
    passwords = {"POSTFIX_PASSWORD": "a-b_c1", "DOVECOT_PASSWORD": "a-b_c2"}
    uids = {name: environment("mail")[name].strip('"') for name in ("UID_FIRST", "UID_LAST")}
    subprocess.run(
        [sys.executable, CONTAINER / "mail-config", tmp_path],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables, **passwords, **uids},
        check=True,
        timeout=30,
    )
    postfix, dovecot = tmp_path / "etc/postfix", tmp_path / "etc/dovecot/dovecot.conf"
    asked = subprocess.run(
        ["postconf", "-c", postfix, "-h", "recipients"], capture_output=True, text=True, check=True, timeout=30
    )
    assert asked.stdout.strip() == environment("mail")["POSTFIX_RECIPIENTS"]
    assert "a-b_c1" in (postfix / "recipients.cf").read_text()
    assert (postfix / "recipients.cf").stat().st_mode & 0o777 == 0o640
    # Dovecot opens the certificate when it reads the file; its place in the container is not on this machine.
    dovecot.write_text(dovecot.read_text().replace("/var/lib/cacert-mail/tls", str(tmp_path)))
    read = subprocess.run(
        ["doveconf", "-c", dovecot, "-h", "first_valid_uid"], capture_output=True, text=True, check=True, timeout=30
    )
    assert read.stdout.strip() == uids["UID_FIRST"]
