"""Vision-language models on small devices with a fraction of their visual tokens (ResPrune, arXiv 2603.21105)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resprune.runtime.errors import ResPruneError
    from resprune.runtime.pipeline import Pipeline

__all__ = ["Pipeline", "ResPruneError", "__version__"]
__version__ = "0.2.0"

_LAZY = {"Pipeline": "resprune.runtime.pipeline", "ResPruneError": "resprune.runtime.errors"}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used, so that `import resprune` loads no numpy and no onnxruntime."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
