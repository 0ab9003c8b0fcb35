"""Serve the page and a bundle on 127.0.0.1: python examples/web/serve.py BUNDLE [--samples FOLDER] [--port N]."""

import argparse
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}


class Handler(SimpleHTTPRequestHandler):
    """Files of this folder, under /bundle/ those of the bundle, and under /samples/ images with questions.json."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES

    def __init__(self, *arguments, folders: dict[str, Path], **named) -> None:
        self.folders = folders
        super().__init__(*arguments, directory=str(HERE), **named)

    def handle(self) -> None:
        """A browser that goes away in the middle of a file is no error."""
        with suppress(ConnectionError):
            super().handle()

    def translate_path(self, path: str) -> str:
        """The file for a path; the base class drops every `..`."""
        first, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        self.directory = str(self.folders.get(first, HERE))
        return super().translate_path(f"/{rest}" if first in self.folders else path)

    def end_headers(self) -> None:
        """Isolate the page: only then browsers give WebAssembly threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing of single requests."""


def main() -> None:
    """Print the address and serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the page and a bundle on 127.0.0.1.")
    parser.add_argument("bundle", type=Path, help="directory that resprune export wrote")
    parser.add_argument("--samples", type=Path, help="folder of images with a questions.json")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one; default: %(default)s")
    arguments = parser.parse_args()
    if not (arguments.bundle / "resprune.json").is_file():
        parser.error(f"{arguments.bundle} has no resprune.json; make a bundle with resprune export")
    if not (HERE / "node_modules").is_dir():
        parser.error(f"run npm ci --ignore-scripts in {HERE} first")
    folders = {"bundle": arguments.bundle.resolve()}
    if arguments.samples:
        folders["samples"] = arguments.samples.resolve()
    handler = partial(Handler, folders=folders)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", arguments.port), handler)
    except OSError as error:
        parser.error(f"port {arguments.port} cannot be used ({error.strerror}); give another with --port")
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
