"""Structured logs. Request and job ids travel by context, so that one `grep` follows a request through all processes.

SECURITY: loaded by the worker (root). Values from outside are logged as values, never as part of a message, and control
characters are escaped by both formats. Tracebacks are
printed without local variables. Members whose name smells of a secret are blanked, whoever put them there.
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
        elif isinstance(value, str) and not value.isprintable() and name != "exception":
            event[name] = value.encode("unicode_escape").decode("ascii")
    return event


def set_up_logging(log_format: str, level: str) -> None:
    """To standard error: `console` for people, `json` (one object a line) for machines."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


log: Any = structlog.get_logger()
