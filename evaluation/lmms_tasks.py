"""Which tasks lmms-eval is to run: its own by name, a user's by file, and this project's questions as tasks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from lmms_eval.api.task import ConfigurableTask, Task
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image
from tenacity import RetryError

from resprune.evaluation.data import NAMED, load_data, matches
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.families.image import load_image

OWN = {f"resprune_{name}": name for name in NAMED}
"""Tasks over the data of `resprune eval`: they need no network, and their figures are those of that command."""


def index(names: list[str]) -> TaskManager:
    """lmms-eval's index of its two thousand tasks, read only if one of `names` can be there: that takes seconds."""
    return TaskManager("WARNING", include_defaults=not all(name in OWN or _is_file(name) for name in names))


def find_tasks(names: list[str], manager: TaskManager, limit: int | None, work: Path) -> list[str | Task]:
    """What lmms-eval takes for each name; the images of this project's own tasks are written under `work`.

    `limit` is how many questions of its own tasks are taken, at even distances as `resprune eval` takes them.
    Raises `ResPruneError` for a name that nothing is known by, and for a file that is no task.
    """
    known = [*OWN, *manager.all_tasks]
    found: list[str | Task] = []
    for name in names:
        if name in OWN:
            found.append(ConfigurableTask(config=_own(name, limit, work / name)))
        elif _is_file(name):
            found.append(_task(name))
        elif name in known:
            found.append(name)
        else:
            near = difflib.get_close_matches(name, known, n=3)
            way = f"did you mean {' or '.join(near)}?" if near else "lmms-eval tasks list names all there are"
            raise ResPruneError(f"there is no task {name}; {way}")
    return found


def _is_file(name: str) -> bool:
    return name.endswith(".yaml")


def _task(name: str) -> ConfigurableTask:
    """A task from a user's file; lmms-eval looks into its data and asks for its first question at once."""
    config = _read(name)
    try:
        return ConfigurableTask(config=config)
    except Exception as error:  # whatever lmms-eval, a template, or a function of the task raises
        absent = [key for key in ("dataset_path", "doc_to_text", "doc_to_target") if config.get(key) is None]
        if config.get("test_split") is None and config.get("validation_split") is None:
            absent.append("test_split")
        if isinstance(error, ModuleNotFoundError | RetryError) and not absent:
            raise  # the command has sentences for these
        reason = f"it has no {', '.join(absent)}" if absent else f"{type(error).__name__}: {error}"
        raise ResPruneError(
            f"{name} is no task that can be asked ({one_line(reason)}); mend the file"
        ) from None


def _read(name: str) -> dict[str, Any]:
    """A task's own file, in lmms-eval's format."""
    if not Path(name).is_file():
        raise ResPruneError(f"there is no file {name}; check the path of the task")
    try:
        config: Any = load_yaml_config(name)
    except ModuleNotFoundError:  # which the command has a sentence for
        raise
    except Exception as error:  # whatever YAML, an included file, or a function's module raises
        raise ResPruneError(f"{name} cannot be read as a task ({one_line(error)})") from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise ResPruneError(f'{name} should be one task of lmms-eval, with its name as "task"')
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        raise ResPruneError(f"{name} has the output_type {kind}, and only generate_until is supported")
    return config


def _own(name: str, limit: int | None, folder: Path) -> dict[str, Any]:
    """A task of `resprune eval`'s questions and its rule of what is right."""
    questions = load_data(OWN[name]).spread(limit)
    rows = [
        {"image": load_image(question.load()), "question": question.text, "answer": question.answers[0]}
        for question in questions
    ]
    text = Value("string")
    features = Features({"image": ImageFeature(), "question": text, "answer": text})
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(folder)
    return {
        "task": name,
        "dataset_path": str(folder),
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": _visual,
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "process_results": _score,
        "generation_kwargs": {"max_new_tokens": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _visual(row: dict[str, Any]) -> list[Image.Image]:
    return [row["image"]]


def _score(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    return {"exact_match": float(matches(answers[0], [row["answer"]]))}
