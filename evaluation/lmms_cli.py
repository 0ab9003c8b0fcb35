"""`resprune lmms`: published benchmarks through lmms-eval. Heavy imports happen only when it runs."""

from __future__ import annotations

import argparse
import json
import numbers
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resprune.evaluation.budget import Budget
from resprune.exporter.cli import POSIX
from resprune.runtime.errors import ResPruneError, one_line, require_packages
from resprune.runtime.manifest import ATTENTION, POSITIONS

if TYPE_CHECKING:
    from resprune.evaluation.lmms import ResPrune

NEEDED = ("lmms_eval", "accelerate", "datasets", "evaluate", "loguru", "pytz", "sacrebleu", "tenacity")

FOUND = ("results", "n-samples", "configs")
"""What `results.json` keeps of lmms-eval's own results, each by task."""


def register_lmms(subparsers: Any) -> None:
    """Add the subcommand `lmms`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "lmms",
        help="run published benchmarks through lmms-eval",
        description="Answer the questions of lmms-eval's tasks with K visual tokens of each picture.",
    )
    parser.add_argument(
        "model",
        metavar="BUNDLE_OR_MODEL",
        help="a bundle exported with --split, or what resprune export takes, which then runs in PyTorch",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="by commas: names of lmms-eval's tasks, files of tasks in its format (.yaml), and resprune_scenes, "
        "resprune_crowd, resprune_easyvqa, which need no network",
    )
    parser.add_argument("-k", required=True, metavar="K", help="a number, a share like 11%%, or all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where the results go")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    parser.add_argument("--positions", choices=POSITIONS, help="in place of the model's own policy")
    parser.add_argument("--attention", choices=ATTENTION, help="in place of the model's own")
    parser.add_argument(
        "--device",
        default="cpu",
        help="of a checkpoint in PyTorch; a bundle runs on the CPU (default: %(default)s)",
    )
    parser.set_defaults(run=run_lmms)


def run_lmms(arguments: argparse.Namespace) -> int:
    """Run the tasks and write what they found; raises `ResPruneError` for what the user can put right."""
    way = 'pip install "resprune[lmms]", then pip install --no-deps lmms-eval'
    require_packages("lmms", NEEDED, f"`make eval` installs it, and so do: {way}")
    require_packages("lmms", *POSIX)
    Budget.parse(arguments.k)
    if arguments.limit is not None and arguments.limit < 1:
        raise ResPruneError(f"--limit should be 1 or more, not {arguments.limit}")
    names = list(dict.fromkeys(word.strip() for word in arguments.tasks.split(",") if word.strip()))
    if not names:
        raise ResPruneError("--tasks names none; give names of lmms-eval's tasks, or resprune_scenes")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResPruneError(f"{arguments.out} cannot be written: {error.strerror}") from None

    from loguru import logger
    from tenacity import RetryError

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    try:
        results, model = _evaluate(names, arguments)
    except RetryError as error:  # of the download of a task's data
        reason = one_line(error.last_attempt.exception())
        raise ResPruneError(
            f"a task's data cannot be loaded ({reason}); most are on huggingface.co, after `hf auth login`; "
            "resprune_scenes needs no network"
        ) from None
    except ModuleNotFoundError as error:
        raise ResPruneError(
            f"a task needs the package {error.name}; install it beside lmms-eval, with pip"
        ) from None
    _write(results, model, arguments)
    return 0


def _evaluate(names: list[str], arguments: argparse.Namespace) -> tuple[dict[str, Any], ResPrune]:
    """What lmms-eval found, and the model it asked."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model

    from resprune.evaluation.lmms_tasks import find_tasks, index

    manager = index(names)
    with tempfile.TemporaryDirectory(prefix="resprune-") as work:
        tasks = find_tasks(names, manager, arguments.limit, Path(work))
        model: ResPrune = get_model("resprune")(
            model=arguments.model,
            k=arguments.k,
            positions=arguments.positions,
            attention=arguments.attention,
            device=arguments.device,
            answers=str(arguments.out),
        )
        results: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=arguments.limit,
            batch_size=1,
            log_samples=True,
            verbosity="WARNING",
            # What tasks read of lmms-eval's own command line: where a file for a server's judge goes.
            cli_args=argparse.Namespace(output_path=str(arguments.out), process_with_media=False),
        )
    return results, model


def _write(results: dict[str, Any], model: ResPrune, arguments: argparse.Namespace) -> None:
    """`results.json`, where tasks that were asked before stay, `samples-<task>.jsonl`, and a table to stdout."""
    from lmms_eval.utils import handle_non_serializable

    def text(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent) + "\n"

    settings = {
        "model": arguments.model,
        "fingerprint": model.fingerprint,
        "k": arguments.k,
        "positions": arguments.positions,
        "attention": arguments.attention,
        "limit": arguments.limit,
        "device": model.engine.device,
        "threads": model.engine.threads,
        "versions": model.engine.versions | {"lmms-eval": version("lmms-eval")},
    }
    path = arguments.out / "results.json"
    found = _found_before(path, settings)
    summary = {key: found.get(key, {}) | results[key] for key in FOUND}
    try:
        whole = path.with_suffix(".new")
        whole.write_text(text({"settings": settings} | summary, 1), encoding="utf-8")
        whole.replace(path)
        for task, samples in results["samples"].items():
            lines = [
                {"number": row["doc_id"], "target": row["target"], "answer": row["filtered_resps"][0]}
                for row in samples
            ]
            samples_file = arguments.out / f"samples-{task}.jsonl"
            samples_file.write_text("".join(map(text, lines)), encoding="utf-8")
    except OSError as error:
        raise ResPruneError(
            f"{error.filename or arguments.out} cannot be written: {error.strerror}"
        ) from None
    print(table(summary))


def _found_before(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `results.json` has of other tasks under the same settings; nothing where it is another's, or damaged."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in FOUND)
    return found if whole and found.get("settings") == settings else {}


def table(results: dict[str, Any]) -> str:
    """Every number that lmms-eval found, with its standard error, as Markdown."""
    rows = ["| task | questions | metric | value | standard error |", "|---|---|---|---|---|"]
    for task, found in results["results"].items():
        questions = results["n-samples"].get(task, {}).get("effective", "")
        for name, value in found.items():
            metric, _, filtered = name.partition(",")
            if "_stderr" in metric or not isinstance(value, numbers.Real):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            spread = f"{error:.4f}" if isinstance(error, numbers.Real) else ""
            rows.append(f"| {task} | {questions} | {metric} | {value:.4f} | {spread} |")
    return "\n".join(rows)
