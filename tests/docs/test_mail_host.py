"""docs/mail-host.md names what there is. The way that it describes is walked by `tests/mail/test_stock_paths.py`."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.mailconfig.hosts import HostFile
from app.main import build_app
from tests.stack import PACKAGES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/mail-host.md").read_text()
[EXAMPLE] = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_example_is_a_host_file() -> None:
    file = HostFile.model_validate(tomllib.loads(EXAMPLE))
    assert file.host == "mail"
    for name in re.findall(r"^# (\w+) =", EXAMPLE, re.MULTILINE):
        assert name in HostFile.model_fields, name
    commented = re.sub(r"^# (\w+ =)", r"\1", EXAMPLE, flags=re.MULTILINE)
    HostFile.model_validate(tomllib.loads(commented))


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"cacert-mail ((?:mailhost|import|principal|keys|sweep)(?: [a-z]+)?)", TEXT)))
)
def test_every_command_exists(command: str) -> None:
    argv = [sys.executable, "-m", "app.cli.main", *command.split(), "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_package_is_installed() -> None:
    for package in PACKAGES:
        assert package in TEXT or package in ("mariadb-client", "knot"), package


def test_every_path_and_url_exists() -> None:
    for name in re.findall(r"(?:/opt/cacert-mail/|`)((?:deploy|tests|docs)/[\w./-]+\w)", TEXT):
        assert (ROOT / name).exists(), name
    templates = [re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + r"\Z") for path in build_app().openapi()["paths"]]
    for url in re.findall(r"(?:\$URL|GET |PATCH )(/v1/[\w/@.-]+)", TEXT):
        assert any(template.match(url) for template in templates), url
