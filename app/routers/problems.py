"""/problems: a page for each `type` that a problem answer can have."""

import html
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import HTMLResponse

from app.errors import NotFound
from app.routers.shapes import NOT_FOUND
from app.web.dependencies import PUBLIC, Route
from app.web.problems import CATALOGUE, problem_page

router = APIRouter(prefix="/problems", tags=["Problems"], route_class=Route, dependencies=[PUBLIC])


@router.get("", response_class=HTMLResponse, summary="All problems")
async def list_problems() -> HTMLResponse:
    """A page for people, with a link to each."""
    rows = "".join(
        f'<li><a href="/problems/{slug}">{html.escape(problem.title)}</a> ({problem.status})</li>'
        for slug, problem in sorted(CATALOGUE.items())
    )
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Problems</title><h1>Problems</h1><ul>{rows}</ul></html>'
    )


@router.get("/{slug}", response_class=HTMLResponse, summary="What a problem means, and what to do", responses=NOT_FOUND)
async def get_problem(
    slug: Annotated[str, Path(max_length=64, description="The last part of a problem's `type`.")],
) -> HTMLResponse:
    """A page for people: what happened, what to do, and a `curl` line."""
    problem = CATALOGUE.get(slug)
    if problem is None:
        raise NotFound("There is no such problem. /problems lists them all.")
    return HTMLResponse(problem_page(problem))
