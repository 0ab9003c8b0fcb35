"""Decoders that take turns a few tokens at a time, each alive in a process of its own.

How fast memory is changes here by a third within a minute, so what is compared stands side by side in time; and how
fast a decoder reads its weights depends on where they happen to lie in it, so the processes are started several times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from random import Random
from tempfile import TemporaryFile
from time import perf_counter, sleep
from typing import Any

from benchmarks.measure import peak_mebibytes, reset_peak

PAUSE_SECONDS = 0.1
"""Before each burst, for the threads of the engine before it to stop waiting for more."""


def serve(versions: Mapping[str, str], begin: Callable[[int], Callable[[], object]]) -> None:
    """The worker's end: answers requests from standard input until it ends, in JSON, a line each.

    {"prompt": length} reads a prompt, by `begin(length)`, which returns what makes one more token, and tells the
    milliseconds; {"tokens": n} makes n of them and tells theirs, and the largest resident megabytes since the prompt.
    """
    print(json.dumps({"versions": versions}), flush=True)
    step: Callable[[], object] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            step = None  # what is left of the prompt before goes first
            reset_peak()
        start = perf_counter()
        if "prompt" in request:
            step = begin(request["prompt"])
        else:
            assert step is not None
            for _ in range(request["tokens"]):
                step()
        reply = {"milliseconds": 1e3 * (perf_counter() - start), "megabytes": peak_mebibytes()}
        print(json.dumps(reply), flush=True)


class Engine:
    """One of those compared, with what its processes have sampled; entering it starts a process, leaving it ends it.

    The first failure is its `fault`, the last line that the process printed; it is not asked again.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.rates: dict[str, list[float]] = {}
        """Tokens per second by case, a prompt each."""
        self.prefills: dict[str, list[float]] = {}
        """The same of the prompts themselves."""
        self.megabytes: dict[str, float] = {}
        """The largest resident memory by case."""
        self.versions: dict[str, str] = {}
        self.fault = ""

    def __enter__(self) -> Engine:
        self._stderr = TemporaryFile("w+")
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self.versions = self._reply().get("versions", self.versions)  # once the model is loaded
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def ask(self, **request: int) -> dict[str, Any]:
        """The reply to a request (see `serve`), empty with a fault."""
        assert self._process.stdin is not None
        if self.fault:
            return {}
        with suppress(BrokenPipeError):  # the reply, which will not come, says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        status = self._process.wait()
        self._stderr.seek(0)
        self.fault = [f"exit status {status}", *self._stderr.read().strip().splitlines()][-1]
        return {}


def take_bursts(
    engines: Sequence[Engine],
    lengths: Mapping[str, int],
    *,
    processes: int,
    prompts: int,
    bursts: int,
    tokens: int,
) -> None:
    """Start all engines together, `processes` times, and have each make `bursts` of `tokens` after every prompt.

    There are `prompts` of each of the `lengths`, and a short one ahead, to warm up. The order is drawn anew for every
    prompt and burst.
    """
    random = Random(0)
    warm_up = ("", min(lengths.values()), 1)
    for _ in range(processes):
        with ExitStack() as stack:
            for engine in engines:
                if not engine.fault:
                    stack.enter_context(engine)
            for case, length, count in [
                warm_up,
                *((*each, bursts) for each in lengths.items() for _ in range(prompts)),
            ]:
                alive = [engine for engine in engines if not engine.fault]
                replies = _one_prompt(alive, length, count, tokens, random)
                for engine in [engine for engine in alive if case and not engine.fault]:
                    prefill, *made = [reply["milliseconds"] / 1e3 for reply in replies[engine]]
                    engine.prefills.setdefault(case, []).append(length / prefill)
                    engine.rates.setdefault(case, []).append(bursts * tokens / sum(made))
                    engine.megabytes[case] = max(
                        engine.megabytes.get(case, 0.0), *(reply["megabytes"] for reply in replies[engine])
                    )


def _one_prompt(
    engines: Sequence[Engine], length: int, bursts: int, tokens: int, random: Random
) -> dict[Engine, list[dict[str, Any]]]:
    """What each engine replied to a prompt, and to each burst after it."""
    replies: dict[Engine, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for request in ({"prompt": length}, *[{"tokens": tokens}] * bursts):
        for engine in random.sample(engines, len(engines)):
            sleep(PAUSE_SECONDS)
            replies[engine].append(engine.ask(**request))
    return replies
