"""Images from other hosts: only from hosts the operator named, and never from a private network.

The host is resolved once, every address it has is checked, and the connection goes to a checked address: a name that
means another address a moment later (DNS rebinding) leads nowhere else. Redirects are not followed.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection
from time import monotonic
from urllib.parse import SplitResult, urlsplit

from resprune.runtime.backends.bounded_http import Limits, bounded_response
from resprune.serving.errors import ApiError

CHUNK_BYTES = 1 << 16
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits


def fetch(url: str, hosts: Collection[str], *, max_bytes: int, seconds: float) -> bytes:
    """The bytes at `url`, whose host must be one of `hosts`: `example.org`, or `example.org:8443` for another port.

    `ApiError` with status 400 for anything else: a host that is not named, a private address, a redirect, an answer
    of more than `max_bytes`, or one that takes longer than `seconds`.
    """
    split = _split(url)
    host, port = _allowed(split, hosts)
    deadline = monotonic() + seconds
    try:
        connection = _connect(split.scheme, host, port, deadline)
        try:
            target = (split.path or "/") + (f"?{split.query}" if split.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "resprune"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise refused(f"{host} answers with status {response.status}; give the image's own address")
            return _read(response, host, max_bytes)
        finally:
            connection.close()
    except TimeoutError:
        raise refused(f"{host} takes longer than {seconds:g} seconds; send the image as a data URL") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise refused(f"{host} cannot be read ({reason}); send the image as a data URL") from None


def refused(message: str) -> ApiError:
    """Status 400 for an image that the server does not take."""
    return ApiError(400, message, param="messages", code="invalid_image_url")


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


def _split(url: str) -> SplitResult:
    try:
        split = urlsplit(url)
        usable = split.scheme in PORTS and bool(split.hostname) and split.username is None
        usable = usable and url.isascii() and url.isprintable() and " " not in url and split.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise refused("the image's address is not one of http or https; send the image as a data URL")
    return split


def _allowed(split: SplitResult, hosts: Collection[str]) -> tuple[str, int]:
    host = (split.hostname or "").lower()
    port = split.port or PORTS[split.scheme]
    known = {name.lower() for name in hosts}
    if (host in known and port == PORTS[split.scheme]) or f"{host}:{port}" in known:
        return host, port
    name = host if port == PORTS[split.scheme] else f"{host}:{port}"
    raise refused(
        f"this server does not load images from {name[:100]}; send the image as a data URL, "
        f"or start the server with --allow-url-host {name[:100]}"
    )


def _connect(scheme: str, host: str, port: int, deadline: float) -> http.client.HTTPConnection:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not found or not all(is_public(str(address[0])) for *_, address in found):
        raise refused(f"{host} has a private address, and this server asks only public ones")
    family, kind, protocol, _, address = found[0]
    connection = http.client.HTTPConnection(host, port)
    connection.response_class = bounded_response(Limits(_left(deadline), deadline, TimeoutError))
    plain = socket.socket(family, kind, protocol)
    try:
        plain.settimeout(_left(deadline))
        plain.connect(address)  # not by name, which could mean another address by now
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            if scheme == "https"
            else plain
        )
    except BaseException:
        plain.close()
        raise
    return connection


def _read(response: http.client.HTTPResponse, host: str, max_bytes: int) -> bytes:
    content = bytearray()
    while True:
        chunk = response.read1(CHUNK_BYTES)
        if not chunk:
            if response.length:
                raise refused(f"{host} cut the image off; send it as a data URL")
            return bytes(content)
        content += chunk
        if len(content) > max_bytes:
            raise refused(f"the image at {host} has more than {max_bytes} bytes; make it smaller")


def _left(deadline: float) -> float:
    """Seconds until `deadline`; `TimeoutError` if it has passed."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left
