"""/reset: where a mailed link leads. The owner chooses a password; it loads nothing from elsewhere, and keeps nothing.

The token stands in the fragment, which browsers send to nobody. The page takes it out of the address bar at once, and sends it
in the body of `POST /v1/password-resets/confirm` alone. Addresses in it are relative, so it works below any path.
"""

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.responses import Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
}

_FOLDER = Path(__file__).parent
_PAGE, _SCRIPT, _STYLE = (_FOLDER.joinpath(name).read_text() for name in ("page.html", "page.js", "style.css"))


def install(app: FastAPI) -> None:
    @app.get("/reset", include_in_schema=False)
    async def reset_page(request: Request) -> Response:
        minimum = request.app.state.service.settings.password_min_length
        return HTMLResponse(_PAGE.replace("MINIMUM", str(minimum)), headers=HEADERS)

    @app.get("/reset/page.js", include_in_schema=False)
    async def reset_script() -> Response:
        return Response(_SCRIPT, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    @app.get("/reset/style.css", include_in_schema=False)
    async def reset_style() -> Response:
        return Response(_STYLE, media_type="text/css", headers={"Cache-Control": "no-cache"})
