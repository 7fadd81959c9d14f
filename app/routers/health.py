"""/livez and /readyz, for supervisors and load balancers."""

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from app.models.schema import check_schema
from app.routers.shapes import problem
from app.web.dependencies import PUBLIC, Route, Service

router = APIRouter(tags=["Health"], route_class=Route, dependencies=[PUBLIC])


class HealthBody(BaseModel):
    status: str


@router.get("/livez", response_model=HealthBody, summary="Is the process alive?")
async def live() -> HealthBody:
    """Always, as long as it answers."""
    return HealthBody(status="ok")


@router.get(
    "/readyz",
    response_model=HealthBody,
    summary="Can it do its work?",
    responses={503: problem("It cannot.")},
)
async def ready(request: Request) -> Response | HealthBody:
    """The database answers and has our schema."""
    service: Service = request.app.state.service
    await service.database.reading(check_schema)
    return HealthBody(status="ok")
