"""/v1/users/{user}/summary: for those who help with resets and may see nothing else."""

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.models.users import UserState
from app.routers.shapes import NOT_FOUND, CanSummarizeUsers, UserKey
from app.services.password_resets import masked, summarize_user
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/users/{user}/summary", tags=["Users"], route_class=Route)


class SummaryBody(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 17,
                    "address": "alice@cacert.org",
                    "display_name": "Alice Example",
                    "state": "active",
                    "locked": False,
                    "contact_address": "a•••@e•••.net",
                    "may_reset": True,
                    "why_not": None,
                }
            ]
        }
    )

    id: int
    address: str
    display_name: str
    state: UserState
    locked: bool
    contact_address: str | None = Field(description="Masked: enough for who knows it to recognise it.")
    may_reset: bool = Field(description="Whether you may have a link mailed.")
    why_not: str | None


@router.get(
    "", response_model=SummaryBody, summary="Read just enough of an account to reset its password", responses=NOT_FOUND
)
async def get_summary(user: UserKey, call: CanSummarizeUsers) -> Response:
    """Whose it is, where a link would go, and what stands in the way."""
    summary = await call.read(summarize_user, user, call.principal.rank)  # type: ignore[arg-type]  # parsed by UserKey
    account = summary.account
    body = SummaryBody(
        id=account.id,
        address=account.address,
        display_name=account.display_name,
        state=account.state,
        locked=account.locked_at is not None,
        contact_address=masked(account.contact_address),
        may_reset=summary.why_not is None,
        why_not=summary.why_not,
    )
    return answer(call, body)
