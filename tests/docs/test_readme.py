"""The README says what is so."""

import re
import subprocess
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.config import ApiSettings, ImportSettings, PolicySettings, ServiceSettings, Settings, WorkerSettings
from app.main import build_app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROCESSES = {
    "api": ApiSettings,
    "worker": WorkerSettings,
    "service": ServiceSettings,
    "policy": PolicySettings,
    "import": ImportSettings,
}


def expected() -> dict[str, tuple[str, set[str]]]:
    """Name, default and processes of each setting, from the code."""
    found: dict[str, tuple[str, set[str]]] = {}
    for process, settings in PROCESSES.items():
        for name, field in settings.model_fields.items():
            default = field.get_default()
            default = default.get_secret_value() if isinstance(default, SecretStr) else default
            text = (
                ""
                if default is None or field.is_required()
                else str(default).lower()
                if isinstance(default, bool)
                else str(default)
            )
            of = {"all"} if name in Settings.model_fields else {process}
            found[name.upper()] = (text, found.get(name.upper(), ("", set()))[1] | of)
    return found


def test_every_setting_is_in_the_table() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)? ?\| [^|]+ \| ([a-z, ]+) \|$", README, re.MULTILINE)
    assert {name: (default, set(of.split(", "))) for name, default, of in rows} == expected()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z]+)", README))))
def test_every_make_command_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_path_exists() -> None:
    for name in re.findall(r"`((?:app|deploy|docs|alembic|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_every_url_of_the_tour_exists() -> None:
    paths = build_app().openapi()["paths"]
    templates = [re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + r"\Z") for path in paths]
    urls = re.findall(r"\$URL(/v1/[\w/@.]+)", README.replace("$ID", "1"))
    assert len(urls) >= 8
    for url in urls:
        assert any(template.match(url) for template in templates), url
