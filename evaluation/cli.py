"""`resprune eval`: arguments in, a report out. Heavy imports happen only when it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from resprune.exporter.cli import POSIX
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.manifest import ATTENTION, MANIFEST_NAME, POSITIONS
from resprune.runtime.errors import ResPruneError, require_packages, require_python

if TYPE_CHECKING:
    from resprune.evaluation.model import Model

NEEDED = ("matplotlib", "scipy", "tqdm")
LEAST = {"limit": 1, "batch": 1, "max_new_tokens": 1, "seed": 0}


def register_eval(subparsers: Any) -> None:
    """Add the subcommand `eval`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="measure what pruning costs: exact match against K",
        description="Ask a model questions with known answers, with K of N visual tokens chosen in several ways.",
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="NAMES",
        help="easyvqa, scenes, crowd, or files of JSON Lines with image, question and answer (or answers), by commas",
    )
    parser.add_argument(
        "--selectors",
        default="resprune",
        metavar="NAMES",
        help="by commas; all is every one but resize, a smaller image (default: %(default)s)",
    )
    parser.add_argument(
        "--early",
        default="",
        metavar="LIST",
        help="what resprune export --early takes, by commas: a selector more each, of a checkpoint in PyTorch "
        "(default: none)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where the report goes")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="questions of each data set, evenly spread (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first random draw (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="questions at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=16, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="of ONNX Runtime or PyTorch (default: OMP_NUM_THREADS, or one a physical core)",
    )
    parser.set_defaults(run=run_eval)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what is evaluated, and how: BUNDLE_OR_MODEL, -k, --positions, --attention and --device."""
    parser.add_argument(
        "model",
        metavar="BUNDLE_OR_MODEL",
        help="a bundle exported with --split, or what resprune export takes, which then runs in PyTorch",
    )
    parser.add_argument(
        "-k", required=True, metavar="LIST", help="budgets by commas: numbers, shares like 11%%, and all"
    )
    parser.add_argument(
        "--positions", choices=POSITIONS, help="position ids of the pruned prompt (default: the model's own)"
    )
    parser.add_argument(
        "--attention", choices=ATTENTION, help="how kept tokens count (default: the model's own)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="of a checkpoint in PyTorch; a bundle runs on the CPU (default: %(default)s)",
    )


def run_eval(arguments: argparse.Namespace) -> int:
    """Evaluate and write the report; raises `ResPruneError` for what the user can put right."""
    require_python("eval", (3, 11))
    require_packages("eval", NEEDED, 'install with: pip install "resprune[eval]"')
    require_packages("eval", *POSIX)
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ResPruneError(f"--{name.replace('_', '-')} should be {least} or more, not {value}")
    require_bundle_or_model(arguments.model)
    from resprune.evaluation.answers import Answers, output
    from resprune.evaluation.data import load_data
    from resprune.evaluation.evaluate import SELECTORS, Plan, evaluate
    from resprune.evaluation.report import markdown, score, write
    from resprune.evaluation.towers import early_names
    from resprune.runtime.backends.session import check_threads

    check_threads(arguments.threads)
    budgets = read_budgets(arguments.k)
    names = [*SELECTORS] if arguments.selectors == "all" else words(arguments.selectors)
    names += early_names(words(arguments.early)) if names else []
    plan = Plan(
        data=[load_data(name) for name in words(arguments.data) or _none("--data names none")],
        selectors=names or _none(f"--selectors names none; choose from {', '.join(SELECTORS)}"),
        budgets=budgets,
        limit=arguments.limit,
        seed=arguments.seed,
        batch=arguments.batch,
        max_new_tokens=arguments.max_new_tokens,
    )
    with output(arguments.out):
        model = open_model(
            arguments.model,
            positions=arguments.positions,
            attention=arguments.attention,
            device=arguments.device,
            threads=arguments.threads,
        )
        answers = Answers(arguments.out, plan.settings(model))
        try:
            evaluate(model, plan, answers)
        finally:
            answers.close()
            model.close()
        sheets = score(plan, answers)
        write(arguments.out, sheets, plan, model)
    print(markdown(sheets), end="")
    return 0


def is_bundle(path: str) -> bool:
    """Whether a word on the command line is a bundle rather than a checkpoint."""
    return os.path.isfile(Path(path) / MANIFEST_NAME)  # noqa: PTH113 - Path.is_file raises for a closed folder


def require_bundle_or_model(name: str) -> None:
    """`ResPruneError` for what is neither, before anything large is imported."""
    from resprune.exporter.checkpoint.checkpoint import require_model

    if not is_bundle(name):
        require_model(name)


def read_budgets(text: str) -> list[Budget]:
    """What -k names; `ResPruneError` for nothing, and for what is no budget."""
    found = words(text) or _none("-k names no budget; give numbers, shares, or all")
    return [Budget.parse(word) for word in found]


def words(text: str) -> list[str]:
    """Words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _none(sentence: str) -> NoReturn:
    raise ResPruneError(sentence)


def open_model(
    name: str,
    *,
    positions: str | None = None,
    attention: str | None = None,
    device: str = "cpu",
    threads: int = 0,
) -> Model:
    """A bundle in ONNX Runtime, which runs on the CPU, or a checkpoint in PyTorch on `device`."""
    if is_bundle(name):
        from resprune.evaluation.model import open_bundle

        if device != "cpu":
            raise ResPruneError(
                f"{name} is a bundle, and this command runs bundles on the CPU; leave out --device {device}, "
                "or give the checkpoint it was exported from"
            )
        return open_bundle(name, positions=positions, attention=attention, threads=threads)
    from resprune.evaluation.checkpoint import open_checkpoint

    return open_checkpoint(name, positions=positions, attention=attention, device=device, threads=threads)
