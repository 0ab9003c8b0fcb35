"""`python -m benchmarks [part …]`: measure, and write benchmarks/results/<part>.json and the pages of tables."""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import resprune
from benchmarks import (
    ablation,
    accuracy,
    blocks,
    cold,
    counting,
    decode,
    demo,
    early,
    early_time,
    engines,
    export_size,
    families,
    growth,
    llamacpp,
    llava_next,
    losses,
    pages,
    peers,
    precision,
    precision_demo,
    qwen_vl,
    reconstruction,
    rounding,
    selection,
    separators,
    served,
    speed,
    taggers,
)
from benchmarks.measure import machine, plain

HERE = Path(__file__).parent
DRAWN = {
    "speed": speed.draw,
    "peers": peers.draw,
    "accuracy": accuracy.draw,
    "reconstruction": reconstruction.draw,
}
"""What draws a part's plots, from its figures as JSON."""
PARTS = {
    "selection": ("The selection beside the vision encoder", selection.run, selection.table),
    "llava_next": ("LLaVA-NeXT's selection beside its vision encoder", llava_next.run, llava_next.table),
    "qwen_vl": ("Qwen2.5-VL's vision tower: memory, and the selection beside it", qwen_vl.run, qwen_vl.table),
    "growth": ("The selection's two forms as the tokens grow in number", growth.run, growth.table),
    "early": ("What a selection inside the vision tower loses", early.run, early.table),
    "early_time": ("What a selection inside the vision tower saves", early_time.run, early_time.table),
    "engines": ("TensorRT engines, built without a GPU", engines.run, engines.table),
    "export_size": ("Exports of checkpoints of real size", export_size.run, export_size.table),
    "cold": ("Starts of bundles of real size", cold.run, cold.table),
    "families": ("The newer families at real shapes", families.run, families.table),
    "separators": ("SmolVLM's markers of tiles that keep nothing", separators.run, separators.table),
    "demo": ("The demo model", demo.run_demo, demo.table),
    "speed": ("Time to the first token, beside Hugging Face in PyTorch", speed.run, speed.table),
    "peers": ("Beside OpenVINO GenAI and its pruner", peers.run, peers.table),
    "decode": ("Tokens per second, beside onnxruntime-genai", decode.run, decode.table),
    "llamacpp": ("Prefill and tokens per second, beside llama.cpp", llamacpp.run, llamacpp.table),
    "served": ("A vLLM that is asked by several at once", served.run, served.table),
    "accuracy": ("The demo model's answers with fewer tokens", accuracy.run, accuracy.table),
    "precision": ("Precisions on trained weights", precision.run, precision.table),
    "losses": ("What packed weights lose, beside OpenVINO", losses.run, losses.table),
    "rounding": ("Ways to choose 4-bit numbers", rounding.run, rounding.table),
    "blocks": ("Block sizes and accuracy levels of packed weights", blocks.run, blocks.table),
    "precision_demo": ("Precisions and the demo model's answers", precision_demo.run, precision_demo.table),
    "ablation": ("The method's open choices", ablation.run, ablation.table),
    "reconstruction": ("Reconstruction", reconstruction.run, reconstruction.table),
    "taggers": ("Ways to find a question's keywords", taggers.run, taggers.table),
    "counting": ("Why counting suffers from pruning", counting.run, counting.table),
}


def main() -> None:
    """Run the parts that are named, or all, and write down what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help="which to measure; all if none is named"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench"), help="where checkpoints and bundles go"
    )
    parser.add_argument("--draw", action="store_true", help="only draw the plots of results/ again")
    parser.add_argument("--pages", action="store_true", help="only write the pages from results/ again")
    arguments = parser.parse_args()
    if arguments.draw:
        for part in set(DRAWN) & set(arguments.parts or DRAWN):
            DRAWN[part](json.loads((HERE / "results" / f"{part}.json").read_text())["figures"])
    if arguments.pages:
        pages.write([*PARTS])
    if arguments.draw or arguments.pages:
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    (HERE / "results").mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        title, measure, table = PARTS[part]
        result = measure(arguments.work)
        record: dict[str, Any] = {
            "title": title,
            "measured": date.today().isoformat(),
            "version": resprune.__version__,
            "machine": machine(),
            "table": table(result),
        }
        record["figures"] = plain(result)
        (HERE / "results" / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
        if part in DRAWN:
            DRAWN[part](record["figures"])
        print(f"\n## {title}\n\n{record['table']}\n", flush=True)
    pages.write([*PARTS])


if __name__ == "__main__":
    main()
