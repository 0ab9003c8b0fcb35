"""The training data in memory: scenes drawn once into a cache, and easy-VQA's pictures.

Both come as a :class:`PictureSet`, arrays that a batch is cut from.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.questions import sample_question
from demo.scenes import COLORS, GRID, KINDS, PATCH, SIDE, Split, draw_with_patches, sample_scene

RUNS = Path(__file__).parent / "runs"
EASY_VQA_SIDE = 64
MAX_OBJECTS = 4
UNKNOWN = 255  # an attribute that is not known, and a patch whose cover is in doubt
BACKGROUND_WORD = "background"

# The words of the dense auxiliary task, by the place of the attribute in ``PictureSet.attributes``.
KIND_WORDS = (*KINDS, "rectangle")
COLOR_WORDS = (*COLORS, "brown", "gray", "teal")
DIGIT_WORDS = tuple("0123456789")
SIZE_WORDS = ("small", "large")

_CHUNK = 500


@dataclass
class PictureSet:
    """Pictures, their questions, and what covers their patches.

    ``images`` [P, 96, 96, 3] uint8; ``owner`` [P, 144] uint8, 0 background, i + 1 object i, 255 in
    doubt; ``attributes`` [P, 4, 4] uint8, for each object its place in ``KIND_WORDS``,
    ``COLOR_WORDS``, ``SIZE_WORDS`` and ``DIGIT_WORDS``, 255 unknown. ``question_ids`` [P, Q] are rows
    of ``table``, a list of (type, question, answer); -1 pads pictures with fewer questions.
    """

    images: npt.NDArray[np.uint8]
    owner: npt.NDArray[np.uint8]
    attributes: npt.NDArray[np.uint8]
    question_ids: npt.NDArray[np.int32]
    table: list[tuple[str, str, str]]

    def __len__(self) -> int:
        return len(self.images)


Chunk = tuple[
    npt.NDArray[np.uint8],
    npt.NDArray[np.uint8],
    npt.NDArray[np.uint8],
    list[list[tuple[str, str, str]]],
]


def _make_chunk(job: tuple[int, int, Split, int]) -> Chunk:
    first, count, split, questions = job
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    owner = np.zeros((count, GRID * GRID), np.uint8)
    attributes = np.full((count, MAX_OBJECTS, 4), UNKNOWN, np.uint8)
    asked = []
    for row in range(count):
        scene = sample_scene(first + row, split)
        images[row], owner[row] = draw_with_patches(scene)
        for i, item in enumerate(scene.objects):
            attributes[row, i, 0] = KIND_WORDS.index(item.kind)
            attributes[row, i, 1] = COLOR_WORDS.index(item.color)
            attributes[row, i, 2] = SIZE_WORDS.index(item.size)
            if item.value >= 0:
                attributes[row, i, 3] = item.value
        rng = np.random.default_rng([first + row, 0 if split == "train" else 1, 2])
        drawn = [sample_question(scene, rng) for _ in range(questions)]
        asked.append([(q.type, q.text, q.answer) for q in drawn if q is not None])
    return images, owner, attributes, asked


def make_scenes(count: int, split: Split, *, questions: int, first: int = 0, workers: int = 2) -> PictureSet:
    """Draw ``count`` scenes of seeds ``first``, ``first + 1``, … with ``questions`` questions each."""
    jobs: list[tuple[int, int, Split, int]] = [
        (first + start, min(_CHUNK, count - start), split, questions) for start in range(0, count, _CHUNK)
    ]
    chunks: list[Chunk]
    if workers > 1 and len(jobs) > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            chunks = pool.map(_make_chunk, jobs, chunksize=1)
    else:
        chunks = [_make_chunk(job) for job in jobs]
    table: dict[tuple[str, str, str], int] = {}
    ids = [
        [table.setdefault(question, len(table)) for question in row] for chunk in chunks for row in chunk[3]
    ]
    return PictureSet(
        np.concatenate([c[0] for c in chunks]),
        np.concatenate([c[1] for c in chunks]),
        np.concatenate([c[2] for c in chunks]),
        np.asarray(ids, np.int32),
        list(table),
    )


def cached_scenes(count: int, split: Split, *, questions: int) -> PictureSet:
    """Return :func:`make_scenes`, read from ``demo/runs/`` if it was made before."""
    stem = RUNS / f"scenes-{split}-{count}-{questions}"
    arrays, texts = stem.with_suffix(".npz"), stem.with_suffix(".json")
    if not texts.exists():
        made = make_scenes(count, split, questions=questions)
        RUNS.mkdir(parents=True, exist_ok=True)
        np.savez(
            arrays,
            images=made.images,
            owner=made.owner,
            attributes=made.attributes,
            question_ids=made.question_ids,
        )
        texts.write_text(json.dumps(made.table))  # last: its presence says the cache is whole
    with np.load(arrays) as stored:
        table = [(a, b, c) for a, b, c in json.loads(texts.read_text())]
        return PictureSet(
            stored["images"],
            stored["owner"],
            stored["attributes"],
            stored["question_ids"],
            table,
        )


def easy_vqa_type(question: str, answer: str) -> str:
    """Return the type under which an easy-VQA question is scored."""
    if answer in ("yes", "no"):
        negated = " not " in question or question.startswith("is no ")
        return "easy-vqa negated" if negated else "easy-vqa yes/no"
    return "easy-vqa shape" if answer in ("circle", "rectangle", "triangle") else "easy-vqa color"


def easy_vqa(split: Split) -> PictureSet:
    """Return easy-VQA's own train or test split, pictures enlarged to 96 x 96 as the processor does.

    A picture holds one shape on a plain ground. For the training pictures the patches it covers,
    its colour and its shape are inferred from the pixels and from the training answers.
    """
    import easy_vqa as package

    if split == "train":
        paths, (texts, answers, rows) = (
            package.get_train_image_paths(),
            package.get_train_questions(),
        )
    else:
        paths, (texts, answers, rows) = package.get_test_image_paths(), package.get_test_questions()
    count = len(paths)
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    for row, path in paths.items():
        with Image.open(path) as picture:
            large = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        images[row] = np.asarray(large)
    table: dict[tuple[str, str, str], int] = {}
    asked: list[list[int]] = [[] for _ in range(count)]
    attributes = np.full((count, MAX_OBJECTS, 4), UNKNOWN, np.uint8)
    for text, answer, row in zip(texts, answers, rows, strict=True):
        key = (easy_vqa_type(text, answer), text, answer)
        asked[row].append(table.setdefault(key, len(table)))
        _note_attribute(attributes[row, 0], text, answer)
    width = max(map(len, asked))
    ids = np.full((count, width), -1, np.int32)
    for row, questions in enumerate(asked):
        ids[row, : len(questions)] = questions
    return PictureSet(images, _single_object_patches(images), attributes, ids, list(table))


def _note_attribute(attributes: npt.NDArray[np.uint8], text: str, answer: str) -> None:
    known = answer
    if answer in ("yes", "no"):
        # "is there a circle?" "yes" and "is there not a circle?" "no" both say what it is.
        negated = easy_vqa_type(text, answer) == "easy-vqa negated"
        if (answer == "yes") == negated:
            return
        words = text.rstrip("?").split()
        known = next((w for w in words if w in (*KIND_WORDS, *COLOR_WORDS)), "")
    if known in KIND_WORDS:
        attributes[0] = KIND_WORDS.index(known)
    elif known in COLOR_WORDS:
        attributes[1] = COLOR_WORDS.index(known)


def _single_object_patches(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    count = len(images)
    edge = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    ground = np.median(edge, axis=1)[:, None, None]  # [P, 1, 1, 3]
    solid = np.abs(images.astype(np.float32) - ground).max(-1) > 24  # [P, 96, 96]
    cover = solid.reshape(count, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(count, -1)
    return np.where(cover >= 0.2, 1, np.where(cover > 0.02, UNKNOWN, 0)).astype(np.uint8)
