"""/v1/domains/{domain}/dkim-keys: what signs the mail of a domain, and what the DNS says of it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.addresses import DomainName, Selector
from app.config import DnsSettings
from app.dns.ask import MOST, DnsUnclear, all_say, ask_all, find_servers
from app.dns.records import Record, dkim_name
from app.errors import DkimStepNotNow
from app.models.dkim_keys import Algorithm, DkimState
from app.models.jobs import JobRow
from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    NOT_FOUND,
    PREFER,
    CanReadDkimKeys,
    CanWriteDkimKeys,
    HostName,
    ProofBody,
    takes,
)
from app.services import dkim_keys as service
from app.services.changes import Change
from app.services.domains import domain_settings
from app.web.answers import JobBody, answer, encode, job_body, settled
from app.web.conditional import etag, expected_version
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NumberCursor, page_response

router = APIRouter(prefix="/v1/domains/{domain}/dkim-keys", tags=["DKIM keys"], route_class=Route)

Domain = Annotated[DomainName, Path(description="The domain.")]
Key = Annotated[Selector, Path(description="The key's selector.")]

_VALUES_SHOWN = 20
"""Of what one name server answers. Whoever has that zone decides how much it is."""


class DkimRecordBody(BaseModel):
    name: str
    type: str
    value: str = Field(description="The whole text, without quotes.")
    zone: str = Field(description="As a line of a zone file, in parts of at most 255 characters.")


class DkimAnswerBody(BaseModel):
    """Of one name server."""

    server: str
    address: str
    values: list[str] | None = Field(description="Null: it did not say.")
    problem: str | None
    same: bool = Field(description="It answers with `record`, and nothing else.")


class DkimDnsBody(BaseModel):
    """What the name servers of the zone say, each of them, asked for this very answer."""

    same: bool = Field(
        description="All of them were asked, and each answers with exactly `record`; or, without one, nothing."
    )
    problem: str | None = Field(description="Why it is not the same.")
    asked_at: datetime
    answers: list[DkimAnswerBody]


class DkimKeyBody(BaseModel):
    id: int
    domain: str
    host: str = Field(description="It alone has the private key.")
    selector: str
    algorithm: Algorithm
    state: DkimState
    activate: bool = Field(description="It becomes active as soon as it is published.")
    next_step: str
    problem: str | None = Field(description="What stands in the way of the next step.")
    record: DkimRecordBody | None = Field(
        description="What the DNS should say; null before it is made, and at the end."
    )
    dns: DkimDnsBody | None = Field(description="Only where one key is read.")
    version: int
    created_at: datetime
    updated_at: datetime
    generated_at: datetime | None
    published_at: datetime | None
    active_at: datetime | None
    probed_at: datetime | None = Field(
        description="When a message signed with it was sent last, to see whether it verifies."
    )
    proved_at: datetime | None = Field(description="When one came back and did.")
    retiring_at: datetime | None
    revoked_at: datetime | None
    removed_at: datetime | None
    due_at: datetime | None = Field(description="When the next step is, if it waits for a time.")
    checked_at: datetime | None = Field(description="When the service process looked last.")
    ready: bool = Field(description="Its host has done what this version asks.")
    proofs: dict[str, ProofBody]
    job: JobBody | None

    @staticmethod
    def of(row: Any, job: JobRow | None, dns: DkimDnsBody | None = None) -> "DkimKeyBody":
        ready = _is_ready(row)
        times = (
            "generated",
            "published",
            "active",
            "probed",
            "proved",
            "retiring",
            "revoked",
            "removed",
            "due",
            "checked",
        )
        return DkimKeyBody.model_construct(
            id=row.id,
            domain=row.domain,
            host=row.host,
            selector=row.selector,
            algorithm=Algorithm(row.algorithm),
            state=DkimState(row.state),
            activate=row.activate,
            next_step=service.next_step(row, domain_settings(row.settings).publisher),
            problem=row.problem,
            record=_record_body(service.record_of(row)),
            dns=dns,
            version=row.version,
            created_at=row.created_at,
            updated_at=row.updated_at,
            **{f"{name}_at": getattr(row, f"{name}_at") for name in times},
            ready=ready,
            proofs={name: ProofBody(**proof) for name, proof in (row.proofs or {}).items()},
            job=None if ready or job is None else JobBody(**job_body(job)),
        )


class DkimKeyList(BaseModel):
    items: list[DkimKeyBody]
    next_cursor: str | None


class NewDkimKeyBody(BaseModel):
    """All of it may be left out."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"algorithm": "rsa-2048", "activate": True}]}
    )

    host: HostName | None = Field(None, description="Null: the only one that is enabled.")
    selector: Selector | None = Field(None, description="Null: one is made of year, month and a letter.")
    algorithm: Algorithm = Algorithm.RSA_2048
    activate: bool = Field(False, description="It becomes active as soon as all name servers have it.")
    public_key: Annotated[str, Field(max_length=1024)] | None = Field(
        None,
        description="Of a key that is in place on the host already, as `cacert-mail dkim adopt` puts it: what `p=` of its "
        "record says. Null: the host makes one.",
    )


class DkimRotationBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{}]})

    host: HostName | None = Field(None, description="Null: each that is enabled, or signs for the domain.")
    algorithm: Algorithm | None = Field(
        None, description="Null: as those that are active there; RSA 2048 where none is."
    )


_ALL = DkimRotationBody()


def _is_ready(row: Any) -> bool:
    failed = any(proof["result"] == "failed" for proof in (row.proofs or {}).values())
    return row.applied_version == row.version and not failed


def _record_body(record: Record | None) -> DkimRecordBody | None:
    if record is None:
        return None
    return DkimRecordBody(name=record.name, type=record.type, value=record.value, zone=record.zone_line)


async def _ask(row: Any, settings: DnsSettings, now: datetime) -> DkimDnsBody | None:
    """Never raises. None: there is nothing yet that it could say."""
    record = service.record_of(row)
    if record is None and row.state == DkimState.GENERATING:
        return None
    name = dkim_name(row.selector, row.domain)
    wanted = [] if record is None else [record.value]
    try:
        async with asyncio.timeout(2 * settings.dns_seconds):
            answers = await ask_all(await find_servers(name, settings), name, "TXT", settings)
    except DnsUnclear as error:
        return DkimDnsBody(same=False, problem=str(error), asked_at=now, answers=[])
    except TimeoutError:
        problem = f"The name servers of {row.domain} did not answer in time."
        return DkimDnsBody(same=False, problem=problem, asked_at=now, answers=[])
    difference = all_say(answers, wanted)
    bodies = [
        DkimAnswerBody(
            server=each.server.name,
            address=each.server.address,
            values=None if each.values is None else [value[: 2 * MOST] for value in each.values[:_VALUES_SHOWN]],
            problem=each.problem,
            same=all_say([each], wanted) is None,
        )
        for each in answers
    ]
    return DkimDnsBody(same=difference is None, problem=difference, asked_at=now, answers=bodies)


@dataclass(frozen=True, slots=True)
class Found:
    """For `settled`."""

    row: Any
    job: JobRow | None

    @property
    def ready(self) -> bool:
        return _is_ready(self.row)


async def _answer(call: Call, domain: DomainName, key: Selector | int, *, created: bool = False) -> Response:
    async def read() -> Found:
        row = await call.read(service.get_dkim_key, domain, key)
        return Found(row, (await call.read(service.latest_jobs, [row])).get(row.id))

    found, waited = await settled(call, read)
    row, reading = found.row, call.request.method == "GET"
    now = call.service.clock()
    dns = await _ask(row, call.service.settings, now) if reading else None
    return answer(
        call,
        DkimKeyBody.of(row, found.job, dns),
        status=200 if reading or (found.ready and not created) else 201 if found.ready else 202,
        # The second half is the time: what the DNS says is never known to be as it was. If-Match compares the first.
        tag=etag(row.version, int(now.timestamp() * 1000)),
        job=None if found.ready else found.job,
        location=f"/v1/domains/{row.domain}/dkim-keys/{row.selector}" if created else None,
        waited=waited,
    )


async def _bodies(call: Call, rows: Sequence[Any]) -> list[DkimKeyBody]:
    latest = await call.read(service.latest_jobs, rows) if rows else {}
    return [DkimKeyBody.of(row, latest.get(row.id)) for row in rows]


_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": DkimKeyBody, "description": "Accepted; its host has not made it so yet."}
}


@router.post(
    "",
    status_code=201,
    response_model=DkimKeyBody,
    summary="Make a DKIM key",
    responses={**_ACCEPTED, **NOT_FOUND, **CONFLICT},
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY),
)
async def create_dkim_key(domain: Domain, body: NewDkimKeyBody, call: CanWriteDkimKeys) -> Response:
    """The host makes the private key, which never leaves it. Signs nothing before it is published and activated."""
    key_id = await call.write(
        service.create_dkim_key,
        domain,
        host=body.host,
        selector=body.selector,
        algorithm=body.algorithm,
        activate=body.activate,
        public_key=body.public_key,
    )
    return await _answer(call, domain, key_id, created=True)


@router.get("", response_model=DkimKeyList, summary="List the DKIM keys of a domain", responses=NOT_FOUND)
async def list_dkim_keys(
    domain: Domain,
    call: CanReadDkimKeys,
    state: Annotated[DkimState | None, Query(description="Only in this state.")] = None,
    host: Annotated[HostName | None, Query(description="Only of this host.")] = None,
    limit: Limit = 50,
    cursor: NumberCursor = None,
) -> Response:
    """In the order in which they were made, those too that are gone: no selector is used twice."""
    after = int(cursor) if cursor else None
    rows = await call.read(service.list_dkim_keys, domain, state=state, host=host, after=after, limit=limit)
    return page_response(call.request, await _bodies(call, rows), rows[-1].id if rows else None, limit)


@router.post(
    "/rotate",
    status_code=202,
    response_model=DkimKeyList,
    summary="Rotate the DKIM keys of a domain",
    responses={**NOT_FOUND, **CONFLICT},
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def rotate_dkim_keys(domain: Domain, call: CanWriteDkimKeys, body: DkimRotationBody = _ALL) -> Response:
    """New keys are made, published and activated; once mail signed with them was seen to verify, **the old ones retire**, are
    revoked and removed, all by itself. The answer lists the new ones; each says in `next_step` how far it is."""

    async def rotate(change: Change) -> str:
        made = await service.rotate_dkim_keys(change, domain, host=body.host, algorithm=body.algorithm)
        return ",".join(map(str, made))  # what an Idempotency-Key can remember

    ids = [int(each) for each in (await call.write(rotate)).split(",")]
    rows = await call.read(service.list_dkim_keys, domain, ids=ids, limit=len(ids))
    items = await _bodies(call, rows)
    monitors = [f'<{item.job.url}>; rel="monitor"' for item in items if item.job is not None]
    headers = {"Link": ", ".join(monitors)} if monitors else {}
    if call.replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(encode({"items": items, "next_cursor": None}), 202, headers, "application/json")


@router.get(
    "/{selector}",
    response_model=DkimKeyBody,
    summary="Read a DKIM key, and what the DNS says of it now",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **NOT_FOUND, **CONFLICT},
    openapi_extra=takes(PREFER),
)
async def get_dkim_key(
    domain: Domain,
    selector: Key,
    call: CanReadDkimKeys,
    form: Annotated[
        Literal["json", "zone"], Query(alias="format", description="`zone`: its record as a line of a zone file.")
    ] = "json",
) -> Response:
    """Every name server of the zone is asked for this answer, which may take some seconds."""
    if form == "json":
        return await _answer(call, domain, selector)
    row = await call.read(service.get_dkim_key, domain, selector)
    record = service.record_of(row)
    if record is None:
        raise DkimStepNotNow(f"The key {selector} is {row.state}: it has no record.", state=row.state)
    return Response(f"{record.zone_line}\n", media_type="text/plain")


@router.post(
    "/{selector}/activate",
    response_model=DkimKeyBody,
    summary="Activate a DKIM key",
    responses={**_ACCEPTED, **NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY, IF_MATCH),
)
async def activate_dkim_key(domain: Domain, selector: Key, call: CanWriteDkimKeys) -> Response:
    """As soon as every name server has its record it signs, and replaces the host's other keys of its kind."""
    version = expected_version(call.request)
    await call.write(service.activate_dkim_key, domain, selector, expected_version=version)
    return await _answer(call, domain, selector)


@router.delete(
    "/{selector}",
    response_model=DkimKeyBody,
    summary="Give up a DKIM key that never took over",
    responses={**_ACCEPTED, **NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(PREFER, IF_MATCH),
)
async def delete_dkim_key(domain: Domain, selector: Key, call: CanWriteDkimKeys) -> Response:
    """Its record is taken out of the DNS, and its private key off the host. **Never the active one**: rotate
    instead. Only where its host is gone for good (not enabled, and silent for an hour) does an active one retire."""
    version = expected_version(call.request)
    await call.write(service.delete_dkim_key, domain, selector, expected_version=version)
    return await _answer(call, domain, selector)
