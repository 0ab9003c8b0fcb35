"""The kernel in Triton's interpreter: as one program, a launch for each step, or all programs at the same time."""

import multiprocessing

import torch
from triton.runtime.interpreter import interpreter_builder

from resprune.graphs.kernels.residual_select import residual_select
from resprune.graphs.kernels.selection import constants, scratch_words

SMALL = {"TILE": 16, "DEPTH": 16, "TOKENS": 16, "STEPS": 4}
"""Tiles and blocks so small that tiny inputs have many of each, and a last one that is not full."""


def features(seed, n, d, dtype=torch.float32, batch=1):
    """Rows whose scores are far enough apart that float32 never decides between two of them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, n, d, generator=generator)
    return (rows * torch.linspace(0.5, 2.0, n)[None, :, None]).to(dtype)


def gains(seed, n, batch=1):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.1


def arguments(visual, gain, k, token_mask=None):
    """What a launch takes, in the kernel's order; the scratch holds garbage, as it does everywhere."""
    B, N, _ = visual.shape
    mask = torch.ones(B, N, dtype=torch.bool) if token_mask is None else token_mask
    picks = torch.full((B, k), -7)
    scratch = torch.randint(-(2**31), 2**31 - 1, (B, scratch_words(N, k)), dtype=torch.int32)
    return [visual, gain, mask, N, 0, k + 2, picks, scratch.view(torch.float32)]


def shapes_of(visual, k, **changed):
    return constants(visual.shape[2], k, str(visual.dtype).removeprefix("torch.")) | changed


def alone(visual, gain, k, token_mask=None, **changed):
    """One program a picture, one launch: every step, with barriers that have nobody to wait for."""
    values = arguments(visual, gain, k, token_mask)
    residual_select[(1, len(visual))](*values, **shapes_of(visual, k, **changed))
    return values[6]


def step_by_step(visual, gain, k, token_mask=None, *, programs, **changed):
    """A grid of many programs, and a launch for each step: what one program writes, the others read."""
    values = arguments(visual, gain, k, token_mask)
    for step in range(k + 2):
        values[4:6] = step, step + 1
        residual_select[(programs, len(visual))](*values, **shapes_of(visual, k, **changed))
    return values[6]


def together(values, k, *, programs, seconds=180, **changed):
    """One launch, each of its programs in a process of its own, over shared memory: they have to wait for each other.

    `values` are `arguments`; returns the picks.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            value.share_memory_()
    pictures = len(values[0])
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(
            target=_one_program,
            args=((programs, pictures), (program, picture), values, shapes_of(values[0], k, **changed)),
        )
        for program in range(programs)
        for picture in range(pictures)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds)
    stuck = [worker for worker in workers if worker.is_alive()]
    for worker in stuck:
        worker.kill()
    assert not stuck, f"{len(stuck)} of {len(workers)} programs wait for ever"
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    return values[6]


def _one_program(grid, index, values, shapes):
    """The launch of the whole grid, of which only the program `index` runs."""
    builder = type(interpreter_builder)
    interpreter_builder.set_grid_dim = lambda *_: builder.set_grid_dim(interpreter_builder, *grid, 1)
    interpreter_builder.set_grid_idx = lambda *_: builder.set_grid_idx(interpreter_builder, *index, 0)
    residual_select[(1, 1)](*values, **shapes)
