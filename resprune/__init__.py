"""Vision-language models on small devices with a fraction of their visual tokens (ResPrune, arXiv 2603.21105)."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resprune.runtime.errors import FailedError, ResPruneError, UnavailableError
    from resprune.runtime.pipeline import Pipeline

__all__ = ["FailedError", "Pipeline", "ResPruneError", "UnavailableError", "__version__"]
__version__ = "0.2.0"

# ONNX Runtime 1.32 writes a device id and a database under the home directory and looks up a host of Microsoft's. It
# reads this once, when it is imported; every import of it in this package comes after this line.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_ERRORS = ("FailedError", "ResPruneError", "UnavailableError")
_LAZY = {"Pipeline": "resprune.runtime.pipeline"} | dict.fromkeys(_ERRORS, "resprune.runtime.errors")


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used, so that `import resprune` loads no numpy and no onnxruntime."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
