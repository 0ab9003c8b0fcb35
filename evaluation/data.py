"""Questions with answers: easy-VQA's test split, the demo's held-out scenes, and the user's own in JSON Lines."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from resprune.runtime.errors import ResPruneError, require_packages
from resprune.runtime.families.image import ImageSource, load_image

SCENES, QUESTIONS_A_SCENE = 1000, 2
FIRST_SCENE = 400_000  # seeds that neither the training nor its checks nor demo.evaluate use
NAMED = ("easyvqa", "scenes", "crowd")
IMAGES_READ = 16  # of a set's thousand, for its fingerprint
CROWD_TYPES = ("color", "shape", "existence", "position")


@dataclass(frozen=True)
class Question:
    """A question about an image, and the answers that count as right.

    `number` names it in its data set. `image` is an id, the same for questions about the same image, which `load()`
    gives; `type` groups the scores and may be empty.
    """

    number: int
    image: str
    load: Callable[[], ImageSource]
    text: str
    answers: tuple[str, ...]
    type: str = ""

    def right(self, answer: str) -> bool:
        """Whether `answer` is one of the answers, as `matches` compares them."""
        return matches(answer, self.answers)


@dataclass(frozen=True)
class DataSet:
    """Questions in the order of their images; `fingerprint` changes when any of them does.

    Of the user's images it has size and time, of those that are drawn or come in a package the pixels of a few.
    """

    name: str
    fingerprint: str
    questions: tuple[Question, ...]

    def spread(self, limit: int | None) -> tuple[Question, ...]:
        """`limit` questions at even distances, so that every part of the set has its share; all if None."""
        have = len(self.questions)
        if limit is None or limit >= have:
            return self.questions
        return tuple(self.questions[index * have // limit] for index in range(limit))


def load_data(name: str) -> DataSet:
    """A data set by its name in `NAMED`, or from a `.jsonl` file; `ResPruneError` for what is neither."""
    if name == "easyvqa":
        return _easy_vqa()
    if name in ("scenes", "crowd"):
        return _scenes(name)
    if name.endswith(".jsonl"):
        return read_jsonl(Path(name))
    raise ResPruneError(f"--data {name} is none of {', '.join(NAMED)} and no .jsonl file")


def read_jsonl(path: Path) -> DataSet:
    """One object a line: `image` (a path, relative ones from the file's directory), `question`, `answer` or `answers`.

    `type` is optional and groups the scores. `ResPruneError` names the line that is malformed or whose image is
    missing.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ResPruneError(f"{path} cannot be read: {error.strerror}") from None
    questions = []
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            questions.append(_parse(line, number, path))
    if not questions:
        raise ResPruneError(f"{path} has no questions; write one JSON object a line")
    order: dict[str, int] = {}
    for question in questions:
        order.setdefault(question.image, len(order))
    questions.sort(key=lambda question: order[question.image])
    stats = [Path(image).stat() for image in order]
    images = json.dumps([[stat.st_size, stat.st_mtime_ns] for stat in stats])
    return DataSet(path.stem, hashlib.sha256(raw + images.encode()).hexdigest(), tuple(questions))


def _parse(line: bytes, number: int, path: Path) -> Question:
    def fault(what: str) -> ResPruneError:
        return ResPruneError(f"{path}, line {number}: {what}")

    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise fault(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise fault("should be an object with image, question and answer")
    answers = row.get("answers", [row["answer"]] if "answer" in row else None)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise fault('should have "answer", a string, or "answers", a list of them')
    for key in ("image", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise fault(f'should have "{key}", a string')
    if not isinstance(row.get("type", ""), str):
        raise fault('"type" should be a string')
    image = path.parent / row["image"]
    try:
        there = image.is_file()
    except OSError as error:  # the name is too long, as an image in base64 is, or a folder is closed to us
        raise fault(f'"image" should be the path of an image ({error.strerror})') from None
    if not there:
        raise fault(f"there is no image {image}")
    return Question(number, str(image), lambda: image, row["question"], tuple(answers), row.get("type", ""))


def _easy_vqa() -> DataSet:
    _need("easyvqa", "easy_vqa")
    import easy_vqa

    texts, answers, rows = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    questions = [
        Question(number, str(row), partial(Path, paths[row]), text, (answer,), _easy_type(answer))
        for number, (text, answer, row) in enumerate(zip(texts, answers, rows, strict=True))
    ]
    questions.sort(key=lambda question: int(question.image))
    return _fingerprinted("easyvqa", questions)


def _easy_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def _scenes(name: str) -> DataSet:
    """Two questions about each of a thousand held-out images.

    `scenes`: those of the training's kind, its types of question in its proportions. `crowd`: eight small objects an
    image, and questions about one of them, so that few tokens matter and the question says which.
    """
    _need(name, "skimage", "sklearn")
    demo_questions, scenes = (_from_checkout(f"demo.{module}", name) for module in ("questions", "scenes"))
    asked: list[Question] = []
    for seed in count(FIRST_SCENE):
        crowd = name == "crowd"
        scene = scenes.sample_crowd(seed) if crowd else scenes.sample_scene(seed, "test")
        for part in range(QUESTIONS_A_SCENE):
            type_ = CROWD_TYPES[(QUESTIONS_A_SCENE * seed + part) % len(CROWD_TYPES)] if crowd else None
            made = demo_questions.sample_question(scene, np.random.default_rng([seed, part]), type_)
            if made is None:  # such a scene allows no such question
                continue
            load = partial(scenes.draw, scene)
            asked.append(Question(len(asked), str(seed), load, made.text, (made.answer,), made.type))
            if len(asked) == SCENES * QUESTIONS_A_SCENE:
                return _fingerprinted(name, asked)
    raise AssertionError  # seeds do not end


def _fingerprinted(name: str, questions: Sequence[Question]) -> DataSet:
    """Of every question, and of the pixels of a few images from all over the set."""
    words = [(question.image, question.text, question.answers, question.type) for question in questions]
    digest = hashlib.sha256(json.dumps(words).encode())
    data = DataSet(name, "", tuple(questions))
    for question in data.spread(IMAGES_READ):
        digest.update(np.asarray(load_image(question.load())).tobytes())
    return replace(data, fingerprint=digest.hexdigest())


def _need(data: str, *packages: str) -> None:
    require_packages(f"--data {data}", packages, 'install with: pip install "resprune[eval,demo]"')


def _from_checkout(module: str, data: str) -> Any:
    """A module of the repository's `demo/`, which is no part of the package."""
    here = Path(__file__).resolve().parent
    for root in (here.parent, Path.cwd(), *Path.cwd().parents):
        if (root / "demo" / "scenes.py").is_file():
            if str(root) not in sys.path:
                sys.path.append(str(root))
            return importlib.import_module(module)
    raise ResPruneError(
        f"--data {data} is drawn by the repository's demo/; run this inside a checkout of the repository"
    )


def matches(answer: str, right: Sequence[str]) -> bool:
    """Exact match with one of them, whatever the case, white space, and a full stop at the end."""
    return _plain(answer) in map(_plain, right)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
