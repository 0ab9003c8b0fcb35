"""Starting `resprune serve`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(bundle: Path | str, **environment: str) -> Iterator[str]:
    """The address of a server with this bundle."""
    command = [sys.executable, "-m", "resprune", "serve", str(bundle), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert server.stderr is not None
        yield next(found[1] for line in server.stderr if (found := re.search(r" at (http://\S+)", line)))
    finally:
        server.terminate()
        server.communicate(timeout=30)
