"""`resprune serve`: options, bundles, and the server's life."""

import argparse
import ipaddress
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from resprune.runtime.console import bytes_text
from resprune.runtime.errors import ResPruneError, one_line, require_packages
from resprune.runtime.options import (
    BUNDLE_HELP,
    BundlePath,
    add_load_options,
    load_pipeline,
)
from resprune.serving.limits import CACHE_BYTES, PARALLEL, QUEUE, Limits

if TYPE_CHECKING:
    from resprune.runtime.pipeline import Pipeline

KEY_VARIABLE = "RESPRUNE_SERVE_KEY"
PORT, LAST_PORT = 8080, 65535
MIB = 1 << 20


def register_serve(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="serve bundles: OpenAI's API, and a page to try them on",
        description="Serve bundles with OpenAI's API, and a page to try them on.",
    )
    parser.add_argument(
        "bundles",
        type=BundlePath,
        metavar="BUNDLE",
        nargs="+",
        help=f"{BUNDLE_HELP}; its name is the model's",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help="0 for any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--insecure", action="store_true", help=f"listen at a public --host without a key in {KEY_VARIABLE}"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=PARALLEL,
        metavar="N",
        help="answers written at once (default: %(default)s)",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=QUEUE,
        metavar="N",
        help="requests that wait; one more gets 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=Limits.seconds,
        metavar="SECONDS",
        help="longest request, its wait included (default: %(default)s)",
    )
    parser.add_argument(
        "--body-limit",
        type=int,
        default=Limits.body_bytes // MIB,
        metavar="MIB",
        help="largest request (default: %(default)s)",
    )
    parser.add_argument(
        "--image-cache",
        type=int,
        default=CACHE_BYTES // MIB,
        metavar="MIB",
        help="memory for encoded images (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-url-host",
        action="append",
        default=[],
        metavar="HOST",
        help="load images from http(s) addresses at HOST or HOST:PORT as well; may be given more than once "
        "(default: none)",
    )
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="take special tokens such as </s> in messages as control tokens, in place of text",
    )
    add_load_options(parser)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    require_packages(
        "resprune serve",
        ["fastapi", "uvicorn", "prometheus_client"],
        'install with: pip install "resprune[serve]"',
    )
    for option, least in [
        ("parallel", 1),
        ("queue", 0),
        ("body_limit", 1),
        ("image_cache", 0),
        ("time_limit", 1),
    ]:
        if not getattr(arguments, option) >= least:
            name = option.replace("_", "-")
            raise ResPruneError(f"--{name} should be {least} or more, not {getattr(arguments, option)}")
    if not 0 <= arguments.port <= LAST_PORT:
        raise ResPruneError(f"--port should be 0 to {LAST_PORT}, not {arguments.port}")
    for host in arguments.allow_url_host:
        if not re.fullmatch(r"[\w.:-]+", host, re.ASCII):
            raise ResPruneError(
                f"--allow-url-host should be a host such as example.org or example.org:8443, not {one_line(host)}"
            )
    key = serve_key()
    local = require_safe(arguments.host, key, insecure=arguments.insecure)
    names = model_names(arguments.bundles)
    from resprune.serving.app import Access
    from resprune.serving.images import ImageSources
    from resprune.serving.server import Server, bind, url_of
    from resprune.serving.service import Service

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("resprune.serving").setLevel(logging.INFO)
    body_bytes = arguments.body_limit * MIB
    with bind(
        arguments.host, arguments.port
    ) as bound:  # a port that is taken is told before gigabytes are read
        service = Service(
            {name: _load(path, arguments) for name, path in names.items()},
            parallel=arguments.parallel,
            queue=arguments.queue,
            cache_bytes=arguments.image_cache * MIB,
            max_pixels=arguments.max_pixels,
            plain_text=not arguments.special_tokens,
            sources=ImageSources(tuple(arguments.allow_url_host), body_bytes),
            limits=Limits(body_bytes, seconds=arguments.time_limit),
            access=Access(key, local and key is None),
        )
        with service:
            said = f"serving {', '.join(names)} at {url_of(bound)} (Ctrl-C stops)"
            server = Server(service.app, service.stop, lambda: _say(said), arguments.time_limit)
            server.run([bound])
            _say("stopped")
    return 0


def serve_key() -> str | None:
    """The key that clients must send; None where there is none."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ResPruneError(
            f"{KEY_VARIABLE} should be printable ASCII without spaces; set it anew, or unset it"
        )
    return key or None


def require_safe(host: str, key: str | None, *, insecure: bool) -> bool:
    """Whether `host` is this machine alone; `ResPruneError` for another one that anybody could use."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and key is None and not insecure:
        raise ResPruneError(
            f"anybody who reaches {host} could use this server; set {KEY_VARIABLE} to a key that clients send, "
            "or give --insecure"
        )
    return local


def model_names(bundles: Sequence[str]) -> dict[str, str]:
    """Path of each bundle by the name of its directory; `ResPruneError` if two have one name."""
    names: dict[str, str] = {}
    for path in bundles:
        name = Path(path).resolve().name
        if name in names:
            raise ResPruneError(
                f"{names[name]} and {path} are both called {name}; rename one of the directories"
            )
        names[name] = path
    return names


def _load(path: str, arguments: argparse.Namespace) -> "Pipeline":
    """Open a bundle, and say so: one of gigabytes takes a while."""
    from resprune.runtime.bundle.files import read_bundle

    size = bytes_text(read_bundle(path, check_hashes=False).nbytes)
    doing = "opening" if arguments.skip_hashes else "checking and opening"
    _say(f"{doing} {path} ({size}) …")
    start = perf_counter()
    pipeline = load_pipeline(path, arguments)
    _say(f"{path} is ready after {perf_counter() - start:.1f} s")
    return pipeline


def _say(text: str) -> None:
    print(f"resprune: {text}", file=sys.stderr, flush=True)
