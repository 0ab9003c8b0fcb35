"""What the tests of real hosts share: bundles, made once a session, and a browser."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hosts.npm import install_copy
from tests.hosts.serve_page import Step

Drive = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def exported(tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """The fields of `exporter.options.Options` → a bundle of the demo model."""
    return partial(tiny_bundle, "demo")


@pytest.fixture(scope="session")
def driver() -> Path:
    """The script that drives Chromium, which is installed if it is missing."""
    if not Path("/usr/bin/chromium").exists():
        apt = [*([] if os.geteuid() == 0 else ["sudo"]), "apt-get"]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "install", "-y", "--no-install-recommends", "chromium"], check=True)
    return install_copy(Path(__file__).with_name("browser"), "browser") / "drive.mjs"


@pytest.fixture(scope="session")
def drive(driver: Path) -> Drive:
    """Steps → what they read; every request must be to 127.0.0.1, and no other name is resolved."""

    def run(steps: list[Step], arguments: tuple[str, ...] = (), **context: Any) -> dict[str, Any]:
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        plan = {"arguments": [alone, *arguments], "context": context, "steps": steps}
        done = subprocess.run(
            ["node", str(driver)],
            input=json.dumps(plan),
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        hosts = {
            urlsplit(url).hostname for url in found["requests"] if not url.startswith(("data:", "blob:"))
        }
        assert hosts == {"127.0.0.1"}
        assert found["errors"] == []
        return found

    return run
