"""/v1/jobs: what the workers were asked to look at."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel
from starlette.responses import Response

from app.models.jobs import JobState
from app.permissions import Permission
from app.queue.contracts import JobKind
from app.routers.shapes import CONFLICT, IDEMPOTENCY_KEY, NOT_FOUND, CanReadJobs, CanRetryJobs, HostName, takes
from app.services import jobs as service
from app.web.answers import answer
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NumberCursor, page_response

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"], route_class=Route)

JobId = Annotated[int, Path(ge=1, le=2**62, description="The job's id.")]


class JobDetail(BaseModel):
    id: int
    host: str
    kind: str
    subject_id: int
    version: int
    state: JobState
    attempts: int
    error: str | None
    request_id: str
    run_at: datetime
    created_at: datetime
    finished_at: datetime | None

    @staticmethod
    def of(row: Any) -> "JobDetail":
        values = {name: getattr(row, name) for name in JobDetail.model_fields}
        return JobDetail.model_construct(**{**values, "state": JobState(row.state)})


class JobList(BaseModel):
    items: list[JobDetail]
    next_cursor: str | None


async def _answer(call: Call, job_id: int, *, created: bool = False) -> Response:
    row = await call.read(service.get_job, job_id, without=_hidden(call))
    location = f"/v1/jobs/{job_id}" if created else None
    return answer(call, JobDetail.of(row), status=202 if created else 200, location=location)


@router.get("", response_model=JobList, summary="List jobs")
async def list_jobs(
    call: CanReadJobs,
    state: Annotated[JobState | None, Query(description="`dead`: those that need somebody.")] = None,
    kind: Annotated[JobKind | None, Query(description="Only of this kind.")] = None,
    host: Annotated[HostName | None, Query(description="Only of this host.")] = None,
    subject_id: Annotated[
        int | None, Query(ge=1, le=2**62, description="The id of the account or alias; name the `kind` too.")
    ] = None,
    limit: Limit = 50,
    cursor: NumberCursor = None,
) -> Response:
    """Newest first, with what each was asked for, how far it got and its last error."""
    after = int(cursor) if cursor else None
    rows = await call.read(
        service.list_jobs,
        state=state,
        kind=kind,
        host=host,
        subject_id=subject_id,
        after=after,
        without=_hidden(call),
        limit=limit,
    )
    return page_response(call.request, [JobDetail.of(row) for row in rows], rows[-1].id if rows else None, limit)


def _hidden(call: Call) -> tuple[JobKind, ...]:
    """Whether there was anybody to send a mail to is not for those who must not learn who is here."""
    return () if call.may(Permission.USERS_READ) else (JobKind.MAIL_SEND,)


@router.get("/{job}", response_model=JobDetail, summary="Read a job", responses=NOT_FOUND)
async def get_job(job: JobId, call: CanReadJobs) -> Response:
    """How far the host has got, how often it tried, and the last error. Finished jobs are kept for a while only."""
    return await _answer(call, job)


@router.post(
    "/{job}/retry",
    status_code=202,
    response_model=JobDetail,
    summary="Try a dead job again",
    responses={**NOT_FOUND, **CONFLICT},
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def retry_job(job: JobId, call: CanRetryJobs) -> Response:
    """Makes a new job about the same account as it is now. The answer is the new job."""
    new_id = await call.write(service.retry_job, job)
    return await _answer(call, new_id, created=True)
