"""Opening an ONNX Runtime session: the options every graph shares, and its faults as one sentence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resprune.runtime.bundle import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.providers import CPU, check_providers, new_session

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class SessionOptions:
    """`providers`: names in `providers.PROVIDERS`, best first; `threads`: 0 is one a physical core."""

    providers: Sequence[str] = (CPU,)
    threads: int = 0

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ResPruneError(f"threads should be 0 (one a physical core) or more, not {self.threads}")


def open_session(bundle: Bundle, graph: str, options: SessionOptions) -> "onnxruntime.InferenceSession":
    """Session of a bundle's graph; `ResPruneError` for a provider not installed or a file it cannot load."""
    import onnxruntime as ort

    path = bundle.graph_path(graph)
    check_providers(options.providers, bundle.manifest)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    # The stages run one after another, and a pool that spins after its own takes cores from the next: with other
    # work on the machine (two cores, load 9) 32 tokens of the demo took 36-69 ms without spinning, 120-141 ms with it.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # errors come back as exceptions; warnings are about node placement
    try:
        return new_session(str(path), settings, options.providers)
    except ResPruneError:
        raise
    except Exception as error:  # onnxruntime's own exception types share no base but this one
        narrow = bundle.manifest.graphs[graph].precision == "bf16"
        if narrow and "Could not find an implementation" in str(error):
            raise ResPruneError(
                f"{path} is bf16, in which the provider {' or '.join(options.providers)} cannot compute; "
                "choose another or export with --dtype fp16 or fp32"
            ) from None
        raise ResPruneError(f"{path} cannot be opened by onnxruntime ({_one_line(error)})") from None


@contextmanager
def graph_faults(graph: str) -> Iterator[None]:
    """Turn what onnxruntime raises while a graph runs (out of memory, a shape it refuses) into one sentence."""
    try:
        yield
    except Exception as error:
        raise ResPruneError(f"onnxruntime could not run {graph} ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
