"""What the selection costs beside LLaVA-NeXT's vision encoder, at the paper's budgets and the largest picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.checkpoints import write_llava_next_vision
from benchmarks.measure import Timing, exported, take_turns
from benchmarks.selection import beside_encoder, cpu_session, selector, selector_inputs
from resprune.graphs import choose_form
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.families.llava_next import preprocessor

BUDGETS = (160, 320, 640)
SIZE = (672, 672)  # four tiles and the whole view, nothing padded: the most tokens there are


def run(work: Path) -> dict[str, Any]:
    """Export CLIP-L/336 with a projector to 4,096, verify it, and time pixels, encoder and selectors in turn."""
    checkpoint, bundle = work / "llava-next-vision", work / f"llava-next-vision-k{BUDGETS[-1]}"
    if not checkpoint.exists():
        write_llava_next_vision(checkpoint)
    exported(checkpoint, bundle, "-k", str(BUDGETS[-1]), "--split")
    opened = read_bundle(bundle, check_hashes=False)
    anyres = preprocessor(opened)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (SIZE[1] // 2, SIZE[0] // 2, 3), dtype=np.uint8)).resize(
        SIZE
    )
    feeds = anyres.batch([anyres(image)])
    encoder = cpu_session(str(opened.graph_path("vision_encoder")))
    (features,) = encoder.run(["image_features"], feeds)
    select = selector_inputs(features, rng)
    calls: dict[str, Any] = {
        "pixels": lambda: anyres.batch([anyres(image)]),
        "vision encoder": lambda: encoder.run(["image_features"], feeds),
    }
    for k in BUDGETS:
        session = selector(k, features.shape)
        calls[f"K {k}"] = lambda session=session: session.run(None, select)
    timings = take_turns(calls, repeats=5)
    return {
        "shapes": {name: list(array.shape) for name, array in (*feeds.items(), ("image_features", features))},
        **beside_encoder(timings, timings["vision encoder"].median),
        "parity of the vision graphs": opened.manifest.parity,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    timings: dict[str, Timing] = result["milliseconds"]
    share = result["share of the encoder"]
    tiles = result["shapes"]["pixel_values"][0]
    N, D = result["shapes"]["image_features"][1:]
    rows = ["| K | form | selection | of the encoder |", "|---|---|---|---|"]
    rows += [
        f"| {k} | {choose_form(k, N, D)} | {timings[f'K {k}']} ms | {share[f'K {k}']:.2%} |" for k in BUDGETS
    ]
    return (
        f"{tiles} tiles of CLIP-L/336 and projector, N {N}, D {D}, fp32: {timings['vision encoder']} ms; "
        f"pixels (NumPy and Pillow): {timings['pixels']} ms.\n\n" + "\n".join(rows)
    )
