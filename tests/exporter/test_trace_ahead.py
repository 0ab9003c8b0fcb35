"""Traced in another process: the graphs are the same, what goes wrong is told, and nothing is left running."""

import multiprocessing
import os
import signal
import sys

import pytest
import torch

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.components import Component
from resprune.exporter.families import split_model
from resprune.exporter.trace import ahead as trace_ahead
from resprune.exporter.trace.tracer import trace
from resprune.runtime.errors import ResPruneError


@pytest.fixture
def taken_apart(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(trace_ahead, "trace", trace)  # no graphs that the session has kept
    checkpoint, mode = resolve(str(tiny_checkpoint("clip-llama"))), fake_mode()
    components = split_model(checkpoint, torch.float16, mode)
    return [components.embed, components.vision, components.decoder], components.model, mode


@pytest.mark.parametrize(("platform", "count"), [("linux", 3), ("darwin", 1)])
def test_the_graphs_are_those_of_trace(platform, count, taken_apart, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    parts, whole, mode = taken_apart
    parts = parts[:count]
    with trace_ahead.traced_ahead(parts, whole, mode) as graphs:
        ahead = list(graphs)
    wanted = [trace(component, whole, mode) for component in parts]
    assert [traced.weights for traced in ahead] == [traced.weights for traced in wanted]
    texts = [
        [traced.model.SerializeToString(deterministic=True) for traced in some] for some in (ahead, wanted)
    ]
    assert texts[0] == texts[1]


def test_a_graph_that_cannot_be_traced_is_an_error_where_it_is_taken(taken_apart, monkeypatch):
    parts, whole, mode = taken_apart

    def fail_at_the_second(component: Component, *arguments: object) -> object:
        if component is parts[1]:
            raise LookupError("an operator that nobody knows")
        return trace(component, whole, mode)

    monkeypatch.setattr(trace_ahead, "trace", fail_at_the_second)
    with trace_ahead.traced_ahead(parts, whole, mode) as graphs:
        assert next(graphs).weights
        with pytest.raises(RuntimeError, match="LookupError: an operator that nobody knows"):
            next(graphs)
    assert multiprocessing.active_children() == []


def test_a_process_that_is_killed_was_short_of_memory(taken_apart, monkeypatch):
    monkeypatch.setattr(trace_ahead, "trace", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with (
        trace_ahead.traced_ahead(*taken_apart) as graphs,
        pytest.raises(ResPruneError, match="killed, most likely for want of memory"),
    ):
        next(graphs)


def test_a_process_that_dies_is_an_error_as_well(taken_apart, monkeypatch):
    monkeypatch.setattr(trace_ahead, "trace", lambda *arguments: sys.exit(9))
    with (
        trace_ahead.traced_ahead(*taken_apart) as graphs,
        pytest.raises(RuntimeError, match=r"died \(exit status 9\)"),
    ):
        next(graphs)


def test_whoever_leaves_early_stops_it(taken_apart):
    with pytest.raises(KeyboardInterrupt), trace_ahead.traced_ahead(*taken_apart):
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == []
