"""Tracing keeps one processor busy and the disk idle, writing and comparing the other way round: they overlap here.

Where processes can be forked safely, which is on Linux, one traces the components in turn while this one goes on with
those that are traced. A thread would not do: torch.export and building a model both patch what they share.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.exporter.components import Component
from resprune.exporter.lineage import die_with_parent
from resprune.exporter.trace.tracer import Traced, trace
from resprune.runtime.errors import ResPruneError

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess


@contextmanager
def traced_ahead(
    components: Sequence[Component], whole: nn.Module, mode: FakeTensorMode
) -> Iterator[Iterator[Traced]]:
    """What `trace` makes of each component of `whole`, in order, as early as it can be had.

    Whoever takes a graph that could not be traced gets a `RuntimeError` with what the tracer said.
    """
    if sys.platform != "linux":
        yield (trace(component, whole, mode) for component in components)
        return
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(
        target=_trace_all, args=(os.getpid(), receiver, sender, components, whole, mode), daemon=True
    )
    process.start()
    sender.close()
    with receiver, ThreadPoolExecutor(1) as thread:  # which empties the pipe, so that tracing never waits
        answers = [thread.submit(receiver.recv) for _ in components]
        try:
            yield (_traced(answer, process) for answer in answers)
        finally:
            process.kill()
            process.join()


def _trace_all(
    parent: int,
    receiver: Connection,
    sender: Connection,
    components: Sequence[Component],
    whole: nn.Module,
    mode: FakeTensorMode,
) -> None:
    """The other process. It ends with its work, so it collects no garbage; the terminal's Ctrl-C is not for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    # Of what it inherits it may hold nothing: the lock of the bundle that is being made, its own pipe's other end.
    receiver.close()
    os.closerange(3, sender.fileno())
    os.closerange(sender.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    gc.disable()
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork
    try:
        for component in components:
            sender.send(trace(component, whole, mode))
    except BrokenPipeError:
        return
    except Exception:  # whatever it is, the parent raises it
        sender.send(traceback.format_exc())


def _traced(answer: Future[Traced | str], process: ForkProcess) -> Traced:
    try:
        traced = answer.result()
    except (EOFError, OSError):  # the latter in the middle of an answer
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise ResPruneError(
                "the process that traces was killed, most likely for want of memory; use a machine with more"
            ) from None
        raise RuntimeError(f"the process that traces died (exit status {process.exitcode})") from None
    if isinstance(traced, str):
        raise RuntimeError(f"tracing failed\n{traced}")
    return traced
