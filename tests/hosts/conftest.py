"""The bundles that real hosts open, made once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The fields of `exporter.export.Options` → a bundle of the demo model."""
    from resprune.exporter.export import Options, export

    made: dict[Options, Path] = {}

    def bundle(**options: Any) -> Path:
        key = Options(**options)
        if key not in made:
            made[key] = export("demo", tmp_path_factory.mktemp("bundles") / "demo", key)
        return made[key]

    return bundle
