"""Hostile inputs in bulk: `python -m tests.hostile.fuzz --count 5000 --seed 1` (`make fuzz`).

Cases run in two worker processes, many in each; one that hangs or fills the memory is ended with its worker, and the
next case goes on in a new one. What breaks a promise is printed with its number: `--first N --count 1` repeats it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import psutil

from tests.hostile.case import World
from tests.hostile.worker import SHARES, Result

OFFLINE = ("image", "bundle", "option")
SECONDS, BYTES = 60, 2 << 30
"""When a case is ended from outside: seconds of processor time, and bytes of memory. What it may take is less."""
SILENCE = 240
"""Seconds after which a case that does nothing is ended."""


def fuzz(world: World, seed: int, numbers: range, kinds: Sequence[str]) -> list[Result]:
    """The results of the cases with these numbers."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        described = Path(folder) / "world.json"
        described.write_text(json.dumps(asdict(world), default=str))
        groups = [
            [kind for kind in kinds if kind in OFFLINE],
            [kind for kind in kinds if kind not in OFFLINE],
        ]
        shares = [sum(SHARES[kind] for kind in group) for group in groups]
        cut = numbers.start + len(numbers) * shares[0] // sum(shares)
        jobs = [(groups[0], range(numbers.start, cut)), (groups[1], range(cut, numbers.stop))]
        half = numbers.start + (cut - numbers.start) // 2
        jobs[:1] = [(groups[0], range(numbers.start, half)), (groups[0], range(half, cut))]
        with ThreadPoolExecutor(2) as threads:
            done = threads.map(
                lambda job: list(_run(described, seed, job[1], job[0])) if job[0] else [], jobs
            )
            return [result for results in done for result in results]


def _run(world: Path, seed: int, numbers: range, kinds: Sequence[str]) -> Iterator[Result]:
    """Results of a range of cases, in as many workers as it takes."""
    first = numbers.start
    while first < numbers.stop:
        command = [
            sys.executable,
            "-m",
            "tests.hostile.worker",
            str(world),
            str(seed),
            str(first),
            str(numbers.stop),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        worker = subprocess.Popen(
            [*command, ",".join(kinds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        said: Queue[str] = Queue()
        reader = Thread(target=_read, args=(worker, said), daemon=True)
        reader.start()
        for line in _lines(worker, said):
            told = json.loads(line)
            if "pid" in told:
                first = told["case"]
                continue
            first += 1
            yield Result(**told)
        if first < numbers.stop:
            worker.kill()
            _, err = worker.communicate()
            yield Result(
                first,
                ",".join(kinds),
                "?",
                worker.returncode,
                0.0,
                0.0,
                "",
                err[-3000:],
                ["the worker died or was ended"],
            )
            first += 1
        worker.kill()
        worker.wait()


def _read(worker: "subprocess.Popen[str]", said: "Queue[str]") -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        said.put(line)
    said.put("")


def _lines(worker: "subprocess.Popen[str]", said: "Queue[str]") -> Iterator[str]:
    """What a worker prints, until it ends or a case takes far too much."""
    process = psutil.Process(worker.pid)
    since, used = time.monotonic(), 0.0
    while True:
        try:
            line = said.get(timeout=0.2)
        except Empty:
            try:
                spent, memory = sum(process.cpu_times()[:2]), process.memory_info().rss
            except psutil.Error:
                continue
            if spent - used > SECONDS or memory > BYTES or time.monotonic() - since > SILENCE:
                return
            continue
        if not line:
            return
        with suppress(psutil.Error):
            since, used = time.monotonic(), sum(process.cpu_times()[:2])
        yield line


def make_world(folder: Path) -> World:
    """Bundles and checkpoints of tiny models with random weights, one for each way to prepare images."""
    from resprune.exporter.export import export
    from resprune.exporter.options import Options
    from tests import tiny, tiny_qwen, tiny_tiles

    options = {
        "clip-llama": Options(k=7, split=True),
        "next-llama": Options(k=7),
        "qwen25": Options(share=0.4),
        "qwen3": Options(k=7),
        "internvl-qwen2": Options(k=7),
        "smolvlm": Options(k=7),
    }
    checkpoints: dict[str, Path] = {}
    for name in options:
        module: Any = next(one for one in (tiny, tiny_qwen, tiny_tiles) if name in one.VARIANTS)
        checkpoints[name] = module.write_checkpoint(folder / "checkpoints" / name, module.VARIANTS[name])
    bundles = {
        name: export(str(checkpoints[name]), folder / "bundles" / name, chosen)
        for name, chosen in options.items()
    }
    return World(bundles, checkpoints, write_photo(folder / "photo.png"))


def write_photo(path: Path) -> Path:
    """A photo, of sorts."""
    from PIL import Image

    grey = Image.linear_gradient("L").resize((60, 50))
    Image.merge("RGB", [grey, grey.rotate(180), grey.point(lambda value: value // 2)]).save(path)
    return path


def report(results: Sequence[Result], seconds: float) -> str:
    """A few lines on what came of the cases, and all on those that broke a promise."""
    lines = [f"{len(results)} hostile inputs in {seconds:.0f} s"]
    for kind in SHARES:
        of_kind = [result for result in results if result.kind == kind]
        if of_kind:
            counts = Counter(result.status for result in of_kind)
            statuses = ", ".join(f"{count} x status {status}" for status, count in sorted(counts.items()))
            slowest = max(result.seconds for result in of_kind)
            largest = max(result.megabytes for result in of_kind)
            lines.append(
                f"  {kind:<11}{len(of_kind):>5}: {statuses}; at most {slowest:.1f} s, {largest:.0f} MB"
            )
    for result in results:
        if result.wrong:
            lines.append(f"case {result.number} ({result.kind}, {result.what}): {'; '.join(result.wrong)}")
            lines += [f"    {line}" for line in (result.err or result.out[:300])[-1500:].splitlines()]
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kinds", default=",".join(SHARES))
    parser.add_argument("--world", type=Path, help="folder to keep the bundles in; made if it is not there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-world-") as made:
        folder = given.world or Path(made)
        saved = folder / "world.json"
        if saved.exists():
            paths = json.loads(saved.read_text())
            world = World(
                *(
                    {name: Path(path) for name, path in paths[key].items()}
                    for key in ("bundles", "checkpoints")
                ),
                Path(paths["photo"]),
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            world = make_world(folder)
            saved.write_text(json.dumps(asdict(world), default=str))
        start = time.monotonic()
        results = fuzz(
            world, given.seed, range(given.first, given.first + given.count), given.kinds.split(",")
        )
        print(f"seed {given.seed}: {report(results, time.monotonic() - start)}")
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
