"""A model in this tree and in an older one, question by question in turns.

`python -m benchmarks.before_after OLDER_TREE` (a checkout: `git worktree add OLDER_TREE COMMIT`) exports the demo with
either tree, holds both in processes of their own, and lets them take turns, so that a busy minute hits both alike.
`--model llava15` does it with random weights of a LLaVA-1.5 of 1.1 B (benchmarks/shapes.py), some 11 GB a tree.
On a machine that has other work to do look at the ratios of processor time.
Prints the ratios of this tree to the older one, and writes them as JSON to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.shapes import REAL, write_picture
from benchmarks.speed import checkpoint_of

ROOT = Path(__file__).parent.parent
DEMO = "demo"
ROOMS = ("runtime", "graphs", "exporter", "evaluation")
EXPORT = """
import sys
from pathlib import Path
from resprune.exporter.export import Options, export
model, out, k, verify = sys.argv[1:]
options = Options(k=int(k), split=True, positions="original", verify=verify)
export(model, Path(out), options, lambda line: None)
"""
# Older trees have no Pipeline at the top.
ASK = """
import json, sys, time
from itertools import count
start = time.perf_counter(), time.process_time()
try:
    from resprune import Pipeline
except ImportError:
    from resprune.runtime import Pipeline
vlm = Pipeline.load(sys.argv[1], threads=1)
picture, question = sys.argv[2], "What color is the large square?"
vlm.ask(picture, question, stream=False)
print(json.dumps({"start": [time.perf_counter() - start[0], time.process_time() - start[1]]}), flush=True)
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
path = f"{sys.argv[1]}/onnx/token_select.onnx"
selector = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
graphs = json.load(open(f"{sys.argv[1]}/resprune.json"))["graphs"]
tokens, width = graphs["vision_encoder"]["outputs"][0]["shape"][1:]
random = np.random.default_rng(0)
feeds = {
    "image_features": random.standard_normal((1, tokens, width), np.float32),
    "token_mask": np.ones((1, tokens), bool),
    "text_embeds": random.standard_normal((1, 2, width), np.float32),
    "text_mask": np.ones((1, 2), bool),
}
words = "cat dog bird horse chair table window door lamp clock kettle spoon".split()
for number, line in zip(count(), sys.stdin):
    # Words that stand in no cache: a number has its own.
    word = words[number % len(words)]
    start = time.perf_counter(), time.process_time()
    answer = vlm.ask(picture, f"What color is the {word} number {number}?", max_new_tokens=1)
    next(iter(answer))
    new = time.perf_counter() - start[0], time.process_time() - start[1]
    answer.finish()
    start = time.perf_counter(), time.process_time()
    selector.run(None, feeds)
    selection = time.perf_counter() - start[0], time.process_time() - start[1]
    start = time.perf_counter(), time.process_time()
    answer = vlm.ask(picture, question, max_new_tokens=9)
    next(iter(answer))
    told = time.perf_counter(), time.process_time()
    first = told[0] - start[0], told[1] - start[1]
    answer.finish()
    decode = time.perf_counter() - told[0], time.process_time() - told[1]
    view = vlm.look(picture)
    whole = time.perf_counter(), time.process_time()
    view.ask(question, tokens=16, max_new_tokens=1, stream=False)
    asked = time.perf_counter() - whole[0], time.process_time() - whole[1]
    measured = {"first token": first, "first token, new question": new, "selection": selection}
    print(json.dumps({**measured, "decode": decode, "view": asked}), flush=True)
"""


@contextmanager
def packages(older: Path) -> Iterator[dict[str, Path]]:
    """Name → the folder that `resprune` is imported from; an older tree may have only the rooms."""
    with tempfile.TemporaryDirectory() as folder:
        found = older
        if not (older / "resprune").exists():
            found = Path(folder)
            (found / "resprune").mkdir()
            (found / "resprune" / "__init__.py").touch()
            for room in ROOMS:
                (found / "resprune" / room).symlink_to((older / room).resolve())
        yield {"before": found, "after": ROOT}


def environment(package: Path) -> dict[str, str]:
    """Where Python takes `resprune` from, and one thread: waiting threads would measure the machine.

    Compiled modules are kept, as where a package is installed: a start would measure the compiler.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    caches = {"PYTHONPYCACHEPREFIX": str(ROOT / "build" / "pycache")}
    return kept | caches | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}


def subject(model: str, work: Path) -> tuple[str, Path, str, str]:
    """Checkpoint, image, K and how far the export compares."""
    if model == DEMO:
        return DEMO, ROOT / "demo" / "pictures" / "shapes.png", "16", "full"
    shape = next(shape for shape in REAL if shape.name == model)
    picture = work / f"{model}.png"
    write_picture(shape.picture, picture)
    return str(checkpoint_of(shape, work).resolve()), picture.resolve(), str(shape.budgets[0]), "layers"


def measure(
    model: str, work: Path, older: Path, turns: int, starts: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Tree → what was measured → a pair for each turn: seconds, and seconds of processor time."""
    checkpoint, picture, k, verify = subject(model, work)
    samples: dict[str, dict[str, list[list[float]]]] = {"before": {}, "after": {}}
    with packages(older) as found, tempfile.TemporaryDirectory(dir=work) as folder:
        commands: dict[str, list[str]] = {}
        for name, package in found.items():
            bundle = str(Path(folder).resolve() / name)
            command = [sys.executable, "-c", EXPORT, checkpoint, bundle, k, verify]
            subprocess.run(command, check=True, env=environment(package), cwd=folder)
            commands[name] = [sys.executable, "-c", ASK, bundle, str(picture)]

        def start(name: str, stack: ExitStack) -> subprocess.Popen[str]:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(commands[name], env=environment(found[name]), cwd=folder, **pipes)
            stack.callback(process.wait)
            stack.callback(process.kill)
            note(name, process)
            return process

        def note(name: str, process: subprocess.Popen[str]) -> None:
            assert process.stdout is not None
            for what, pair in json.loads(process.stdout.readline()).items():
                samples[name].setdefault(what, []).append(pair)

        for number in range(starts):  # where a process has its memory makes it faster or slower than the next
            order = [*commands] if number % 2 else [*reversed(commands)]
            with ExitStack() as stack:
                open_ = {name: start(name, stack) for name in order}
                for _ in range(turns // starts):
                    for name, process in open_.items():
                        assert process.stdin is not None
                        process.stdin.write("\n")
                        process.stdin.flush()
                        note(name, process)
    return samples


def ratios(samples: dict[str, dict[str, list[list[float]]]]) -> dict[str, dict[str, float]]:
    """What was measured → this tree's over the older one's, of the best and the median; above 1 is slower."""
    found: dict[str, dict[str, float]] = {}
    for what, before in samples["before"].items():
        after = samples["after"][what]
        row: dict[str, float] = {"turns": len(after)}
        for index, kind in enumerate(("seconds", "processor")):
            old, new = ([pair[index] for pair in pairs] for pairs in (before, after))
            if min(old):
                row |= {f"{kind} before": round(statistics.median(old), 6)}
                row |= {f"{kind} best": round(min(new) / min(old), 4)}
                row |= {f"{kind} median": round(statistics.median(new) / statistics.median(old), 4)}
        found[what] = row
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("older", type=Path)
    parser.add_argument("--model", choices=[DEMO, *(shape.name for shape in REAL)], default=DEMO)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "before_after.json")
    given = parser.parse_args()
    commits = {
        name: subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=tree, text=True).strip()
        for name, tree in (("before", given.older), ("after", ROOT))
    }
    given.work.mkdir(parents=True, exist_ok=True)
    found = ratios(measure(given.model, given.work, given.older.resolve(), given.turns, given.starts))
    for what, row in found.items():
        print(what, row)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"commits": commits, "machine": machine(), "ratios": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
