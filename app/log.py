"""Structured logs. Request and job ids travel by context, so that one `grep` follows a request through all processes.

SECURITY: loaded by the worker (root). Values from outside are logged as values, never as part of a message, and control
characters are escaped by both formats. Tracebacks are printed without local variables; the console format indents them,
since an error's text may hold anything. Members whose name smells of a secret are blanked, whoever put them there.
"""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_SECRET = re.compile(r"password|secret|token|authorization|cookie|credential|private", re.IGNORECASE)


def redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if name != "event" and _SECRET.search(name) and value is not None:
            event[name] = "[redacted]"
        elif isinstance(value, str) and name != "exception":
            event[name] = _escaped(value)
    return event


def _escaped(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def indent(logger: Any, method: str, text: str) -> str:
    """Only the first line of an event begins at the margin, so nothing below it passes for another event."""
    return "\n    ".join(_escaped(line) for line in text.split("\n"))


def set_up_logging(log_format: str, level: str) -> None:
    """To standard error: `console` for people, `json` (one object a line) for machines."""
    renderers: list[Any] = [structlog.processors.JSONRenderer()]
    if log_format == "console":
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=plain), indent]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


log: Any = structlog.get_logger()
