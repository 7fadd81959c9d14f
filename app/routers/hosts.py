"""/v1/hosts: the machines on which mailboxes lie."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.models.jobs import JobRow
from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    NOT_FOUND,
    NOT_MODIFIED,
    PREFER,
    CanReadHosts,
    CanWriteHosts,
    HostName,
    ProofBody,
    takes,
)
from app.services import hosts as service
from app.web.answers import JobBody, answer, job_body, settled
from app.web.conditional import etag, expected_version
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NameCursor, page_response

router = APIRouter(prefix="/v1/hosts", tags=["Hosts"], route_class=Route)

Name = Annotated[HostName, Path(description="The host's name.")]


class HostBody(BaseModel):
    name: str
    enabled: bool = Field(description="Takes new accounts.")
    version: int
    created_at: datetime
    updated_at: datetime
    heartbeat_at: datetime | None = Field(description="When its worker was last at work.")
    started_at: datetime | None
    release: str | None
    swept_at: datetime | None
    sweep: dict[str, Any] | None = Field(description="What the last sweep found and repaired.")
    settings: dict[str, Any] = Field(description="Ports, limits and switches, the defaults too.")
    ready: bool = Field(description="Its programs run with these settings, as far as the worker may configure them.")
    proofs: dict[str, ProofBody]
    job: JobBody | None

    @staticmethod
    def of(row: Any, job: JobRow | None) -> "HostBody":
        proofs = row.proofs or {}
        failed = any(proof["result"] == "failed" for proof in proofs.values())
        ready = row.applied_version == row.version and not failed
        return HostBody.model_construct(
            settings=service.effective_settings(row.settings),
            ready=ready,
            proofs={name: ProofBody(**proof) for name, proof in proofs.items()},
            job=None if ready or job is None else JobBody(**job_body(job)),
            name=row.name,
            enabled=row.enabled,
            version=row.version,
            created_at=row.created_at,
            updated_at=row.updated_at,
            heartbeat_at=row.heartbeat_at,
            started_at=row.started_at,
            release=row.release,
            swept_at=row.swept_at,
            sweep=row.sweep,
        )


class HostList(BaseModel):
    items: list[HostBody]
    next_cursor: str | None


class NewHostBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "mail2"}]})

    name: HostName
    enabled: bool = True


class ChangedHostBody(BaseModel):
    """Only what is sent is changed."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"settings": {"pop3_enabled": True, "srs": None}}]}
    )

    enabled: bool = True
    settings: dict[str, Any] = Field({}, description="Single settings; null: the default again.")


@dataclass(frozen=True, slots=True)
class Found:
    """For `settled`."""

    row: Any
    job: JobRow | None

    @property
    def ready(self) -> bool:
        return HostBody.of(self.row, None).ready


async def _answer(call: Call, name: str, *, created: bool = False) -> Response:
    async def read() -> Found:
        row = await call.read(service.get_host, name)
        return Found(row, (await call.read(service.latest_jobs, [name])).get(name))

    found, waited = await settled(call, read)
    row = found.row
    location = f"/v1/hosts/{row.name}" if created else None
    # If-None-Match compares the heartbeat too, which carries what the sweep found, and what was applied; neither ever falls.
    # If-Match compares the version alone.
    heartbeat = int(row.heartbeat_at.timestamp() * 1000) if row.heartbeat_at else 0
    tag = etag(row.version, heartbeat + (row.revision or 0))
    job = None if found.ready else found.job
    body = HostBody.of(row, found.job)
    reading = call.request.method == "GET"
    status = 200 if reading or (found.ready and not created) else 201 if found.ready else 202
    return answer(call, body, status=status, tag=tag, job=job, location=location, waited=waited)


_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": HostBody, "description": "Accepted; its worker has not made it so yet."}
}


@router.post(
    "",
    status_code=201,
    response_model=HostBody,
    summary="Add a mail host",
    responses={**_ACCEPTED, **CONFLICT},
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY),
)
async def create_host(body: NewHostBody, call: CanWriteHosts) -> Response:
    """Its worker runs there with `MAIL_HOST` set to this name. While aliases lead to other mail servers: `enabled: false`,
    and SRS before it is enabled."""
    name = await call.write(service.create_host, body.name, enabled=body.enabled)
    return await _answer(call, name, created=True)


@router.get("", response_model=HostList, summary="List mail hosts")
async def list_hosts(call: CanReadHosts, limit: Limit = 50, cursor: NameCursor = None) -> Response:
    """By name, each with its worker's heartbeat and the result of its last sweep."""
    rows = await call.read(service.list_hosts, after=cursor, limit=limit)
    latest = await call.read(service.latest_jobs, [row.name for row in rows])
    items = [HostBody.of(row, latest.get(row.name)) for row in rows]
    return page_response(call.request, items, rows[-1].name if rows else None, limit)


@router.get(
    "/{host}",
    response_model=HostBody,
    summary="Read a mail host",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(PREFER, IF_NONE_MATCH),
)
async def get_host(host: Name, call: CanReadHosts) -> Response:
    """With its worker's heartbeat and the result of its last sweep."""
    return await _answer(call, host)


@router.patch(
    "/{host}",
    response_model=HostBody,
    summary="Change a mail host: enable, disable, settings",
    responses={**_ACCEPTED, **NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(PREFER, IF_MATCH),
)
async def change_host(host: Name, body: ChangedHostBody, call: CanWriteHosts) -> Response:
    """A disabled host keeps its accounts and takes no new ones. Settings are checked here, and again on the host."""
    version = expected_version(call.request)
    wanted = body.model_dump(include=body.model_fields_set)
    await call.write(service.change_host, host, wanted, expected_version=version)
    return await _answer(call, host)


@router.delete(
    "/{host}",
    status_code=204,
    summary="Remove a host that never had a mailbox",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IF_MATCH),
)
async def delete_host(host: Name, call: CanWriteHosts) -> Response:
    """Only one that never had an account: those that had keep it for ever, and are disabled instead."""
    await call.write(service.delete_host, host, expected_version=expected_version(call.request))
    return Response(status_code=204)
