"""Write the sample pictures: ``python -m demo.samples``.

They are chosen by a rule and not by what the model answers: from seed 200,000 on, the first held-out
scenes of three objects or more, one for each of five question types in turn (for counting, the first
whose answer is not 0 or 1), and the first picture of easy-VQA's test split that is asked for its shape.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from demo.questions import Question, sample_question
from demo.scenes import draw, sample_scene

PICTURES = Path(__file__).parent / "pictures"
FIRST_SEED = 200_000
NAMES = {
    "color": "shapes.png",
    "digit": "digit.png",
    "relation": "relation.png",
    "count": "count.png",
    "position": "position.png",
}


def _dull(question: Question) -> bool:
    return question.type == "count" and question.answer in ("0", "1")


def write_samples(folder: Path) -> list[dict[str, str]]:
    """Write the pictures and ``questions.json`` into ``folder``; return what the latter holds."""
    import easy_vqa

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    seed = FIRST_SEED
    for type_, name in NAMES.items():
        while True:
            scene = sample_scene(seed, "test")
            question = sample_question(scene, np.random.default_rng([seed, 3]), type_)
            seed += 1
            if question is None or len(scene.objects) < 3 or _dull(question):
                continue
            break
        Image.fromarray(draw(scene)).save(folder / name)
        entries.append({"image": name, "question": question.text, "answer": question.answer})
    paths = easy_vqa.get_test_image_paths()
    for text, answer, row in zip(*easy_vqa.get_test_questions(), strict=True):
        if text.startswith("what shape"):
            shutil.copyfile(paths[row], folder / "easy-vqa.png")
            entries.append({"image": "easy-vqa.png", "question": text, "answer": answer})
            break
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")
    return entries


if __name__ == "__main__":
    for entry in write_samples(PICTURES):
        print(f"{entry['image']}: {entry['question']} {entry['answer']}")
