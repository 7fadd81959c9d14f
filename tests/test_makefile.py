"""`make test` and `make demo` without root name what is missing and stop; nothing is skipped in silence."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", ["packages-test", "packages-demo"])
@pytest.mark.parametrize("installed", [False, True])
def test_without_root(scratch: Path, target: str, installed: bool) -> None:
    shutil.copy(ROOT / "Makefile", scratch)
    query = scratch / "bin/dpkg-query"
    query.parent.mkdir()
    query.write_text(f"#!/bin/sh\nprintf '{'installed' if installed else 'not-installed'}'\n")
    query.chmod(0o755)
    query.parent.chmod(0o755)
    done = subprocess.run(
        ["make", target],
        cwd=scratch,
        env={"PATH": f"{query.parent}:/usr/bin:/bin:/usr/sbin:/sbin"},
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    if installed:
        assert "wants root" in done.stdout
    else:
        assert "Missing Debian packages: mariadb-server" in done.stdout
        assert ("chromium" in done.stdout) == (target == "packages-test")
        assert "run this as root" in done.stdout
    assert {path.name for path in scratch.iterdir()} == {"Makefile", "bin"}
