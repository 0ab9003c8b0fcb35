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

from resprune.evaluation.cli import add_model, read_budgets, require_bundle_or_model, words
from resprune.exporter.cli import POSIX
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.errors import ResPruneError, one_line, require_packages

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
        description="Answer the questions of lmms-eval's tasks with K visual tokens of each image.",
    )
    add_model(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="by commas: names of lmms-eval's tasks, files of tasks in its format (.yaml), and resprune_scenes, "
        "resprune_crowd, resprune_easyvqa, which need no network",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where the results go")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    parser.set_defaults(run=run_lmms)


def run_lmms(arguments: argparse.Namespace) -> int:
    """Run the tasks and write what they found; raises `ResPruneError` for what the user can put right."""
    way = 'pip install "resprune[lmms]", then pip install --no-deps lmms-eval'
    require_packages("lmms", NEEDED, f"`make eval` installs it, and so do: {way}")
    require_packages("lmms", *POSIX)
    budgets = read_budgets(arguments.k)
    if arguments.limit is not None and arguments.limit < 1:
        raise ResPruneError(f"--limit should be 1 or more, not {arguments.limit}")
    names = words(arguments.tasks)
    if not names:
        raise ResPruneError("--tasks names none; give names of lmms-eval's tasks, or resprune_scenes")

    require_bundle_or_model(arguments.model)
    from loguru import logger
    from tenacity import RetryError

    from resprune.evaluation.answers import output

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    try:
        with output(arguments.out):
            found = _evaluate(names, budgets, arguments)
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
    print(table(found))
    return 0


def _evaluate(names: list[str], budgets: list[Budget], arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask every task with one budget after the other, and write what lmms-eval finds; returns that by budget."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model

    from resprune.evaluation.lmms_tasks import find_tasks, index

    manager = index(names)
    with tempfile.TemporaryDirectory(prefix="resprune-") as work:
        tasks = find_tasks(names, manager, arguments.limit, Path(work))
        model: ResPrune = get_model("resprune")(
            model=arguments.model,
            k=budgets[0],
            positions=arguments.positions,
            attention=arguments.attention,
            device=arguments.device,
            answers=str(arguments.out),
        )
        model.check(budgets)
        found: dict[str, Any] = {}
        for model.budget in budgets:
            folder = arguments.out / f"k{model.budget}"
            results: Any = simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=arguments.limit,
                batch_size=1,
                log_samples=True,
                verbosity="WARNING",
                # What tasks read of lmms-eval's own command line: where a file for a server's judge goes.
                cli_args=argparse.Namespace(output_path=str(folder), process_with_media=False),
            )
            found = _write(results, model, folder, arguments)
    return found


def _write(
    results: dict[str, Any], model: ResPrune, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`results.json`, where budgets and tasks that were asked before stay, and `samples-<task>.jsonl` in `folder`.

    Returns what `results.json` now has by budget.
    """
    from lmms_eval.utils import handle_non_serializable

    def text(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent) + "\n"

    settings = model.settings | {
        "name": arguments.model,
        "limit": arguments.limit,
        "device": model.engine.device,
        "threads": model.engine.threads,
        "versions": model.engine.versions | {"lmms-eval": version("lmms-eval")},
    }
    path = arguments.out / "results.json"
    found = _found_before(path, settings)
    before = found.get(str(model.budget), {})
    found[str(model.budget)] = {key: before.get(key, {}) | results[key] for key in FOUND}
    try:
        write_whole(path, text({"settings": settings, "k": found}, 1).encode())
        folder.mkdir(exist_ok=True)
        for task, samples in results["samples"].items():
            lines = [
                {"number": row["doc_id"], "target": row["target"], "answer": row["filtered_resps"][0]}
                for row in samples
            ]
            write_whole(folder / f"samples-{task}.jsonl", "".join(map(text, lines)).encode())
    except OSError as error:
        raise ResPruneError(
            f"{error.filename or arguments.out} cannot be written: {error.strerror}"
        ) from None
    return found


def _found_before(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `results.json` has by budget under the same settings; nothing where it is another's, or damaged."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("settings") != settings:
        return {}
    of_budget: dict[str, Any] = found.get("k", {})
    return of_budget


def table(found: dict[str, Any]) -> str:
    """Every number that lmms-eval found, by budget, with its standard error, as Markdown."""
    rows = ["| K | task | questions | metric | value | standard error |", "|---|---|---|---|---|---|"]
    for k, results in found.items():
        for task, values in results["results"].items():
            questions = results["n-samples"].get(task, {}).get("effective", "")
            for name, value in values.items():
                metric, _, filtered = name.partition(",")
                if "_stderr" in metric or not isinstance(value, numbers.Real):
                    continue
                error = values.get(f"{metric}_stderr,{filtered}")
                spread = f"{error:.4f}" if isinstance(error, numbers.Real) else ""
                rows.append(f"| {k} | {task} | {questions} | {metric} | {value:.4f} | {spread} |")
    return "\n".join(rows)
