"""What `--early` saves: of CLIP-L/336 with LLaVA-1.5's projector, and of the first token with 1.1 B of language model.

Beside it stands what users have already, a smaller image whose tower costs about the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.checkpoints import write_llava15_vision
from benchmarks.measure import THREADS, exported, take_turns, timing
from benchmarks.shapes import LLAVA, QUESTION, Shape, write_picture
from benchmarks.speed import checkpoint_of
from benchmarks.stages import Stages
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.providers import CPU, new_session
from resprune.runtime.backends.session import OrtGraphs, SessionOptions, session_settings
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.families.image import load_image
from resprune.runtime.prompt.splice import KeptTokens
from resprune.runtime.walk import Encoded, Walk

K = 64
PREDICTED = {"8:288": 0.67, "6:192": 0.50, "4:192": 0.45}
"""`--early`, and the share of the tower's time that was predicted before it was measured: rows times blocks."""
SMALLER = {280: 400, 238: 289, 224: 256}
"""Pixels and tokens of a smaller image, about as much work as each of these settings."""
PRECISIONS = {"fp32": (), "preset cpu": ("--preset", "cpu")}
REPEATS = 5
BATCHES = (1, 3)
"""Images at once: LLaVA-1.5's one, and three tiles of LLaVA-NeXT."""


def run(work: Path) -> dict[str, Any]:
    """Tower and first token by precision, with the checkpoints and bundles under `work`."""
    return {
        name: {"tower": tower(work, options), "first token": first_token(work, options)}
        for name, options in PRECISIONS.items()
    }


def tower(work: Path, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Processor milliseconds of `vision_select` with and without `--early`, in turns, by images at once.

    On one thread, and of the processor's own clock, which runs on for nobody else on a busy machine.
    """
    checkpoint = work / "llava15-vision"
    if not checkpoint.exists():
        write_llava15_vision(checkpoint)
    sessions = {}
    for setting in ("none", *PREDICTED):
        bundle = _export(checkpoint, work, setting, options)
        path = str(read_bundle(bundle, check_hashes=False).graph_path("vision_select"))
        sessions[setting] = new_session(path, session_settings(1), (CPU,))
    result: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for batch in BATCHES:
        feed = {
            "pixel_values": rng.standard_normal((batch, 3, 336, 336)).astype(np.float32),
            "text_embeds": rng.standard_normal((batch, 4, 4096)).astype(np.float32),
            "text_mask": np.ones((batch, 4), dtype=bool),
        }
        spent: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(REPEATS):
            for name, session in sessions.items():
                start = process_time()
                session.run(["image_features"], feed)
                spent[name].append(1e3 * (process_time() - start))
        timings = {name: timing(np.array(values)) for name, values in spent.items()}
        shares = {name: timings[name].median / timings["none"].median for name in PREDICTED}
        result[str(batch)] = {
            "milliseconds": timings,
            "share": shares,
            "part of the predicted gain": {
                name: (1 - share) / (1 - PREDICTED[name]) for name, share in shares.items()
            },
        }
    return result


def first_token(work: Path, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Milliseconds from an image's file to the first token at K 64, in turns; all towers feed one language model.

    Predicted is the measured first token without `--early`, with the tower's share of it as predicted.
    """
    picture = work / f"{LLAVA.name}.png"
    write_picture(LLAVA.picture, picture)
    checkpoint = checkpoint_of(LLAVA, work)
    whole = exported(checkpoint, work / "early-whole", "-k", str(K), "--verify", "layers", *options)
    stages = Stages(read_bundle(whole, check_hashes=False))
    towers = {"none": stages.walk}
    for setting in PREDICTED:
        towers[setting] = _tower(checkpoint, work, setting, options)
    for side, tokens in SMALLER.items():
        towers[f"{side} pixels"] = _tower(checkpoint_of(_smaller(side, tokens), work), work, "none", options)
    prompt = stages.prompt(QUESTION)

    def select(walk: Walk) -> KeptTokens:
        image = walk.preprocessor(load_image(picture))
        return walk.select([Encoded(image)], [stages.walk.keywords(*prompt)], [K])[0]

    def ask(walk: Walk) -> None:
        stages.prefill(stages.prompt(QUESTION), select(walk))

    first = take_turns({name: partial(ask, walk) for name, walk in towers.items()}, REPEATS)
    towers_alone = take_turns({name: partial(select, walk) for name, walk in towers.items()}, REPEATS)
    rest = first["none"].median - towers_alone["none"].median
    work_left = PREDICTED | {f"{side} pixels": tokens / LLAVA.num_tokens for side, tokens in SMALLER.items()}
    return {
        "milliseconds": first,
        "image and selection alone": towers_alone,
        "share": {name: first[name].median / first["none"].median for name in work_left},
        "predicted": {
            name: (left * towers_alone["none"].median + rest) / first["none"].median
            for name, left in work_left.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        "| CLIP-L/336, images | precision | `--early` | ms of one core | share | predicted | of the predicted gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision, parts in result.items():
        for batch, figures in parts["tower"].items():
            timings = figures["milliseconds"]
            rows.append(f"| {batch} | {precision} | none | {timings['none']} | | | |")
            rows += [
                f"| {batch} | {precision} | {name} | {timings[name]} | {share:.2f} | {PREDICTED[name]:.2f} "
                f"| {figures['part of the predicted gain'][name]:.0%} |"
                for name, share in figures["share"].items()
            ]
    firsts = [
        f"First token at K {K}: {LLAVA.words}; {THREADS} threads. A smaller image has the number of tokens that costs "
        "its tower about as much.\n",
        "| precision | tower | image and selection | first token | share | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for precision, parts in result.items():
        found = parts["first token"]
        for name, first in found["milliseconds"].items():
            shares = (
                f"{found['share'][name]:.2f} | {found['predicted'][name]:.2f}" if name != "none" else "| "
            )
            firsts.append(
                f"| {precision} | {name} | {found['image and selection alone'][name]} ms | {first} ms | {shares} |"
            )
    return "\n\n".join(["\n".join(rows), "\n".join(firsts)])


def _smaller(side: int, tokens: int) -> Shape:
    """LLaVA-1.5's tower for a smaller image, on one layer of its language model, which is not run."""
    return replace(
        LLAVA,
        name=f"{LLAVA.name}-{side}",
        vision={**LLAVA.vision, "image_size": side},
        text={**LLAVA.text, "num_hidden_layers": 1},
        num_tokens=tokens,
    )


def _tower(checkpoint: Path, work: Path, setting: str, options: tuple[str, ...]) -> Walk:
    """From pixels to kept tokens, without the decoder."""
    bundle = read_bundle(
        _export(checkpoint, work, setting, (*options, "--without-decoder")), check_hashes=False
    )
    graphs = OrtGraphs(bundle, SessionOptions((CPU,), THREADS))
    return Walk(bundle, graphs, Embedding(graphs))


def _export(checkpoint: Path, work: Path, setting: str, options: tuple[str, ...]) -> Path:
    name = "-".join(
        [checkpoint.name, "early", setting.replace(":", "-"), *(word.lstrip("-") for word in options)]
    )
    early = () if setting == "none" else ("--early", setting)
    return exported(checkpoint, work / name, "-k", str(K), "--verify", "layers", *early, *options)
