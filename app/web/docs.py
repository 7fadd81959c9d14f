"""/docs: Swagger UI from a package's files, and nothing from any other host.

FastAPI's own helper writes an inline script, which a strict Content-Security-Policy rightly refuses; so the page is ours.
"""

from pathlib import Path

import fastapi_standalone_docs
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from app.permissions import ROLE_PERMISSIONS, Permission, Role

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

_SWAGGER = Path(fastapi_standalone_docs.__file__).parent / "static" / "swagger"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>cacert-mail</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/static/swagger-ui.css">
<link rel="stylesheet" href="/docs/style.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript. The same, for programs: <a href="/openapi.json">/openapi.json</a>.</noscript>
<script src="/docs/static/swagger-ui-bundle.js"></script>
<script src="/docs/init.js"></script>
</body>
</html>
"""

# Less air, and of an error only what it means: its body is always the same.
_STYLE = """.swagger-ui .info { margin: 24px 0 16px; }
.swagger-ui .scheme-container { padding: 12px 0; margin-bottom: 8px; }
.swagger-ui .responses-table:not(.live-responses-table) tr[data-code^="4"] .response-col_description > :not(:first-child),
.swagger-ui .responses-table:not(.live-responses-table) tr[data-code^="5"] .response-col_description > :not(:first-child),
.swagger-ui .response-col_links { display: none; }
.swagger-ui .responses-table:not(.live-responses-table) .highlight-code > pre { max-height: 16em; }
.swagger-ui .dialog-ux .modal-ux-content { max-height: 80vh; }
.swagger-ui .info details summary { cursor: pointer; }
.swagger-ui .info details table { width: auto; }
.swagger-ui .info details td, .swagger-ui .info details th { padding: 2px 10px; text-align: left; }
.swagger-ui .scope-def { display: none; }
noscript { display: block; margin: 2em; font: 1.1em sans-serif; }
"""

# Nothing is kept in the browser: an administrator's secret does not outlive the tab.
_INIT = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: -1,
  displayRequestDuration: true,
  persistAuthorization: false,
  tryItOutEnabled: false,
  validatorUrl: null,
});
"""


def role_table() -> str:
    """Which role has which permission, in Markdown, from ROLE_PERMISSIONS itself."""
    lines = ["| | " + " | ".join(Role) + " |", "|---" * (len(Role) + 1) + "|"]
    for permission in Permission:
        marks = ("✓" if permission in ROLE_PERMISSIONS[role] else "" for role in Role)
        lines.append(f"| `{permission}` | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def install(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    @app.get("/docs/init.js", include_in_schema=False)
    async def script() -> Response:
        return Response(_INIT, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    @app.get("/docs/style.css", include_in_schema=False)
    async def style() -> Response:
        return Response(_STYLE, media_type="text/css", headers={"Cache-Control": "no-cache"})

    @app.get("/openapi.json", include_in_schema=False)
    async def document(request: Request) -> Response:
        return JSONResponse(request.app.openapi(), headers={"Cache-Control": "no-cache"})

    app.mount("/docs/static", StaticFiles(directory=_SWAGGER), name="docs")
