"""/v1/hosts: the machines on which mailboxes lie."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    NOT_FOUND,
    NOT_MODIFIED,
    CanReadHosts,
    CanWriteHosts,
    HostName,
    takes,
)
from app.services import hosts as service
from app.web.answers import answer
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

    @staticmethod
    def of(row: Any) -> "HostBody":
        return HostBody.model_construct(
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
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"enabled": False}]})

    enabled: bool


async def _answer(call: Call, name: str, *, created: bool = False) -> Response:
    row = await call.read(service.get_host, name)
    location = f"/v1/hosts/{row.name}" if created else None
    # If-None-Match compares the heartbeat too, which carries what the sweep found; If-Match the version alone.
    tag = etag(row.version, int(row.heartbeat_at.timestamp() * 1000) if row.heartbeat_at else None)
    return answer(call, HostBody.of(row), status=201 if created else 200, tag=tag, location=location)


@router.post(
    "",
    status_code=201,
    response_model=HostBody,
    summary="Add a mail host",
    responses=CONFLICT,
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def create_host(body: NewHostBody, call: CanWriteHosts) -> Response:
    """Its worker runs there with `MAIL_HOST` set to this name."""
    name = await call.write(service.create_host, body.name, enabled=body.enabled)
    return await _answer(call, name, created=True)


@router.get("", response_model=HostList, summary="List mail hosts")
async def list_hosts(call: CanReadHosts, limit: Limit = 50, cursor: NameCursor = None) -> Response:
    """By name, each with its worker's heartbeat and the result of its last sweep."""
    rows = await call.read(service.list_hosts, after=cursor, limit=limit)
    return page_response(call.request, [HostBody.of(row) for row in rows], rows[-1].name if rows else None, limit)


@router.get(
    "/{host}",
    response_model=HostBody,
    summary="Read a mail host",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(IF_NONE_MATCH),
)
async def get_host(host: Name, call: CanReadHosts) -> Response:
    """With its worker's heartbeat and the result of its last sweep."""
    return await _answer(call, host)


@router.patch(
    "/{host}",
    response_model=HostBody,
    summary="Enable or disable a mail host",
    responses={**NOT_FOUND, **CHANGED},
    openapi_extra=takes(IF_MATCH),
)
async def change_host(host: Name, body: ChangedHostBody, call: CanWriteHosts) -> Response:
    """A disabled host keeps its accounts and takes no new ones."""
    version = expected_version(call.request)
    await call.write(service.change_host, host, enabled=body.enabled, expected_version=version)
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
