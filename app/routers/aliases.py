"""/v1/aliases: addresses that lead elsewhere, and who may send as them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from app.addresses import DomainName, MailAddress, OutsideAddress
from app.errors import Unchangeable
from app.models.aliases import AliasKind
from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    NOT_FOUND,
    NOT_MODIFIED,
    PREFER,
    AliasKey,
    CanReadAliases,
    CanWriteAliases,
    ProofBody,
    plain_text,
    takes,
)
from app.services import aliases as service
from app.services.aliases import MAX_DESTINATIONS, AliasFilter, AliasRecord, NewAlias
from app.web.answers import JobBody, answer, job_body, settled
from app.web.conditional import etag, expected_version
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NumberCursor, page_response

router = APIRouter(prefix="/v1/aliases", tags=["Aliases"], route_class=Route)

Note = Annotated[
    str, Field(max_length=200, description="For people: what it is there for."), AfterValidator(plain_text)
]
Destinations = Annotated[
    list[Annotated[str, Field(max_length=254)]],
    Field(
        max_length=MAX_DESTINATIONS, description="Accounts and aliases here; addresses elsewhere if the hosts do SRS."
    ),
]
Designated = Annotated[
    list[MailAddress],
    Field(max_length=MAX_DESTINATIONS, description="The accounts that may send as a `send_as` alias, and nobody else."),
]


class LapsedBody(BaseModel):
    address: str
    was: Literal["destination", "designated"]
    reason: Literal["account_deleted", "account_purged", "alias_deleted"] = Field(
        description="`account_deleted`: back when the account is restored. The others are gone for good, whoever has the "
        "address now; a PATCH of `destinations` or `designated` says who is to follow."
    )


class AliasBody(BaseModel):
    """An alias as it should be, and how far the hosts have got."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 3,
                    "address": "pr@cacert.org",
                    "kind": "send_as",
                    "destinations": ["alice@cacert.org", "bob@cacert.org"],
                    "designated": ["alice@cacert.org"],
                    "lapsed": [],
                    "note": "Press",
                    "version": 1,
                    "ready": True,
                    "proofs": {"mail": {"postfix": {"result": "ok", "detail": "its map has the alias"}}},
                    "job": None,
                    "created_at": "2026-11-23T12:00:00Z",
                    "updated_at": "2026-11-23T12:00:00Z",
                    "deleted_at": None,
                }
            ]
        }
    )

    id: int
    address: str
    kind: AliasKind
    destinations: list[str] = Field(description="Where mail to it goes.")
    designated: list[str] = Field(description="Who may send as it.")
    lapsed: list[LapsedBody] = Field(description="Deleted accounts and aliases among both: they get and may nothing.")
    note: str
    version: int = Field(description="Raised by every change, and when an account that it leads to comes or goes.")
    ready: bool = Field(description="Every enabled host reflects this version, and every proof holds.")
    proofs: dict[str, dict[str, ProofBody]] = Field(description="By host.")
    job: JobBody | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None


def alias_body(record: AliasRecord) -> dict[str, Any]:
    """What AliasBody describes."""
    row = record.row
    return {
        "id": row.id,
        "address": row.address,
        "kind": row.kind,
        "destinations": record.destinations,
        "designated": record.designated,
        "lapsed": [lapsed._asdict() for lapsed in record.lapsed],
        "note": row.note,
        "version": row.version,
        "ready": record.ready,
        "proofs": record.proofs,
        "job": None if record.job is None else job_body(record.job),
        "created_at": row.created_at,
        "updated_at": row.updated_at,
        "deleted_at": row.deleted_at,
    }


class AliasList(BaseModel):
    items: list[AliasBody]
    next_cursor: str | None


class NewAliasBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "address": "pr@cacert.org",
                    "kind": "send_as",
                    "destinations": ["alice@cacert.org"],
                    "designated": ["alice@cacert.org"],
                    "note": "Press",
                }
            ]
        },
    )

    address: MailAddress
    kind: AliasKind = Field(description="`receive_only`: never sent from. `send_as`: the designated may send as it.")
    destinations: Destinations
    designated: Designated = []
    note: Note = ""
    reuse_address: bool = Field(False, description="Take the address of a deleted account, on purpose.")


class ChangedAliasBody(BaseModel):
    """Only what is sent is changed; a list replaces the whole list."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"destinations": ["alice@cacert.org"], "note": "Press, radio, television"}]},
    )

    destinations: Destinations = []
    designated: Designated = []
    note: Note = ""

    @model_validator(mode="before")
    @classmethod
    def say_what_to_do_instead(cls, data: Any) -> Any:
        for name in ("address", "kind"):
            if isinstance(data, dict) and name in data:
                raise Unchangeable("It never changes. Delete this alias, and create it as it should be.", field=name)
        return data


async def _answer(call: Call, key: MailAddress | int, *, created: bool = False) -> Response:
    async def read() -> AliasRecord:
        return await call.read(service.get_alias, key)

    record, waited = await settled(call, read)
    reading = call.request.method == "GET"
    return answer(
        call,
        alias_body(record),
        status=200 if reading or (record.ready and not created) else 201 if record.ready else 202,
        tag=etag(record.row.version, record.revision),
        job=record.job,
        location=f"/v1/aliases/{record.id}" if created else None,
        waited=waited,
    )


_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": AliasBody, "description": "Accepted; a host is not ready yet."}
}


@router.post(
    "",
    status_code=201,
    response_model=AliasBody,
    summary="Create an alias",
    responses={**_ACCEPTED, **CONFLICT},
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY),
)
async def create_alias(body: NewAliasBody, call: CanWriteAliases) -> Response:
    """Refused, with the chain shown, if mail would go in a circle, too far, or nowhere."""
    new = NewAlias(body.address, body.kind, body.destinations, body.designated, body.note, body.reuse_address)
    return await _answer(call, await call.write(service.create_alias, new), created=True)


@router.get("", response_model=AliasList, summary="List aliases")
async def list_aliases(
    call: CanReadAliases,
    domain: Annotated[DomainName | None, Query(description="Only of this domain.")] = None,
    kind: Annotated[AliasKind | None, Query(description="Only of this kind.")] = None,
    destination: Annotated[OutsideAddress | None, Query(description="Only those that lead straight to it.")] = None,
    designated: Annotated[MailAddress | None, Query(description="Only those that this account may send as.")] = None,
    address: Annotated[MailAddress | None, Query(description="Exactly this one.")] = None,
    deleted: Annotated[bool, Query(description="The deleted ones, instead of those that are there.")] = False,
    limit: Limit = 50,
    cursor: NumberCursor = None,
) -> Response:
    """In the order in which they were made."""
    wanted = AliasFilter(domain, kind, destination, designated, address, deleted)
    records = await call.read(service.list_aliases, wanted, after=int(cursor) if cursor else None, limit=limit)
    last = records[-1].id if records else None
    return page_response(call.request, [alias_body(record) for record in records], last, limit)


@router.get(
    "/{alias}",
    response_model=AliasBody,
    summary="Read an alias",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(PREFER, IF_NONE_MATCH),
)
async def get_alias(alias: AliasKey, call: CanReadAliases) -> Response:
    """Where it leads, who may send as it, and what each host's Postfix answered."""
    return await _answer(call, alias)  # type: ignore[arg-type]  # parsed by AliasKey


@router.patch(
    "/{alias}",
    response_model=AliasBody,
    summary="Change an alias",
    responses={**_ACCEPTED, **NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(PREFER, IF_MATCH),
)
async def change_alias(alias: AliasKey, body: ChangedAliasBody, call: CanWriteAliases) -> Response:
    """Who is no longer designated cannot send as it from this moment, in open sessions too."""
    alias_id = await call.read(service.find_alias_id, alias)  # type: ignore[arg-type]  # parsed by AliasKey
    wanted = body.model_dump(include=body.model_fields_set)
    await call.write(service.change_alias, alias_id, wanted, expected_version=expected_version(call.request))
    return await _answer(call, alias_id)


@router.delete(
    "/{alias}",
    response_model=AliasBody,
    summary="Delete an alias",
    responses={**_ACCEPTED, **NOT_FOUND, **CHANGED},
    openapi_extra=takes(PREFER, IF_MATCH),
)
async def delete_alias(alias: AliasKey, call: CanWriteAliases) -> Response:
    """Mail to it bounces, nobody sends as it, and its address is free. What led to it leads nowhere."""
    alias_id = await call.read(service.find_alias_id, alias)  # type: ignore[arg-type]  # parsed by AliasKey
    await call.write(service.delete_alias, alias_id, expected_version=expected_version(call.request))
    return await _answer(call, alias_id)
