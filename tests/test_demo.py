"""`make demo` tells the story that the README shows, and leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def without_numbers(line: str) -> str:
    return re.sub(r"^ *\d+ ms", "ms", re.sub(r"cm-\w+", "cm-", line)).rstrip()


def test_the_story_is_the_one_in_the_readme() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=ROOT,
        env={**os.environ, "ONCE": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *told, last = done.stdout.splitlines()
    assert last == "Everything was stopped and removed."
    shown = re.search(r"This is `make demo`:\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert [without_numbers(line) for line in told] == [without_numbers(line) for line in shown.group(1).splitlines()]
    [directory] = {match.group(0) for line in told if (match := re.search(r"/dev/shm/cm-\w+", line))}
    assert not Path(directory).exists()
