"""What the selection costs beside the vision encoder it follows, at LLaVA-1.5's real shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from benchmarks.checkpoints import write_llava15_vision
from benchmarks.measure import THREADS, Timing, exported, take_turns
from resprune.graphs import choose_form, token_select_model
from resprune.method import Selection
from resprune.runtime.backends.session import session_settings
from resprune.runtime.bundle.files import read_bundle

BUDGETS = (64, 128, 192)
Floats = npt.NDArray[np.float32]


def gram_schmidt(visual: Floats, gain: Floats, k: int) -> list[int]:
    """The plain form in NumPy, which streams V [N, D] once a pick: the yardstick, without the corner cases."""
    residual = visual.copy()
    picks: list[int] = []
    for _ in range(k):
        score = gain * np.einsum("nd,nd->n", residual, residual)
        score[picks] = -1
        pick = int(score.argmax())
        direction = residual[pick] / np.linalg.norm(residual[pick])
        residual -= np.outer(residual @ direction, direction)
        picks.append(pick)
    return picks


def run(work: Path) -> dict[str, Any]:
    """Export CLIP-L/336 with a projector to 4,096, verify it, and time encoder and selectors in turn."""
    checkpoint, bundle = work / "llava15-vision", work / "llava15-vision-k64"
    if not checkpoint.exists():
        write_llava15_vision(checkpoint)
    exported(checkpoint, bundle, "-k", "64", "--split")
    opened = read_bundle(bundle, check_hashes=False)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((1, 3, 336, 336)).astype(np.float32)
    encoder = cpu_session(str(opened.graph_path("vision_encoder")))
    (features,) = encoder.run(["image_features"], {"pixel_values": pixels})
    feed = selector_inputs(features, rng)
    calls: dict[str, Any] = {
        "vision encoder": lambda: encoder.run(["image_features"], {"pixel_values": pixels})
    }
    ones = np.ones(features.shape[1], np.float32)
    for k in BUDGETS:
        for body in ("loop", "unrolled"):
            session = selector(k, features.shape, body)
            calls[f"{body} K {k}"] = lambda session=session: session.run(None, feed)
        counted, kept = selector(k, features.shape, counts=True), feed | {"num_kept": np.array([k])}
        calls[f"counts K {k}"] = lambda session=counted, feed=kept: session.run(None, feed)
    # NumPy by itself: its threads spin on for a while, on the cores that the call after it needs.
    plain = {f"NumPy Gram-Schmidt K {k}": lambda k=k: gram_schmidt(features[0], ones, k) for k in BUDGETS}
    timings = take_turns(calls, repeats=11) | take_turns(plain, repeats=5)
    return {
        "shapes": {"pixels": [1, 3, 336, 336], "image_features": list(features.shape)},
        **beside_encoder(timings, timings["vision encoder"].median),
        "parity of the vision graphs": opened.manifest.parity,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    timings: dict[str, Timing] = result["milliseconds"]
    rows = [
        "| K | form | Loop | of the encoder | unrolled | of the encoder | Loop and `KeptCounts` | of the encoder "
        "| NumPy Gram-Schmidt |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    share = result["share of the encoder"]
    N, D = result["shapes"]["image_features"][1:]
    for k in BUDGETS:
        loop, unrolled, counts = (f"{call} K {k}" for call in ("loop", "unrolled", "counts"))
        rows.append(
            f"| {k} | {choose_form(k, N, D)} | {timings[loop]} ms | {share[loop]:.2%} "
            f"| {timings[unrolled]} ms | {share[unrolled]:.2%} | {timings[counts]} ms | {share[counts]:.2%} "
            f"| {timings[f'NumPy Gram-Schmidt K {k}']} ms |"
        )
    encoder = timings["vision encoder"]
    return f"CLIP-L/336 and projector, N {N}, D {D}, fp32: {encoder} ms.\n\n" + "\n".join(rows)


def selector(
    k: int, shape: tuple[int, ...], body: str = Selection.body, *, counts: bool = False
) -> ort.InferenceSession:
    """The selection of k tokens in the form that an export would choose for features of `shape` [B, N, D].

    With `counts` as for proportional attention, which takes `num_kept` as well.
    """
    form = choose_form(k, *shape[1:])
    model = token_select_model(Selection(k=k, body=body, form=form, counts=counts))
    return cpu_session(model.SerializeToString())


def selector_inputs(features: Floats, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a selector of `features` [B, N, D], with four keywords drawn at random."""
    batch, _, width = features.shape
    return {
        "image_features": features,
        "text_embeds": rng.standard_normal((batch, 4, width)).astype(np.float32),
        "text_mask": np.ones((batch, 4), dtype=bool),
        "token_mask": np.ones(features.shape[:2], dtype=bool),
    }


def beside_encoder(timings: Mapping[str, Timing], encoder: float) -> dict[str, Any]:
    """Timings, and the share that the median of each is of the `encoder`'s milliseconds."""
    return {
        "milliseconds": timings,
        "share of the encoder": {name: timing.median / encoder for name, timing in timings.items()},
    }


def cpu_session(model: str | bytes) -> ort.InferenceSession:
    """A session as the runtime opens it, with every thread there is."""
    return ort.InferenceSession(model, session_settings(THREADS), providers=["CPUExecutionProvider"])
