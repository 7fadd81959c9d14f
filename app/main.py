"""create_app(): the only place where the API is wired."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.config import ApiSettings, networks
from app.credentials.links import load_link_key
from app.credentials.policy_key import load_policy_key
from app.credentials.tokens import load_keys, load_request_key
from app.db import Clock, Database, utc_now
from app.routers import (
    addresses,
    aliases,
    app_passwords,
    audit_events,
    auth_policy,
    dkim_keys,
    dns,
    domain_senders,
    domains,
    health,
    hosts,
    jobs,
    lockouts,
    locks,
    me,
    owner_tokens,
    password_resets,
    passwords,
    principals,
    problems,
    senders,
    summaries,
    tokens,
    users,
    webmail,
    well_known,
)
from app.web import docs, reset_page
from app.web.audit import Refusals
from app.web.authentication import Authenticator
from app.web.certificates import Proxies
from app.web.dependencies import Service
from app.web.middleware import RequestEnvelope
from app.web.problems import install
from app.web.throttle import Throttle
from app.web.waiting import JobWaiter

DESCRIPTION = f"""Provisions mail accounts on Postfix and Dovecot, and proves that each one works.

**Sign in** with *Authorize*: client id and secret, either way; a reload of this page forgets them.

Every change answers with the resource, its `version` and whether the host is `ready` for it; with `Prefer: wait=10` the
answer comes when it is. Errors are problems (RFC 9457) whose `type` is [a page](/problems) that says what to do.

<details><summary>Which role may do what</summary>

{docs.role_table()}

</details>"""

_TAGS = [
    {"name": "Users", "description": "Accounts with a mailbox."},
    {"name": "Passwords", "description": "New ones: by a link, by the current one, or by an administrator."},
    {"name": "App passwords", "description": "Passwords for single programs, each for some protocols."},
    {"name": "Aliases", "description": "Addresses that lead elsewhere, and who may send as them."},
    {"name": "Addresses", "description": "Free, or why not; where mail goes."},
    {"name": "Jobs", "description": "What the hosts were asked to look at."},
    {"name": "Domains", "description": "One primary, any number of virtual and relay ones."},
    {"name": "DKIM keys", "description": "Made on the hosts, published, proved, retired."},
    {"name": "Hosts", "description": "Where mailboxes lie."},
    {"name": "Lockouts", "description": "Who guesses too much, and is slowed or refused."},
    {
        "name": "Principals",
        "description": "Who may call: people and services, their roles, secrets and certificates. "
        "Which role may do what stands at the top of this page.",
    },
    {"name": "Audit", "description": "Who changed what, or tried to."},
    {"name": "Webmail", "description": "What a webmail needs of an account."},
    {"name": "Me", "description": "Who am I."},
    {"name": "Tokens", "description": "OAuth 2.0 client credentials."},
    {"name": "Health", "description": "For supervisors."},
    {"name": "Problems", "description": "What errors mean."},
]

_SECURITY = {
    "client_credentials": {
        "type": "oauth2",
        "flows": {"clientCredentials": {"tokenUrl": "/oauth/token", "scopes": {}}},
        "description": "Gets a token, good for ten minutes, and sends it as Bearer.",
    },
    "basic": {"type": "http", "scheme": "basic", "description": "Client id as the name, secret as the password."},
}

_PROBLEM = {
    "title": "Problem",
    "type": "object",
    "description": "RFC 9457.",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "description": "A page of ours that says what to do."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "remedy": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "pointer": {"type": "string"},
                    "parameter": {"type": "string"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}


def create_app(settings: ApiSettings, *, clock: Clock = utc_now) -> FastAPI:
    """The whole API. Raises KeysUnusable when there are no signing keys."""
    keys = load_keys(settings.key_directory)
    database = Database(
        settings.database_url.get_secret_value(), ca_file=settings.database_ca_file, pool_size=settings.database_pool
    )
    request_key = load_request_key(settings.key_directory)
    throttle = Throttle(database, settings, request_key, clock)
    policy_key = settings.auth_policy_key_file
    service = Service(
        settings=settings,
        database=database,
        authenticator=Authenticator(database, keys, issuer=settings.issuer, clock=clock, throttle=throttle),
        waiter=JobWaiter(database),
        request_key=request_key,
        throttle=throttle,
        policy_key=load_policy_key(policy_key) if policy_key else None,
        policy_networks=settings.policy_networks,
        link_key=load_link_key(settings.link_key_file),
        clock=clock,
    )

    refusals = Refusals(database, clock)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await refusals.close()
        await service.waiter.close()
        await database.close()

    app = build_app(settings, lifespan=lifespan)
    app.state.service = service
    app.state.refusals = refusals
    return app


def build_app(settings: ApiSettings | None = None, **options: Any) -> FastAPI:
    """Routes, error handlers and documentation, without a database: enough for the OpenAPI document."""
    app = FastAPI(
        title="cacert-mail",
        version="1",
        description=DESCRIPTION,
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        **options,
    )
    install(app)
    for module in (  # the busiest first: they are looked through in this order
        webmail,
        users,
        auth_policy,
        summaries,
        locks,
        passwords,
        password_resets,
        app_passwords,
        aliases,
        senders,
        addresses,
        jobs,
        domains,
        domain_senders,
        dkim_keys,
        dns,
        hosts,
        lockouts,
        audit_events,
        principals,
        owner_tokens,
        me,
        tokens,
        health,
        well_known,
        problems,
    ):
        app.include_router(module.router)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    docs.install(app)
    reset_page.install(app)
    if settings is not None:
        app.add_middleware(
            Proxies,
            header=settings.certificate_header,
            certificate_proxies=networks(settings.certificate_proxies),
            trusted_proxies=settings.trusted_proxies,
        )
    app.add_middleware(RequestEnvelope)
    return app


def openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        components = schema["components"]
        components["securitySchemes"] = _SECURITY
        components["schemas"]["Problem"] = _PROBLEM
        for path in schema["paths"].values():
            for operation in path.values():
                _describe_errors(operation)
                _describe_parameters(operation)
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema


def _describe_parameters(operation: dict[str, Any]) -> None:
    """A parameter that may be left out is never null, whatever Python's type says."""
    for parameter in operation.get("parameters", ()):
        schema = parameter["schema"]
        for choice in schema.pop("anyOf", ()):
            if choice != {"type": "null"}:
                schema.update(choice)


def _describe_errors(operation: dict[str, Any]) -> None:
    """The errors that every operation can have, and the permission that it needs, said where a reader looks."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    responses = operation["responses"]
    if "422" in responses:
        responses["422"] = {"description": "The request is not well formed; `errors` says where.", "content": content}
    if "application/json" in operation.get("requestBody", {}).get("content", {}):
        for status, title in (
            ("400", "The body is not JSON."),
            ("413", "It is too large."),
            ("415", "It is not called JSON."),
        ):
            responses[status] = {"description": title, "content": content}
    permission = operation.get("x-permission")
    if permission is None:
        return
    responses["401"] = {"description": "No credentials, or wrong ones.", "content": content}
    if permission != "any client":
        responses["403"] = {"description": f"The client lacks `{permission}`.", "content": content}
        operation["description"] = f"{operation.get('description', '')}\n\nNeeds `{permission}`.".strip()
    responses["503"] = {
        "description": "The database is away or too busy. Try again, best with the same Idempotency-Key.",
        "content": content,
    }
