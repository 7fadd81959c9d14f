"""deploy/systemd: systemd's own check, what each process may, and that no setting is named that nothing reads."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app.cli.main import cli
from app.config import ApiSettings, PolicySettings, ServiceSettings, Settings, WorkerSettings

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
SETTINGS: dict[str, type[Settings]] = {
    "api": ApiSettings,
    "worker": WorkerSettings,
    "service": ServiceSettings,
    "policy": PolicySettings,
}
PROCESSES = sorted(SETTINGS)
WAKING = {"api", "worker", "service"}
"""They meet in the directory of the wake-up sockets."""
INSTALLED = "/opt/cacert-mail/.venv/bin/cacert-mail"


def unit(process: str) -> Path:
    return FOLDER / f"cacert-mail-{process}.service"


def directives(process: str) -> dict[str, list[str]]:
    """Each directive and all its values, in order."""
    found: dict[str, list[str]] = {}
    for line in unit(process).read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def systemd_analyze() -> str:
    path = shutil.which("systemd-analyze")
    if path is None:
        pytest.fail("The units are checked by systemd-analyze, of the Debian package systemd", pytrace=False)
    return path


def test_every_process_has_a_unit_and_no_other_is_there() -> None:
    assert sorted(FOLDER.glob("*.service")) == sorted(unit(process) for process in PROCESSES)


@pytest.mark.parametrize("process", PROCESSES)
def test_systemd_takes_the_unit(systemd_analyze: str, process: str, tmp_path: Path) -> None:
    """With the command where it is on this machine: systemd looks whether it can be executed."""
    command = shutil.which("true")
    assert command
    path = tmp_path / unit(process).name
    path.write_text(unit(process).read_text().replace(INSTALLED, command))
    done = subprocess.run(
        [systemd_analyze, "verify", "--man=no", "--recursive-errors=no", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    ours = [line for line in done.stderr.splitlines() if "cacert-mail" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_systemd_would_say_if_a_directive_were_unknown(systemd_analyze: str, tmp_path: Path) -> None:
    path = tmp_path / "cacert-mail-planted.service"
    path.write_text("[Service]\nExecStart=/bin/true\nProtectSytem=strict\n")
    argv = [systemd_analyze, "verify", "--man=no", "--recursive-errors=no", path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert "ProtectSytem" in done.stderr


@pytest.mark.parametrize(("process", "worst"), [("api", 15), ("service", 15), ("policy", 15), ("worker", 31)])
def test_exposure(systemd_analyze: str, process: str, worst: int) -> None:
    """In tenths of systemd's own scale, 0 for safe to 100; what is lower than written here may be written here."""
    argv = [systemd_analyze, "security", "--offline=true", "--no-pager", f"--threshold={worst}", unit(process)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("process", PROCESSES)
def test_command(process: str) -> None:
    assert directives(process)["ExecStart"] == [f"{INSTALLED} {process}"]
    assert process in {
        command.name or command.callback.__name__ for command in cli.registered_commands if command.callback
    }


@pytest.mark.parametrize("process", PROCESSES)
def test_every_setting_exists(process: str) -> None:
    """Those in the unit, and those of which its comments say that they go into the environment file."""
    named = {pair.partition("=")[0] for line in directives(process)["Environment"] for pair in line.split()}
    named |= set(re.findall(r"^#   ([A-Z_]+)=", unit(process).read_text(), re.MULTILINE))
    assert named >= {"DATABASE_URL"} | ({"WAKE_DIRECTORY"} if process in WAKING else set())
    assert named <= {name.upper() for name in SETTINGS[process].model_fields}


@pytest.mark.parametrize("process", PROCESSES)
def test_no_secret_in_a_unit(process: str) -> None:
    found = directives(process)
    assert found["EnvironmentFile"] == [f"/etc/cacert-mail/{process}.env"]
    assert not re.search(r"DATABASE_URL|PASSWORD|SECRET", " ".join(found["Environment"]))
    assert f"{process}.env, root:root 0640" in unit(process).read_text()


CAPABILITIES = {
    "api": set(),
    "service": set(),
    "policy": set(),
    "worker": {"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"},
}
USERS = {
    "api": "cacert-mail-api",
    "service": "cacert-mail-service",
    "policy": "cacert-mail-policy",
    "worker": "root",
}
WRITABLE = {
    "api": set(),
    "service": {"/run/cacert-mail", "-/var/lib/cacert-mail/returns"},
    "policy": set(),
    "worker": {
        "/home",
        "/run/cacert-mail",
        "/etc/cacert-mail",
        *("-/var/spool/postfix", "-/var/lib/postfix", "-/var/lib/cacert-mail"),
        *("-/etc/postfix", "-/etc/dovecot", "-/etc/rspamd"),
    },
}


@pytest.mark.parametrize("process", PROCESSES)
def test_what_it_may(process: str) -> None:
    found = directives(process)
    assert {name for line in found["CapabilityBoundingSet"] for name in line.split()} == CAPABILITIES[process]
    assert found["AmbientCapabilities"] == [""]
    assert found["User"] == [USERS[process]]
    assert {path for line in found.get("ReadWritePaths", []) for path in line.split()} == WRITABLE[process]
    for name, value in (
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("PrivateTmp", "yes"),
        ("MemoryDenyWriteExecute", "yes"),
        ("RestrictSUIDSGID", "yes"),
        ("RestrictNamespaces", "yes"),
        ("Restart", "on-failure"),
        ("ProtectHome", "no" if process == "worker" else "yes"),
    ):
        assert found[name] == [value], name
    assert found["SystemCallFilter"][0] == "@system-service"
    assert set(found["RestrictAddressFamilies"][0].split()) <= {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}


def test_users_and_directories() -> None:
    """The users that the units name are made, and nobody can put a link in place of root's wake-up socket."""
    sysusers = [line.split() for line in (FOLDER / "cacert-mail.sysusers").read_text().splitlines() if line[0] != "#"]
    made = {fields[1] for fields in sysusers if fields[0] == "u"}
    assert made == {USERS["api"], USERS["service"], USERS["policy"]}
    members = {fields[1] for fields in sysusers if fields[0] == "m" and fields[2] == "cacert-mail"}
    assert members == {USERS["api"], USERS["service"]}
    tmpfiles = [line.split() for line in (FOLDER / "cacert-mail.tmpfiles").read_text().splitlines() if line[0] != "#"]
    directories = {fields[1]: fields[2:5] for fields in tmpfiles}
    assert directories["/run/cacert-mail"] == ["1770", "root", "cacert-mail"], "the sticky bit: see docs/decisions"
    assert directories[str(WorkerSettings.model_fields["lock_file"].default)] == ["0600", "root", "root"]
    assert directories["/var/lib/cacert-mail/keys"] == ["0700", USERS["api"], USERS["api"]]


def test_sweep_by_hand_and_worker_share_a_lock() -> None:
    assert not re.search(r"^(Environment=.*|#   )LOCK_FILE", unit("worker").read_text(), re.MULTILINE)
