"""Answers that are always the resource: status, ETag, Location, `Link: rel="monitor"`, and the wait for the host."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from app.models.jobs import JobRow, JobState
from app.web.conditional import not_modified
from app.web.dependencies import Call
from app.web.waiting import seconds_to_wait


class JobBody(BaseModel):
    """The job that makes it so on the host; null once it is ready."""

    id: int
    state: JobState
    error: str | None
    url: str


def job_body(job: JobRow) -> dict[str, Any]:
    """What JobBody describes."""
    return {"id": job.id, "state": job.state, "error": job.error, "url": f"/v1/jobs/{job.id}"}


class Provable(Protocol):
    """A resource that the host must reflect."""

    @property
    def ready(self) -> bool: ...
    @property
    def job(self) -> JobRow | None: ...


R = TypeVar("R", bound=Provable)


async def settled(call: Call, read: Callable[[], Awaitable[R]]) -> tuple[R, bool]:
    """Reads the resource; while the caller prefers to wait, until it is ready or its job is dead.

    Returns it and whether the wait was honoured. A job can be done and a proof fail: nothing is left to wait for then.
    """
    seconds = seconds_to_wait(call.request)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    done = 0
    while True:
        resource = await read()
        job, left = resource.job, deadline - loop.time()
        if resource.ready or job is None or job.state == JobState.DEAD or job.id == done or left <= 0:
            return resource, seconds > 0
        if job.state == JobState.DONE:
            done = job.id  # it may have ended between the two queries of one reading, so read once more
        else:
            await call.service.waiter.wait(job.id, left)


def encode(body: Any) -> bytes:
    """JSON; times as RFC 3339 in UTC."""
    return orjson.dumps(body, default=_plain, option=orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} has no place in an answer")


def answer(
    call: Call,
    body: BaseModel | dict[str, Any],
    *,
    status: int = 200,
    tag: str | None = None,
    job: JobRow | None = None,
    location: str | None = None,
    waited: bool = False,
) -> Response:
    headers: dict[str, str] = {}
    if tag is not None:
        headers["ETag"] = tag
        headers["Cache-Control"] = "private, no-cache"
        # While a job is shown the answer changes without the tag: the job goes from ready to running to dead.
        if call.request.method == "GET" and job is None and not_modified(call.request, tag):
            return Response(status_code=304, headers=headers)
    if job is not None:
        headers["Link"] = f'</v1/jobs/{job.id}>; rel="monitor"'
    if location is not None:
        headers["Location"] = location
    if waited:
        headers["Preference-Applied"] = "wait"
    if call.replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(encode(body), status, headers, "application/json")
