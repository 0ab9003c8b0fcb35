"""One start of `resprune ask`, by stages, up to its prefill: `python -m benchmarks.starting SPEC` prints JSON.

It imports neither torch nor the exporter. The runtime's own functions are wrapped and timed; what runs at once, in
threads, adds up to more than the whole.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measure import Samples
from resprune.runtime import pipeline
from resprune.runtime.backends import onnxruntime as decoder
from resprune.runtime.backends import session
from resprune.runtime.bench.measure import peak_bytes
from resprune.runtime.bundle import hashes

IMPORTS, PREFILL, TOKEN = "Python and imports", "until prefill", "first token"


def start(bundle: str, picture: str, question: str, check: bool, prepack: bool) -> dict[str, Any]:
    """Samples of the stages and, since the process began, of the whole.

    `check` hashes all files, also those that were. Without `prepack` ONNX Runtime leaves weights as they are in the
    file, and the start ends with the sessions. Memory is the peak in bytes, `cpu` are seconds of all threads.
    """
    session.session_settings(0)  # imports onnxruntime
    clock = Samples({"": {IMPORTS: [_since_start()]}})
    memory, cpu = {}, {}

    def timed(owner: Any, name: str, stage: Callable[..., str]) -> Any:
        plain = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with clock.time(stage(*arguments)):
                return plain(*arguments, **options)

        return patch.object(owner, name, wrapped)

    def reached(what: str) -> None:
        clock.values[""][what] = [_since_start()]
        memory[what], cpu[what] = peak_bytes(), time.process_time()

    def prefill(*arguments: Any) -> Any:
        reached(PREFILL)
        return plain_prefill(*arguments)

    def settings(threads: int) -> Any:
        made = plain_settings(threads)
        made.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
        return made

    plain_prefill, plain_settings = decoder.OrtDecoder.start, session.session_settings
    with ExitStack() as patches:
        for one in (
            timed(pipeline, "read_bundle", lambda *_: "manifest"),
            timed(hashes, "sha256", lambda *_: "hashes"),
            timed(pipeline, "Prompter", lambda *_: "tokenizer"),
            timed(session, "new_session", lambda path, *_: f"session of {Path(path).name.partition('.')[0]}"),
            timed(session.OrtGraphs, "run", lambda _, graph, *__: f"run of {graph}"),
            timed(pipeline.Pipeline, "_prepared", lambda *_: "pixels"),
            patch.object(decoder.OrtDecoder, "start", prefill),
            patch.object(session, "session_settings", settings),
        ):
            patches.enter_context(one)
        with pipeline.Pipeline.load(bundle, check_again=check) as vlm:
            if prepack:
                vlm.ask(picture, question, max_new_tokens=1, stream=False)
                reached(TOKEN)
    return {"samples": clock.values, "memory": memory, "cpu": cpu}


def _since_start() -> float:
    """Milliseconds that this process has lived, to a hundredth of a second (Linux: proc(5), stat)."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return 1e3 * (time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK"))


if __name__ == "__main__":
    print(json.dumps(start(**json.loads(sys.argv[1]))))
