"""Starting `resprune serve`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread


@contextmanager
def served(
    bundle: Path | str,
    *options: object,
    resprune: Sequence[str] = (sys.executable, "-m", "resprune"),
    **environment: str,
) -> Iterator[str]:
    """The address of a server with this bundle."""
    command = [*resprune, "serve", str(bundle), "--port", "0", *map(str, options)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert server.stderr is not None
        url = next(found[1] for line in server.stderr if (found := re.search(r" at (http://\S+)", line)))
        Thread(target=server.stderr.read, daemon=True).start()  # a pipe that is full would stop the server
        yield url
    finally:
        server.terminate()
        server.wait(30)
