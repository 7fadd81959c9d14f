"""What other mail servers and mail programs fetch by HTTP: the MTA-STS policy, and Thunderbird's autoconfig."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.routers.shapes import NOT_FOUND
from app.services import dns as service
from app.web.dependencies import PUBLIC, Route, Service

router = APIRouter(tags=["Domains"], route_class=Route, dependencies=[PUBLIC])

_FOR_A_WHILE = {"Cache-Control": "public, max-age=300"}


def _host(request: Request) -> str:
    """The name that was asked, without the port. It only chooses between our domains, all of which are public."""
    return request.headers.get("host", "").partition(":")[0].lower()


@router.get(
    "/.well-known/mta-sts.txt",
    response_class=Response,
    summary="The MTA-STS policy of a domain",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **NOT_FOUND},
)
async def get_mta_sts_policy(request: Request) -> Response:
    """By the name that is asked: `mta-sts.DOMAIN` (RFC 8461). The domain's settings have it."""
    ours: Service = request.app.state.service
    policy = await ours.database.reading(service.read_policy, _host(request))
    return Response(policy, media_type="text/plain", headers=_FOR_A_WHILE)


_XML = {200: {"content": {"text/xml": {"schema": {"type": "string"}}}}, **NOT_FOUND}
_Address = Annotated[str, Query(alias="emailaddress", max_length=320, description="Whose account is set up.")]


@router.get("/mail/config-v1.1.xml", response_class=Response, summary="Autoconfig for Thunderbird", responses=_XML)
@router.get(
    "/.well-known/autoconfig/mail/config-v1.1.xml",
    response_class=Response,
    name="get_autoconfig_of_website",
    summary="The same, where the domain's own website hands it on",
    responses=_XML,
)
async def get_autoconfig(request: Request, address: _Address = "") -> Response:
    """By the name that is asked, `autoconfig.DOMAIN` or `DOMAIN`; else by the address. Tells nothing about accounts."""
    ours: Service = request.app.state.service
    config = await ours.database.reading(service.read_autoconfig, _host(request), address)
    return Response(config, media_type="text/xml", headers=_FOR_A_WHILE)
