"""Client certificates, as a proxy hands them on, and the headers of everybody else."""

import base64
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy import select

from app.config import ApiSettings, networks
from app.db import Database
from app.main import create_app
from app.models.audit_events import audit_events
from app.permissions import Role
from app.services.changes import Change
from app.services.principals import add_certificate, change_principal, create_principal, end_key, list_keys
from app.web.certificates import read_certificate, within
from tests.conftest import ACTOR, Clock
from tests.routers.accounts import make_user
from tests.web.certificates import START, as_nginx, as_rfc9440, certificate

pytestmark = pytest.mark.asyncio

PROXY, DIRECT = "192.0.2.10", "192.0.2.66"
GRANT = {"grant_type": "client_credentials"}


@dataclass
class Site:
    api: FastAPI
    database: Database
    clock: Clock
    client_id: str
    secret: str
    pem: str
    der: bytes

    @property
    def shown(self) -> dict[str, str]:
        return {"Client-Cert": as_rfc9440(self.der)}

    @asynccontextmanager
    async def at(self, peer: str = PROXY) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.api, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="https://mail.cacert.test") as client:
            yield client

    async def change(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        async with self.database.write.begin() as connection:
            return await function(Change(connection, ACTOR, self.clock()), *args, **options)

    async def refused(self) -> list[Any]:
        async with self.database.read.connect() as connection:
            return list(await connection.execute(select(audit_events).where(audit_events.c.outcome == "refused")))


@pytest_asyncio.fixture
async def site(settings: ApiSettings, seeded: Database, clock: Clock) -> AsyncIterator[Site]:
    """With a proxy that ends TLS, and a webmail that has a certificate registered."""
    proxied = settings.model_copy(update={"certificate_proxies": f"{PROXY}, ::1", "trusted_proxies": f"{PROXY},::1"})
    app = create_app(proxied, clock=clock)
    pem, der, _ = certificate("webmail")
    async with app.router.lifespan_context(app):
        site = Site(app, seeded, clock, "", "", pem, der)
        site.client_id, site.secret = await site.change(create_principal, "Webmail", Role.WEBMAIL)
        await site.change(add_certificate, site.client_id, hashlib.sha256(der).hexdigest())
        yield site


@pytest.mark.parametrize("form", ["rfc9440", "nginx", "pem"])
async def test_a_registered_certificate_is_enough(site: Site, form: str) -> None:
    if form == "pem":
        header = site.pem.replace("\n", "%0A")
    else:
        header = as_rfc9440(site.der) if form == "rfc9440" else as_nginx(site.pem)
    async with site.at() as client:
        me = await client.get("/v1/me", headers={"Client-Cert": header})
    assert (me.status_code, me.json()["id"], me.json()["role"]) == (200, site.client_id, "webmail")


async def test_one_that_nobody_registered_is_nobodys(site: Site) -> None:
    _, der, _ = certificate("webmail")  # of the same name
    async with site.at() as client:
        answer = await client.get("/v1/me", headers={"Client-Cert": as_rfc9440(der)})
        grant = await client.post(
            "/oauth/token", data={**GRANT, "client_id": site.client_id}, headers={"Client-Cert": as_rfc9440(der)}
        )
    assert (answer.status_code, grant.status_code, grant.json()["error"]) == (401, 401, "invalid_client")


async def test_no_certificate_and_no_credentials(site: Site) -> None:
    async with site.at() as client:
        for headers in ({}, {"Client-Cert": ""}):
            assert (await client.get("/v1/me", headers=headers)).status_code == 401
            grant = await client.post("/oauth/token", data={**GRANT, "client_id": site.client_id}, headers=headers)
            assert grant.status_code == 401


async def test_a_header_from_anywhere_else_is_refused_and_recorded(site: Site) -> None:
    attempts = [
        ("GET", "/v1/me", site.shown),
        ("GET", "/livez", site.shown),
        ("GET", "/nowhere", {"Client-Cert": ""}),
        ("POST", "/oauth/token", {"CLIENT-CERT": as_nginx(site.pem)}),
        # With somebody else's right secret, and in the name of the proxy.
        ("GET", "/v1/me", {**site.shown, "Authorization": basic(site.client_id, site.secret)}),
        ("GET", "/v1/me", {**site.shown, "X-Forwarded-For": PROXY, "Forwarded": f"for={PROXY}"}),
    ]
    async with site.at(DIRECT) as client:
        for method, path, headers in attempts:
            answer = await client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forged-certificate"), path
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert (await client.get("/v1/me", headers={"Authorization": basic(site.client_id, site.secret)})).is_success
    recorded = await site.refused()
    assert [event.problem for event in recorded] == ["forged-certificate"] * len(attempts)
    assert {event.client_address for event in recorded} == {DIRECT}
    assert site.client_id not in str(recorded)


async def test_behind_the_trusted_proxy_the_peer_counts_and_not_whom_it_speaks_for(site: Site) -> None:
    async with site.at() as client:
        me = await client.get("/v1/me", headers={**site.shown, "X-Forwarded-For": DIRECT})
        assert me.status_code == 200
        await site.change(change_principal, site.client_id, {"networks": [f"{DIRECT}/32"]})
    async with site.at("127.0.0.1") as client:
        forged = await client.get("/v1/me", headers={**site.shown, "X-Forwarded-For": PROXY})
        assert forged.status_code == 403


async def test_without_proxies_in_the_settings_everybody_is_anywhere_else(api: FastAPI) -> None:
    _, der, _ = certificate("x")
    transport = httpx.ASGITransport(api, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="https://mail.cacert.test") as client:
        answer = await client.get("/livez", headers={"Client-Cert": as_rfc9440(der)})
        assert answer.json()["type"] == "/problems/forged-certificate"


@pytest.mark.parametrize(
    "value",
    [
        "x",
        ":",
        "::",
        ":!:",
        ":AAAA:",
        "-----BEGIN CERTIFICATE-----",
        "%2D",
        "(null)",
        ":" + "A" * 9000 + ":",
        "\xff",
        "%ff",
    ],
)
async def test_what_the_proxy_hands_on_must_be_readable(site: Site, value: str) -> None:
    async with site.at() as client:
        answer = await client.get("/v1/me", headers=[(b"client-cert", value.encode("latin-1"))])
        assert (answer.status_code, answer.json()["type"]) == (401, "/problems/unauthenticated")


async def test_two_headers_are_none(site: Site) -> None:
    value = as_rfc9440(site.der).encode()
    async with site.at() as client:
        answer = await client.get("/v1/me", headers=[(b"client-cert", value), (b"client-cert", value)])
        assert answer.status_code == 401


async def test_a_token_by_certificate_is_bound_to_it(site: Site) -> None:
    _, other, _ = certificate("other")
    await site.change(add_certificate, site.client_id, hashlib.sha256(other).hexdigest())
    async with site.at() as client:
        grant = await client.post("/oauth/token", data={**GRANT, "client_id": site.client_id}, headers=site.shown)
        assert grant.status_code == 200, grant.text
        token = grant.json()["access_token"]
        bearer = {"Authorization": f"Bearer {token}"}
        claims = base64.urlsafe_b64decode(token.split(".")[1] + "==").decode()
        thumbprint = base64.urlsafe_b64encode(hashlib.sha256(site.der).digest()).rstrip(b"=").decode()
        assert f'"cnf":{{"x5t#S256":"{thumbprint}"}}' in claims
        assert (await client.get("/v1/me", headers={**bearer, **site.shown})).status_code == 200
        assert (await client.get("/v1/me", headers=bearer)).status_code == 401, "without it"
        with_other = {**bearer, "Client-Cert": as_rfc9440(other)}
        assert (await client.get("/v1/me", headers=with_other)).status_code == 401, "another of the same client"
    async with site.at(DIRECT) as thief:
        assert (await thief.get("/v1/me", headers=bearer)).status_code == 401
        assert (await thief.get("/v1/me", headers={**bearer, **site.shown})).status_code == 403


async def test_so_is_an_owners_token(site: Site, client: httpx.AsyncClient) -> None:
    user = await make_user(client, "alice")
    async with site.at() as webmail:
        made = await webmail.post(f"/v1/users/{user['id']}/owner-tokens", headers=site.shown)
        assert made.status_code == 201, made.text
        bearer = {"Authorization": f"Bearer {made.json()['access_token']}"}
        assert (await webmail.get(f"/v1/users/{user['id']}", headers={**bearer, **site.shown})).status_code == 200
        assert (await webmail.get(f"/v1/users/{user['id']}", headers=bearer)).status_code == 401
        # Also one that was got with a bound token, and none that was got by secret.
        grant = await webmail.post("/oauth/token", data={**GRANT, "client_id": site.client_id}, headers=site.shown)
        bound = {"Authorization": f"Bearer {grant.json()['access_token']}", **site.shown}
        made = await webmail.post(f"/v1/users/{user['id']}/owner-tokens", headers=bound)
        bearer = {"Authorization": f"Bearer {made.json()['access_token']}"}
        assert (await webmail.get("/v1/me", headers=bearer)).status_code == 401
        made = await webmail.post(f"/v1/users/{user['id']}/owner-tokens", auth=(site.client_id, site.secret))
        bearer = {"Authorization": f"Bearer {made.json()['access_token']}"}
        assert (await webmail.get("/v1/me", headers=bearer)).status_code == 200


async def test_the_client_id_must_be_the_certificates(site: Site) -> None:
    other_id, _ = await site.change(create_principal, "Administrator", Role.PRIMARY)
    async with site.at() as client:
        for named in (other_id, "primary-000000000000", ""):
            grant = await client.post("/oauth/token", data={**GRANT, "client_id": named}, headers=site.shown)
            assert grant.status_code == 401, named
        wrong = {**GRANT, "client_id": site.client_id, "client_secret": "wrong"}
        assert (await client.post("/oauth/token", data=wrong, headers=site.shown)).status_code == 401


@pytest.mark.parametrize("ending", ["key", "disabled", "expired", "networks"])
async def test_it_ends_within_two_seconds_and_so_does_its_token(site: Site, clock: Clock, ending: str) -> None:
    async with site.at() as client:
        grant = await client.post("/oauth/token", data={**GRANT, "client_id": site.client_id}, headers=site.shown)
        bearer = {"Authorization": f"Bearer {grant.json()['access_token']}", **site.shown}
        async with site.database.read.connect() as connection:
            keys = (await list_keys(connection, [site.client_id]))[site.client_id]
        match ending:
            case "key":
                await site.change(end_key, site.client_id, keys[1].id)
            case "disabled":
                await site.change(change_principal, site.client_id, {"state": "disabled"})
            case "expired":
                await site.change(change_principal, site.client_id, {"expires_at": clock.now})
            case "networks":
                await site.change(change_principal, site.client_id, {"networks": ["198.51.100.0/24"]})
        clock.forward(seconds=2)
        assert (await client.get("/v1/me", headers=site.shown)).status_code == 401
        assert (await client.get("/v1/me", headers=bearer)).status_code == 401
        by_secret = await client.get("/v1/me", auth=(site.client_id, site.secret))
        assert by_secret.status_code == (200 if ending == "key" else 401)


@pytest.mark.parametrize("when", ["early", "late"])
async def test_its_own_dates_count(site: Site, clock: Clock, when: str) -> None:
    start, end = clock.now - timedelta(days=1), clock.now + timedelta(seconds=300)
    if when == "early":
        start, end = clock.now + timedelta(seconds=300), clock.now + timedelta(days=9)
    _, der, _ = certificate("brief", not_before=start, not_after=end)
    await site.change(add_certificate, site.client_id, hashlib.sha256(der).hexdigest())
    shown = {"Client-Cert": as_rfc9440(der)}
    async with site.at() as client:
        if when == "early":
            assert (await client.get("/v1/me", headers=shown)).status_code == 401
            clock.forward(seconds=300)
            assert (await client.get("/v1/me", headers=shown)).status_code == 200
            return
        grant = await client.post("/oauth/token", data={**GRANT, "client_id": site.client_id}, headers=shown)
        bearer = {"Authorization": f"Bearer {grant.json()['access_token']}", **shown}
        assert (await client.get("/v1/me", headers=bearer)).status_code == 200
        clock.forward(seconds=301)
        assert (await client.get("/v1/me", headers=shown)).status_code == 401
        assert (await client.get("/v1/me", headers=bearer)).status_code == 401


async def test_another_header_may_be_chosen(settings: ApiSettings, seeded: Database, clock: Clock, site: Site) -> None:
    other = settings.model_copy(update={"certificate_proxies": PROXY, "certificate_header": "X-SSL-Cert"})
    site.api = create_app(other, clock=clock)
    async with site.api.router.lifespan_context(site.api):
        async with site.at() as client:
            assert (await client.get("/v1/me", headers={"X-SSL-Cert": as_nginx(site.pem)})).status_code == 200
            assert (await client.get("/v1/me", headers=site.shown)).status_code == 401, "that one says nothing now"
        async with site.at(DIRECT) as client:
            assert (await client.get("/v1/me", headers={"x-ssl-cert": as_nginx(site.pem)})).status_code == 403


@pytest.mark.parametrize("form", [as_nginx, str])
async def test_in_pem_it_is_the_same_certificate(site: Site, form: Callable[[str], str]) -> None:
    read = read_certificate(form(site.pem).encode())
    assert (read.fingerprint, read.not_before) == (hashlib.sha256(site.der).hexdigest(), START)


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("192.0.2.1", True),
        ("::ffff:192.0.2.1", True),
        ("192.0.3.1", False),
        ("2001:db8::1%eth0", True),
        ("2001:db9::1", False),
        ("", False),
        ("192.0.2.1, 192.0.2.2", False),
    ],
)
async def test_whether_an_address_is_within(address: str, inside: bool) -> None:
    assert within(address, networks("192.0.2.0/24, 2001:db8::/32")) is inside


async def test_a_proxy_that_is_no_network_is_a_wrong_setting() -> None:
    for members in ({"certificate_proxies": "proxy.example.org"}, {"certificate_header": "Client Cert"}):
        with pytest.raises(ValidationError):
            ApiSettings(**members)


def basic(client_id: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()


@pytest.mark.parametrize("member", ["trusted_proxies", "certificate_proxies", "shared_sources", "auth_policy_networks"])
async def test_everybody_is_no_proxy(member: str) -> None:
    """With `*` every client would choose its own address."""
    with pytest.raises(ValidationError):
        ApiSettings.model_validate({member: "*"})
