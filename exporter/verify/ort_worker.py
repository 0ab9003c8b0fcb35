"""ONNX Runtime in a child process: it does not return memory after a session, so it must not run in the exporter's.

Run as a module it serves requests from its standard input; `OrtWorker` is the other end. It imports neither torch
nor transformers, and onnx only where graphs are widened, so that it starts at once.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from resprune.exporter.lineage import die_with_parent
from resprune.names import DECODER, EMBED_TOKENS, TEXT_EMBEDS, TEXT_MASK
from resprune.runtime.backends.backend import LocalBackend, Piece, Request
from resprune.runtime.backends.onnxruntime import OrtDecoder
from resprune.runtime.backends.session import usual_threads
from resprune.runtime.errors import ResPruneError
from resprune.runtime.sampling import Sampling

Arrays = dict[str, NDArray[Any]]


class OrtWorker:
    """Runs graphs on the CPU in a process of its own; use it as a context manager.

    `widened`: bfloat16 graphs as `graphs.widen` makes them, with float32 in place of bfloat16 at their borders.
    `packed`: graphs whose weights are packed, which compute in another way where their kernels may not rearrange them.
    """

    def __init__(self, *, widened: bool = False, packed: bool = False) -> None:
        command = [
            sys.executable,
            "-m",
            "resprune.exporter.verify.ort_worker",
            str(os.getpid()),
            *(["widened"] if widened else []),
            *(["packed"] if packed else []),
        ]
        # In a process group of its own: the terminal's Ctrl-C is for the exporter, which ends this one.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )

    def run(self, graph: Path, inputs: Arrays) -> Arrays:
        """Outputs of one run of `graph` by name."""
        return cast(Arrays, self._ask("run", str(graph), inputs))

    def answer(self, embed: Path, decoder: Path, request: Request, sampling: Sampling) -> list[list[Piece]]:
        """What `LocalBackend` answers, step by step, with these two graphs; no token ends an answer."""
        return cast(list[list[Piece]], self._ask("answer", str(embed), str(decoder), request, sampling))

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            failure, answer = pickle.load(self._process.stdout)  # noqa: S301 - our own child
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the last of an answer that is cut off
            status = self._process.wait()
            if status == -signal.SIGKILL:
                raise ResPruneError(
                    "ONNX Runtime's process was killed, most likely for want of memory; export with --verify layers, "
                    "or on a larger machine"
                ) from None
            raise RuntimeError(f"ONNX Runtime's process died (exit status {status})") from None
        if failure is not None:
            raise RuntimeError(failure)
        return answer

    def __enter__(self) -> OrtWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class WorkerBundle:
    """The graphs of a bundle in that process, by their names: a `GraphRunner`, and a `Backend` without an end token.

    `made` has all that each graph gave in its last run.
    """

    def __init__(self, worker: OrtWorker, paths: Mapping[str, Path]) -> None:
        self._worker = worker
        self._paths = paths
        self.made: dict[str, Arrays] = {}

    def open(self, graph: str) -> None:
        """Nothing: each run opens its graph."""

    def run(
        self, graph: str, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> list[NDArray[Any]]:
        """The named outputs of one run; a row of text that is masked stands behind the others, and must not count."""
        inputs = dict(feeds)
        if TEXT_MASK in inputs:
            inputs[TEXT_MASK] = np.pad(inputs[TEXT_MASK], ((0, 0), (0, 1)))
            rows = ((0, 0), (0, 1), (0, 0))
            inputs[TEXT_EMBEDS] = np.pad(inputs[TEXT_EMBEDS], rows, constant_values=1)
        self.made[graph] = self._worker.run(self._paths[graph], inputs)
        return [self.made[graph][name] for name in outputs]

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """The answers, which are whole when they come."""
        return iter(self._worker.answer(self._paths[EMBED_TOKENS], self._paths[DECODER], request, sampling))

    def close(self) -> None:
        """Nothing: the worker is its owner's."""


def _session(path: str, *, once: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usual_threads()
    options.log_severity_level = 3  # a warning about each initializer that it folds is of no use here
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch runs in turn with it
    # Rearranging the weights for the kernels takes longer than it saves; packed ones compute otherwise without it.
    if once and "packed" not in sys.argv:
        options.add_session_config_entry("session.disable_prepacking", "1")
    graph: str | bytes = path
    if "widened" in sys.argv:
        import onnx

        from resprune.graphs.widen import widen

        folder = str(Path(path).parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        graph = widen(onnx.load(path, load_external_data=False)).SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _run(path: str, inputs: Arrays) -> Arrays:
    session = _session(path, once=True)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _answer(embed_path: str, decoder_path: str, request: Request, sampling: Sampling) -> list[list[Piece]]:
    embed = _session(embed_path)

    def embed_tokens(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        embeds: NDArray[np.float32]
        (embeds,) = embed.run(None, {"input_ids": ids})
        return embeds

    decoder = OrtDecoder(_session(decoder_path), embed_tokens, in_place=False)
    return list(LocalBackend(decoder, frozenset(), -1).start(request, sampling))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    actions: dict[str, Callable[..., Any]] = {"run": _run, "answer": _answer}
    while True:
        try:
            action, *arguments = pickle.load(requests)  # noqa: S301 - from our own parent
        except EOFError:
            return
        try:
            answer: Any = (None, actions[action](*arguments))
        except Exception as error:  # whatever it is, the parent raises it
            answer = (f"{action} {Path(arguments[0]).name}: {error}", None)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # an exporter that was killed waits for no answer
    _serve(sys.stdin.buffer, sys.stdout.buffer)
