"""Qwen2.5-VL's vision tower at its real widths: memory as the image grows, and the selection beside the encoder."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.checkpoints import QWEN25VL_PERIOD, write_qwen25vl_vision
from benchmarks.measure import Timing, exported, take_turns
from benchmarks.measure import run as run_command
from benchmarks.selection import beside_encoder, cpu_session, selector, selector_inputs
from resprune.graphs import choose_form
from resprune.method import share_of
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.families.preprocessor import Arrays
from resprune.runtime.families.qwen2_vl import DynamicResolution

MERGED = (324, 1296, 4096)  # pictures of 18, 36 and 64 merged tokens a side
SHARES = (0.111, 0.222, 0.333)  # the paper's budgets
TIMED = 1296
PERIODS = 4  # of 8 blocks each, in the 3B and 7B towers
DEPTH = 32
BUNDLE = "the bundle's own"
"""Its K is the share of the largest picture, and it picks that many of a smaller one too, if it has them."""


def run(work: Path) -> dict[str, Any]:
    """Export one period of the tower, verify it, measure memory in child processes, and time encoder and selectors."""
    checkpoint, bundle = work / "qwen25vl-vision", work / "qwen25vl-vision-11"
    if not checkpoint.exists():
        write_qwen25vl_vision(checkpoint)
    exported(checkpoint, bundle, "-k", "11.1%", "--split")
    opened = read_bundle(bundle, check_hashes=False)
    memory = {}
    for count in MERGED:
        out, _, _ = run_command([sys.executable, "-m", "benchmarks.qwen_vl", str(bundle), str(count)])
        memory[count] = json.loads(out)
    feeds = _feeds(DynamicResolution.from_bundle(opened), TIMED)
    encoder = cpu_session(str(opened.graph_path("vision_encoder")))
    (features,) = encoder.run(["image_features"], feeds)
    select = selector_inputs(features, np.random.default_rng(0))
    calls: dict[str, Any] = {"one period": lambda: encoder.run(["image_features"], feeds)}
    for share in SHARES:
        k = share_of(share, TIMED)
        session = selector(k, features.shape)
        calls[f"K {k}"] = lambda session=session: session.run(None, select)
    own = cpu_session(str(opened.graph_path("token_select")))
    calls[BUNDLE] = lambda: own.run(None, select)
    timings = take_turns(calls, repeats=3)
    return {
        "shapes": {name: list(array.shape) for name, array in (*feeds.items(), ("image_features", features))},
        "memory": {str(count): figures for count, figures in memory.items()},
        **beside_encoder(timings, PERIODS * timings["one period"].median),
        "bundle": {"K": opened.manifest.selection.k, "form": opened.manifest.selection.form},
        "parity of the vision graphs": opened.manifest.parity,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    timings: dict[str, Timing] = result["milliseconds"]
    share = result["share of the encoder"]
    N, D = result["shapes"]["image_features"][1:]
    heads = QWEN25VL_PERIOD["num_heads"]
    rows = [
        "| merged tokens | patches | peak of a run | scores of all heads at once would be | one mask of all patches |"
    ]
    rows.append("|---|---|---|---|---|")
    for count, figures in result["memory"].items():
        patches = 4 * int(count)
        square = 4 * patches**2 / 1e6
        rows.append(
            f"| {count} | {patches} | {figures['run']:,.0f} MB | {heads * square:,.0f} MB | {square:,.0f} MB |"
        )
    rows += ["", "| K | form | selection | of the encoder |", "|---|---|---|---|"]
    for part in SHARES:
        k = share_of(part, N)
        rows.append(
            f"| {k} ({100 * part:g} %) | {choose_form(k, N, D)} | {timings[f'K {k}']} ms | {share[f'K {k}']:.2%} |"
        )
    bundle = result["bundle"]
    rows.append(
        f"| {bundle['K']}, a bundle of {100 * SHARES[0]:g} % of up to {MERGED[-1]:,} | {bundle['form']} "
        f"| {timings[BUNDLE]} ms | {share[BUNDLE]:.2%} |"
    )
    return (
        f"{QWEN25VL_PERIOD['depth']} of the {DEPTH} blocks (seven with windows, one with full attention), fp32: N {N}, "
        f"D {D}, {timings['one period']} ms; the whole encoder is taken as {PERIODS} times that. Memory is what a run "
        "takes above the opened session, and the same for any depth.\n\n" + "\n".join(rows)
    )


def _feeds(resolution: DynamicResolution, merged: int) -> Arrays:
    """A square picture of so many merged tokens."""
    side = round(merged**0.5) * resolution.patch_size * resolution.merge_size
    pixels = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return resolution.batch([resolution(Image.fromarray(pixels).resize((side, side)))])


def _measure(bundle: str, merged: int) -> None:
    """Print how many megabytes opening the encoder takes, and how many more a run."""
    opened = read_bundle(bundle, check_hashes=False)
    session = cpu_session(str(opened.graph_path("vision_encoder")))
    feeds = _feeds(DynamicResolution.from_bundle(opened), merged)
    # What is resident now: the peak so far is that of reading and repacking the weights.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    opened_bytes = pages * resource.getpagesize()
    session.run(None, feeds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"opened": opened_bytes / 1e6, "run": (peak - opened_bytes) / 1e6}))


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]))
