"""The bytes of a message's image, from its `image_url`."""

import base64
import binascii
from collections.abc import Collection
from dataclasses import dataclass

from resprune.serving.errors import ApiError
from resprune.serving.fetch import fetch, refused


@dataclass(frozen=True)
class ImageSources:
    """Where images may come from: `hosts` of http(s) addresses, besides data URLs.

    The images of a request may have `max_bytes` together, and each of another host may take so many `seconds`.
    """

    hosts: Collection[str] = ()
    max_bytes: int = 32 << 20
    seconds: float = 20.0

    def read(self, url: str) -> bytes:
        """The image file behind `url`; `ApiError` with status 400 if it cannot be had. May wait for another host."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return decode_data_url(url)
        if scheme not in ("http", "https"):
            raise refused("image_url.url should be a data URL: data:image/jpeg;base64,…")
        if not self.hosts:
            raise refused(
                "this server loads no images from addresses; send the image as a data URL "
                "(data:image/jpeg;base64,…), or start the server with --allow-url-host HOST"
            )
        return fetch(url, self.hosts, max_bytes=self.max_bytes, seconds=self.seconds)


def decode_data_url(url: str) -> bytes:
    """The bytes of a base64 data URL (RFC 2397); the media type is not trusted, the bytes are looked at later."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(
            400,
            "image_url.url should be a data URL with base64: data:image/jpeg;base64,…",
            param="messages",
            code="invalid_image_url",
        )
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise refused("image_url.url is not valid base64; encode the image's bytes again") from None
    if not content:
        raise refused("image_url.url has no bytes; give an image")
    return content
