"""Errors of the API in OpenAI's form: https://platform.openai.com/docs/guides/error-codes."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from resprune.runtime.errors import printable

# What pydantic calls a fault, and what OpenAI calls it; anything else is an `invalid_value`.
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "union_tag_not_found": "missing_required_parameter",
}


class ApiError(Exception):
    """A request that is refused: `status` is the HTTP status, the rest is the body's `error` object.

    `param` is the field that is wrong, such as `messages[0].content`; `headers` go into the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(" ".join(printable(message).split()))  # names that a client made up stand in some
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return error_body(str(self), self.kind, self.param, self.code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, as the body of a response or the data of an event."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def busy(status: int, message: str, code: str, retry_after: int) -> ApiError:
    """The server takes no request now; the client may ask again after `retry_after` seconds."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(status, message, kind="server_error", code=code, headers=headers)


def invalid(error: ValidationError) -> ApiError:
    """The first fault that pydantic found, with the name of the field."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = field_name(fault["loc"])
    code = CODES.get(fault["type"], "invalid_value")
    message = {
        "missing_required_parameter": f"{param} is missing",
        "unknown_parameter": f"{param} is not a parameter of this API; leave it out",
        "invalid_value": f"{param}: {fault['msg'][:200].replace(' after validation', '')}",
    }[code]
    return ApiError(400, message, param=param, code=code)


def field_name(location: Sequence[int | str]) -> str:
    """`messages[0].content` from pydantic's location, in which the tag of a union stands behind each index."""
    name, tagged = "", False
    for part in location:
        if isinstance(part, int):
            name, tagged = f"{name}[{part}]", True
        elif tagged:
            tagged = False
        else:
            name = f"{name}.{part}" if name else part
    return name[:200]
