"""The borders inside the code are held by tools. Each is shown to hold, by planting what it forbids into a copy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

IMPORTS = [
    ("app/services/users.py", "import app.web.paging", "Imports point down only"),
    ("app/models/users.py", "import app.queue.contracts", "Imports point down only"),
    ("app/errors.py", "import app.db", "Imports point down only"),
    ("app/workers/host/loop.py", "import fastapi", "Root never loads the web side"),
    ("app/workers/host/rows.py", "import app.services.users", "Root never loads the web side"),
    ("app/workers/host/handlers/users.py", "import app.credentials.passwords", "Root never loads the web side"),
    ("app/queue/claim.py", "import httpx", "Root never loads the web side"),
    ("app/workers/policy/loop.py", "import starlette", "The policy process knows neither"),
    ("app/workers/policy/senders.py", "import app.services.users", "The policy process knows neither"),
    ("app/workers/policy/rows.py", "import app.queue.contracts", "The policy process knows neither"),
    ("app/workers/policy/headers.py", "import app.workers.host.fs", "The policy process knows neither"),
    ("app/routers/users.py", "import app.workers.host.fs", "The web side never loads the worker"),
    ("app/services/jobs.py", "import app.queue.claim", "The web side never loads the worker"),
    ("app/mailconfig/postfix.py", "import app.db", "The configuration of the mail host is pure"),
    ("app/web/authentication.py", "import jose", "Only app.credentials.tokens knows python-jose"),
    ("app/routers/me.py", "import sqlalchemy", "Routers run no SQL"),
    ("app/services/hosts.py", "import starlette", "Services know no HTTP"),
]


@pytest.mark.parametrize(("file", "statement", "contract"), IMPORTS)
def test_a_forbidden_import_is_found(scratch: Path, file: str, statement: str, contract: str) -> None:
    shutil.copytree(ROOT / "app", scratch / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", scratch)
    planted = scratch / file
    planted.write_text(f"{planted.read_text()}\n{statement}\n")
    done = subprocess.run(
        [BIN / "lint-imports", "--no-logo", "--no-cache"], cwd=scratch, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith(contract) for line in broken), done.stdout


@pytest.mark.parametrize("file", ["app/services/users.py", "app/web/docs.py", "app/workers/host/loop.py"])
@pytest.mark.parametrize(
    "statement",
    ["import subprocess", "import shutil", "import os\nos.chown('/', 0, 0)", "import os\nos.replace('a', 'b')"],
)
def test_programs_and_files_are_touched_in_two_files_only(file: str, statement: str) -> None:
    done = subprocess.run(
        [BIN / "ruff", "check", "--select", "TID251", "--stdin-filename", file, "-"],
        cwd=ROOT,
        input=f"{statement}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "TID251" in done.stdout
