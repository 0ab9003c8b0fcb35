"""A model plugin for lmms-eval: a bundle, or a checkpoint in PyTorch, that keeps K tokens of every image.

lmms-eval finds it by the entry point `lmms_eval.models` and calls it by `--model resprune --model_args model=…,k=…`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image

from resprune.evaluation.answers import Answers, Run
from resprune.evaluation.cli import open_model
from resprune.evaluation.evaluate import OWN
from resprune.evaluation.model import Asked
from resprune.evaluation.progress import progress
from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.nouns import question_terms
from resprune.runtime.prompt.splice import Ints
from resprune.runtime.walk import Encoded

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

# What tasks write below a question; its nouns ("word", "phrase", "letter") are not in the image.
INSTRUCTION = re.compile(r"\n(?:Answer |Please answer |When the provided information ).*", re.DOTALL)


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("resprune", simple_class_path=f"{__name__}.ResPrune")


class ResPrune(lmms):  # type: ignore[misc]
    """`model`: a split bundle, or what `resprune export` takes; `k`: a number, a share like 11%, or all.

    `answers` is a directory that keeps them as they come, so that a run that was interrupted goes on where it ended.
    `batch_size` and `max_batch_size` are what lmms-eval gives every model; questions are answered one by one.
    """

    def __init__(
        self,
        model: str,
        k: str | int = "all",
        positions: str | None = None,
        attention: str | None = None,
        device: str = "cpu",
        answers: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ResPruneError(
                f"there is no argument {', '.join(unknown)}; choose from model, k, positions, attention, device and "
                "answers"
            )
        self.budget = Budget.parse(str(k))
        self._model = open_model(model, positions=positions, attention=attention, device=device)
        self.check([self.budget])
        self.engine, self.settings = self._model.engine, self._model.settings
        self._directory = None if answers is None else Path(answers)

    def check(self, budgets: Sequence[Budget]) -> None:
        """`ResPruneError` for what `budget` cannot be: more than the model can keep."""
        self._model.check(budgets, own=True)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, in the order of the requests."""
        asked = [request.args for request in requests]
        if self._directory is None:
            return _each(self._answer, asked)
        answers = Answers(self._directory, self._settings(asked))
        try:
            return _each(partial(self._recall, answers), asked)
        finally:
            answers.close()

    def _settings(self, asked: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """What answers depend on beside the question's number and K, as `Answers` compares it."""
        digests: dict[str, Any] = {}
        for context, options, _, document, task, split in asked:
            row = json.dumps([document, split, context, options], default=str)
            digests.setdefault(task, hashlib.sha256()).update(row.encode())
        return self.settings | {"data": {task: digest.hexdigest() for task, digest in digests.items()}}

    def _recall(self, answers: Answers, *arguments: Any) -> str:
        _, _, _, document, task, _ = arguments
        run = Run(task, OWN, str(self.budget), 0)
        if answers.missing(run, [document]):
            answers.add(run, {document: self._answer(*arguments)})
        (text,) = answers.of(run, [document])
        return text

    def _answer(
        self, context: str, options: dict[str, Any], visuals: Any, document: int, task: str, split: str
    ) -> str:
        images = visuals(self.task_dict[task][split][document])
        if not images:
            raise ResPruneError(
                f"question {document} of {task} has no image; choose tasks whose questions all have"
            )
        if not all(isinstance(image, Image.Image | str) for image in images):
            raise ResPruneError(f"question {document} of {task} has more than images; choose another task")
        encoded = self._model.look(images)
        question = INSTRUCTION.sub("", context)
        about = [question[start:end] for start, end in question_terms(question)]
        asked = self._model.read(context, [one.image.expansion for one in encoded], about=about)
        kept = [self._keep(one, asked) for one in encoded]
        (text,) = self._model.answer([asked], [encoded], [kept], options.get("max_new_tokens", 1024))
        ends = options.get("until", [])
        for end in [ends] if isinstance(ends, str) else ends:
            text = text.split(end)[0] if end else text
        return text

    def _keep(self, image: Encoded, asked: Asked) -> Ints:
        count = image.image.num_tokens
        if self.budget.everything:
            return np.arange(count)
        return self._model.select(image, asked, self.budget.of(count))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: a later round's questions depend on the answers before."""
        raise ResPruneError("tasks of several rounds are not supported; choose tasks of one question each")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the runtime's language model gives the logits of the last position alone."""
        raise ResPruneError("tasks that score given answers are not supported; choose their generative form")


def _each(answer: Callable[..., str], asked: Sequence[tuple[Any, ...]]) -> list[str]:
    texts = []
    with progress(len(asked), "lmms") as update:
        for arguments in asked:
            texts.append(answer(*arguments))
            update(1)
    return texts
