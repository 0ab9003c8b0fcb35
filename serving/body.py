"""Reading a request's body within limits of size and time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from resprune.serving.errors import ApiError


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """The JSON body; `ApiError` for another type (415), too many bytes (413), or one that comes too slowly (408)."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # what a page of another origin cannot send without asking first
        raise ApiError(415, "the body should be JSON, with Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return await asyncio.wait_for(_read(request, max_bytes), seconds)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive in {seconds:g} seconds; send it again", code="timeout"
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before the body was whole") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body has more than {max_bytes} bytes; send smaller images", code="request_too_large"
    )
