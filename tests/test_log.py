"""What the logs never hold: secrets, and lines that somebody else made up. The same in both formats."""

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from app.log import set_up_logging

FORGED = "2026-11-23T12:00:00Z [info     ] user_purged"


@pytest.fixture(params=["console", "json"])
def logged(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    set_up_logging(request.param, "info")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream), cache_logger_on_first_use=False)
    yield stream
    set_up_logging("json", "error")


def fail(text: str) -> None:
    secret = "hunter2" * 2
    raise ValueError(text if secret else secret)


def test_a_traceback_shows_no_local_variables(logged: io.StringIO) -> None:
    try:
        fail("it broke")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
    said = logged.getvalue()
    assert "in fail" in said
    assert "ValueError: it broke" in said
    assert "hunter2hunter2" not in said


@pytest.mark.parametrize(
    "name",
    "password new_password password_hash client_secret access_token refresh_tokens Authorization cookie Set-Cookie"
    " credentials private_key SECRET".split(),
)
def test_secrets_are_blanked_by_their_name(logged: io.StringIO, name: str) -> None:
    structlog.get_logger().info("asked", **{name: "hunter2", "user": "alice"})
    said = logged.getvalue()
    assert "hunter2" not in said
    assert "[redacted]" in said
    assert "alice" in said


def test_a_secret_of_the_context_is_blanked_too(logged: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(token="hunter2", request_id="r1"):
        structlog.get_logger().info("asked")
    said = logged.getvalue()
    assert "hunter2" not in said
    assert "r1" in said


@pytest.mark.parametrize("gap", ["\n", "\r", "\r\n", "\x0b", "\x1b[1A\r", "\x7f", "\x85", "\u2028", "\x08" * 80])
@pytest.mark.parametrize("where", ["message", "value", "nested", "error", "cause"])
def test_no_text_passes_for_another_event(logged: io.StringIO, where: str, gap: str) -> None:
    text = f"harmless{gap}{FORGED}"
    log = structlog.get_logger()
    match where:
        case "message":
            log.info(text)
        case "value":
            log.info("asked", value=text)
        case "nested":
            log.info("asked", value={"lines": [text]}, error=ValueError(text))
        case _:
            try:
                try:
                    fail(text)
                except ValueError as error:
                    if where == "error":
                        raise
                    raise KeyError from error
            except (ValueError, KeyError) as error:
                log.error("failed", exc_info=error)
    lines = logged.getvalue().splitlines()
    assert FORGED in logged.getvalue()
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])
    if where in ("message", "value"):
        assert len(lines) == 1


@pytest.mark.parametrize("logged", ["json"], indirect=True)
def test_an_event_is_one_line_of_json(logged: io.StringIO) -> None:
    try:
        fail(f"\n{FORGED}")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error, user=1)
    [event] = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert (event["event"], event["level"], event["user"]) == ("failed", "error", 1)
    assert event["exception"].endswith(f"ValueError: \n{FORGED}")
