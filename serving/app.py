"""The application: its routes, and who may use them."""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from resprune.serving.completions import Completions, find_model
from resprune.serving.errors import ApiError, error_body
from resprune.serving.metrics import CONTENT_TYPE, Metrics
from resprune.serving.model import Model

PAGE = Path(__file__).parent / "page"
# The page's parts by their address: nothing else of the disk can be asked for.
PAGE_FILES = {
    "/": "index.html",
    "/style.css": "style.css",
    "/script.js": "script.js",
    "/draw.js": "draw.js",
    "/icon.svg": "icon.svg",
}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server: with a `key` whoever sends it; `local` answers only to names of this machine."""

    key: str | None = None
    local: bool = True

    def require_key(self, request: Request) -> None:
        """`ApiError` with status 401 unless the request carries the key."""
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def require_host(self, request: Request) -> None:
        """`ApiError` with status 403 for a foreign name that leads here (DNS rebinding by a page on the internet)."""
        if self.local and not is_local(request.headers.get("host", "")):
            raise ApiError(
                403,
                "this server answers only to names of its own machine; start it with --host and a key for others",
                code="host_not_allowed",
            )


def is_local(host: str) -> bool:
    """Whether a Host header names this machine: `localhost:8080`, `127.0.0.1`, `[::1]:8080`."""
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    name = name.strip("[]").lower()
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def make_app(
    models: Mapping[str, Model], completions: Completions, metrics: Metrics, access: Access
) -> FastAPI:
    """The ASGI application that serves `models`, each under its name."""
    app = FastAPI(
        title="resprune",
        docs_url=None,  # FastAPI's pages load their scripts from the internet
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(access.require_host)],
    )
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _fail)

    for address, name in PAGE_FILES.items():
        app.get(address, include_in_schema=False)(_page_file(name))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    guarded = APIRouter(dependencies=[Depends(access.require_key)])

    @guarded.get("/metrics")
    def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @guarded.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.describe() for model in models.values()]}

    @guarded.get("/v1/models/{name}")
    def one_model(name: str) -> dict[str, Any]:
        return find_model(models, name).describe()

    @guarded.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> Response:
        return await completions.answer(request)

    app.include_router(guarded)
    return app


def _page_file(name: str) -> Callable[[], FileResponse]:
    return lambda: FileResponse(PAGE / name, headers=PAGE_HEADERS)


def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _refuse_http(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)


def _fail(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body("the server failed; its log says how", "server_error"), 500)
