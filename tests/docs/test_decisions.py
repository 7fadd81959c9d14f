"""docs/decisions: numbered without a gap, short, in one form, and about files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/decisions").glob("*.md"))


def test_numbers() -> None:
    assert [int(page.name[:4]) for page in PAGES] == list(range(1, len(PAGES) + 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {int(page.name[:4])}. ")
    assert 10 <= text.count("\n") <= 25
    for part in ("**Asked.**", "**Chosen.**", "**Why.**", "**Would change it.**"):
        assert part in text
    for path in re.findall(r"`((?:app|deploy|tests|docs)/[^` ]+)`", text):
        assert (ROOT / path).exists(), path
