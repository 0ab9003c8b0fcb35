"""Running graphs: the interface that engines share, and ONNX Runtime's sessions, their options and their faults."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from resprune.runtime.arguments import whole, words
from resprune.runtime.backends.providers import CPU, check_providers, new_session
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.precisions import TABLE
from resprune.runtime.errors import FailedError, ResPruneError, one_line

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SessionOptions:
    """`providers`: names in `providers.PROVIDERS`, best first, also as one string with commas ("cuda,cpu").

    `threads`: 0 is OMP_NUM_THREADS, or one per physical core where that is not set; at most the number of logical
    cores.
    """

    providers: Sequence[str] = (CPU,)
    threads: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "providers", tuple(words(self.providers, "providers")))
        check_threads(self.threads)


def check_threads(threads: int) -> None:
    """`ResPruneError` for more threads than this machine has: ONNX Runtime starts as many as it is told."""
    whole(threads, "threads (0 for one per physical core)", 0, os.cpu_count() or 1)


def open_session(bundle: Bundle, graph: str, options: SessionOptions) -> "onnxruntime.InferenceSession":
    """Session of a bundle's graph; `ResPruneError` for a provider not installed or a file it cannot load."""
    path = bundle.graph_path(graph)
    check_providers(options.providers, bundle.manifest)
    try:
        session = new_session(str(path), session_settings(options.threads), options.providers)
    except ResPruneError:
        raise
    except Exception as error:  # onnxruntime's own exception types share no base but this one
        row = TABLE[bundle.manifest.graphs[graph].precision]
        if row.element == "bfloat16" and "Could not find an implementation" in str(error):
            raise ResPruneError(
                f"{path} is {row.word}, in which the provider {' or '.join(options.providers)} cannot compute; "
                "choose another or export with --dtype fp16 or fp32"
            ) from None
        raise ResPruneError(f"{path} cannot be opened by onnxruntime ({one_line(error)})") from None
    _require_declared(bundle, graph, session)
    return session


def _require_declared(bundle: Bundle, graph: str, session: "onnxruntime.InferenceSession") -> None:
    """`ResPruneError` unless the graph's inputs and outputs are what the manifest says."""
    spec = bundle.manifest.graphs[graph]
    for what, declared, found in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        shapes = {
            value.name: [size if isinstance(size, int) else None for size in value.shape] for value in found
        }
        for tensor in declared:
            shape = [size if isinstance(size, int) else None for size in tensor.shape]
            if shapes.get(tensor.name) != shape:
                raise ResPruneError(
                    f"{bundle.graph_path(graph)} has no {what} {tensor.name} of the shape {list(tensor.shape)} that "
                    "resprune.json names; export the bundle again"
                )


def usual_threads() -> int:
    """OMP_NUM_THREADS, where it is a number, as PyTorch and NumPy take it; else 0, which is ONNX Runtime's choice."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(first), os.cpu_count() or 1) if first.isdecimal() else 0


def session_settings(threads: int) -> "onnxruntime.SessionOptions":
    """ONNX Runtime's options for graphs that take turns; `threads` as in `SessionOptions`."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or usual_threads()
    # The stages run one after another, and a pool that spins on after its own takes cores from the next. Within a run
    # the threads do spin: a step of a billion int8 weights has hundreds of short operators, and 16 of them took 0.78 s
    # in place of 0.90 where the threads were woken up for each (two cores).
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.log_severity_level = 4  # errors come back as exceptions; warnings are about node placement
    return settings


class GraphRunner(Protocol):
    """Runs the graphs of one bundle, by their names."""

    def open(self, graph: str) -> None:
        """Make a graph ready now; otherwise its first run does."""
        ...

    def run(self, graph: str, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs of one run on host arrays; `ResPruneError` for a run that fails."""
        ...

    def close(self) -> None:
        """Give back what was opened; nothing can be run afterwards."""
        ...


class OrtGraphs:
    """A bundle's graphs in ONNX Runtime, each opened when it is first needed; any threads may run them at once."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        self._bundle = bundle
        self._options = options
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._opening = Lock()
        self._closed = False

    def open(self, graph: str) -> None:
        """Open the session of a graph."""
        self._session(graph)

    def run(self, graph: str, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs of one run (see `GraphRunner`)."""
        session: Any = self._session(graph)
        with graph_faults(graph):
            return list(session.run(list(outputs), dict(feeds)))

    def _session(self, graph: str) -> "onnxruntime.InferenceSession":
        with self._opening:
            if self._closed:
                raise already_closed()
            if graph not in self._sessions:
                self._sessions[graph] = open_session(self._bundle, graph, self._options)
            return self._sessions[graph]

    def close(self) -> None:
        """Give back the sessions; what is running ends first."""
        with self._opening:
            self._closed = True
            self._sessions.clear()


def already_closed() -> ResPruneError:
    """The error of what is asked of a pipeline after its end."""
    return ResPruneError("the pipeline is closed; load it again")


@contextmanager
def graph_faults(graph: str) -> Iterator[None]:
    """Turn what onnxruntime raises while a graph runs (out of memory, a shape it refuses) into a `FailedError`."""
    try:
        yield
    except Exception as error:
        raise FailedError(f"onnxruntime could not run {graph} ({one_line(error)})") from None
