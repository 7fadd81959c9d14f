"""docs/brute-force.md says what the settings say. That the rules hold is tested where they are."""

import re
import tomllib
from pathlib import Path

import pytest

from app.config import ApiSettings
from app.mailconfig.hosts import HostFile, HostSettings
from app.main import build_app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/brute-force.md").read_text()


def test_the_example_is_part_of_a_host_file() -> None:
    [example] = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    names = tomllib.loads(example)
    minimal = {"host": "mail", "hostname": "mail.example.org", "tls_certificate": "/a", "tls_key": "/b"}
    HostFile.model_validate({**minimal, "postfix_password": "x", "dovecot_password": "y", **names})


@pytest.mark.parametrize(("limit", "setting"), re.findall(r"^\| [^|]+ \| (\d+) \| `([A-Z_]+)` \|$", TEXT, re.MULTILINE))
def test_the_table_has_the_defaults(limit: str, setting: str) -> None:
    assert ApiSettings.model_fields[setting.lower()].default == int(limit)


def test_each_number_beside_a_setting_is_its_default() -> None:
    found = re.findall(r"`([A-Z_]+)` \((\d+)\)", TEXT)
    assert len(found) == 2
    for setting, number in found:
        assert ApiSettings.model_fields[setting.lower()].default == int(number), setting


def test_every_name_exists() -> None:
    for setting in set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)[`=]", TEXT)) - {"CLIENT_ID"}:
        assert setting.lower() in ApiSettings.model_fields, setting
    assert "auth_policy_reject_on_fail" in HostSettings.model_fields
    paths = build_app().openapi()["paths"]
    assert {"/v1/lockouts", "/v1/lockouts/{lockout}", "/dovecot/auth-policy"} <= set(paths)
    for name in re.findall(r"`(jail\.d/[\w.-]+)`", TEXT):
        assert (ROOT / "deploy/fail2ban" / name).exists()
