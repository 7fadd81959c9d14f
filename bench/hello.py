"""The API with one more route, `/hello`, that does nothing: what a request costs before anything of ours is done.

Runs `cacert-mail api` itself, so that middleware, server and options are the same. The route is the first, a plain one
as in FastAPI's tutorial, with a ready-made answer: the fastest that this application can have, and so the hardest base.
"""

import sys

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.responses import Response

import app.main
from app.cli.main import main
from app.config import ApiSettings
from app.db import Clock, utc_now

_create_app = app.main.create_app


async def hello() -> Response:
    return Response(b'{"hello":"world"}', media_type="application/json")


def with_hello(settings: ApiSettings, *, clock: Clock = utc_now) -> FastAPI:
    api = _create_app(settings, clock=clock)
    api.router.routes.insert(0, APIRoute("/hello", hello))
    return api


if __name__ == "__main__":
    app.main.create_app = with_hello  # the command imports it when it runs
    sys.argv[1:] = ["api"]
    main()
