"""/livez and /readyz, for supervisors and load balancers."""

from fastapi import APIRouter, Request
from pydantic import BaseModel
from sqlalchemy import text
from starlette.responses import Response

from app.errors import Unavailable
from app.web.dependencies import PUBLIC, Route, Service

router = APIRouter(tags=["Health"], route_class=Route, dependencies=[PUBLIC])


class HealthBody(BaseModel):
    status: str


@router.get("/livez", response_model=HealthBody, summary="Is the process alive?")
async def live() -> HealthBody:
    """Always, as long as it answers."""
    return HealthBody(status="ok")


@router.get("/readyz", response_model=HealthBody, summary="Can it do its work?")
async def ready(request: Request) -> Response | HealthBody:
    """The database answers and has our schema."""
    service: Service = request.app.state.service
    try:
        async with service.database.read.connect() as connection:
            await connection.execute(text("SELECT version_num FROM alembic_version"))
    except Exception as error:
        raise Unavailable("The database does not answer, or has no schema: run `cacert-mail db upgrade`.") from error
    return HealthBody(status="ok")
