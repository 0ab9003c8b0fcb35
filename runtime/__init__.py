"""Bundle → answers, on the device: numpy and onnxruntime, never torch or transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resprune.runtime.errors import ResPruneError
    from resprune.runtime.pipeline import Pipeline

__all__ = ["Pipeline", "ResPruneError"]


def __getattr__(name: str) -> Any:
    """Import what is exported when it is first used: `import resprune.runtime` stays quick."""
    if name == "Pipeline":
        from resprune.runtime.pipeline import Pipeline

        return Pipeline
    if name == "ResPruneError":
        from resprune.runtime.errors import ResPruneError

        return ResPruneError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
