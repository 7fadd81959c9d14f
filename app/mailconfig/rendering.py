"""Fills in the templates.

SECURITY: loaded by the worker (root). A template gets values that `hosts.py` or `app.addresses` has checked, and no
others. It escapes nothing: what is special in one of the files is refused where the value enters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # noqa: S701  no HTML
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A file that the worker writes. Its owner is always root."""

    text: str
    group: str = "root"
    mode: int = 0o644


def render(template: str, **values: Any) -> str:
    """Raises `jinja2.UndefinedError` for a value that the template names and nobody gave."""
    return _TEMPLATES.get_template(template).render(values)
