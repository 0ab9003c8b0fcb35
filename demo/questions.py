"""Questions about a scene, answered from its description.

Every referent is unambiguous: a phrase is used only where exactly one object fits it, and places
and relations are asked only where a margin of pixels leaves no doubt. Within a type the answer is
drawn first where it can be, so that the most frequent answer is a poor guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from demo.scenes import COLORS, SHAPES, SIDE, SIZES, Scene, SceneObject

T = TypeVar("T")

PLACE_MARGIN = 7.0  # pixels between an object's centre and the middle of the picture
RELATION_MARGIN = 9.0  # pixels between the centres of two objects

TYPE_WEIGHTS = {
    "color": 0.15,
    "shape": 0.12,
    "count": 0.19,
    "existence": 0.14,
    "position": 0.13,
    "relation": 0.17,
    "digit": 0.10,
}
TYPES = tuple(TYPE_WEIGHTS)
_COUNT_WEIGHTS = {0: 0.2, 1: 0.25, 2: 0.25, 3: 0.2, 4: 0.15}
_GENERIC = ("object", "thing")


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and the type it is scored under."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Phrase:
    """A noun phrase such as "small red circle"; empty fields fit everything.

    ``noun`` is a kind, or a generic noun: ``object`` and ``thing`` fit every object, ``shape`` fits
    all but digits, ``number`` means digit.
    """

    noun: str
    color: str = ""
    size: str = ""

    def fits(self, item: SceneObject) -> bool:
        """Say whether the phrase is true of the object."""
        kinds: tuple[str, ...]
        if self.noun in _GENERIC:
            kinds = (*SHAPES, "digit")
        elif self.noun == "shape":
            kinds = SHAPES
        else:
            kinds = ("digit" if self.noun == "number" else self.noun,)
        return item.kind in kinds and self.color in ("", item.color) and self.size in ("", item.size)

    def count(self, scene: Scene) -> int:
        """Return how many of the scene's objects the phrase fits."""
        return sum(self.fits(item) for item in scene.objects)

    def text(self, plural: bool = False) -> str:
        """Return the phrase in words."""
        return " ".join(word for word in (self.size, self.color, self.noun + "s" * plural) if word)


def sample_question(scene: Scene, rng: np.random.Generator, type_: str | None = None) -> Question | None:
    """Return a random question about the scene, of a random type unless one is named.

    None: the scene allows no question of the named type (a scene without a digit, for example).
    """
    if type_ is not None:
        return _MAKERS[type_](scene, rng)
    weights = np.asarray(list(TYPE_WEIGHTS.values()))
    while True:
        drawn = TYPES[_draw(rng, weights)]
        question = _MAKERS[drawn](scene, rng)
        if question is not None:
            return question


def _draw(rng: np.random.Generator, weights: np.ndarray) -> int:
    total = np.cumsum(weights)
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def referents(scene: Scene, item: SceneObject, *, color: bool = True, noun: bool = True) -> list[Phrase]:
    """Return the phrases that fit ``item`` and nothing else in the scene.

    ``color=False`` leaves out phrases that give its colour away, ``noun=False`` those that give
    away what it is.
    """
    nouns: list[str] = [*_GENERIC]
    if item.kind != "digit":
        nouns.append("shape")
    if noun:
        nouns = [item.kind] * 2 + ["object"]
    colors = ("", item.color) if color else ("",)
    sizes = ("",) if item.kind == "digit" else ("", item.size)
    found = []
    for word in nouns:
        for shade in colors:
            for size in sizes:
                phrase = Phrase(word, shade, size)
                # "shape" leaves digits out; ask that even "object" would fit one object alone.
                wide = Phrase("object", shade, size) if word == "shape" else phrase
                if (shade or size or word == item.kind) and wide.count(scene) == 1:
                    found.append(phrase)
    return found


def _targets(
    scene: Scene, *, color: bool = True, noun: bool = True
) -> Iterator[tuple[SceneObject, list[Phrase]]]:
    for item in scene.objects:
        phrases = referents(scene, item, color=color, noun=noun)
        if phrases:
            yield item, phrases


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    targets = list(_targets(scene, color=False))
    if not targets:
        return None
    item, phrases = _pick(rng, targets)
    form = _pick(
        rng,
        (
            "What color is the {}?",
            "What color is the {}?",
            "What is the color of the {}?",
            "Which color does the {} have?",
        ),
    )
    return Question("color", form.format(_pick(rng, phrases).text()), item.color)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    targets = [t for t in _targets(scene, noun=False) if t[0].kind != "digit" or rng.random() < 0.5]
    if not targets:
        return None
    item, phrases = _pick(rng, targets)
    phrase = _pick(rng, phrases)
    forms = ["What is the {}?", "What kind of thing is the {}?"]
    if item.kind != "digit":
        forms = ["What shape is the {}?", "What shape is the {}?", "What is the {}?"]
        if phrase.noun == "shape":
            forms = ["What is the {}?", "What kind of shape is the {}?"]
    return Question("shape", _pick(rng, forms).format(phrase.text()), item.kind)


def _phrases_with_count(scene: Scene) -> dict[int, list[Phrase]]:
    groups: dict[int, list[Phrase]] = {}
    for noun in ("object", *SHAPES, "digit", "shape", "thing"):
        for color in ("", *COLORS):
            for size in ("",) if noun == "digit" else ("", *SIZES):
                if size and color and noun in ("object", "thing", "shape"):
                    continue
                phrase = Phrase(noun, color, size)
                groups.setdefault(phrase.count(scene), []).append(phrase)
    return groups


def _likely_absent(scene: Scene, rng: np.random.Generator) -> Phrase:
    """Return a phrase that fits nothing, but often half fits something."""
    while True:
        item = _pick(rng, scene.objects)
        noun = _pick(rng, (item.kind, *SHAPES, "digit"))
        color = _pick(rng, ("", item.color, item.color, _pick(rng, list(COLORS))))
        size = "" if noun == "digit" or rng.random() < 0.6 else _pick(rng, SIZES)
        phrase = Phrase(noun, color, size)
        if phrase.count(scene) == 0:
            return phrase


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    groups = _phrases_with_count(scene)
    counts = sorted(groups)
    count = counts[_draw(rng, np.asarray([_COUNT_WEIGHTS[c] for c in counts]))]
    if count == 0:
        phrase = _likely_absent(scene, rng)
    else:
        # Short phrases are asked as often as long ones, of which there are more.
        length = {len(p.text().split()) for p in groups[count]}
        words = _pick(rng, sorted(length))
        phrase = _pick(rng, [p for p in groups[count] if len(p.text().split()) == words])
    form = _pick(
        rng,
        (
            "How many {} are there?",
            "How many {} are there?",
            "How many {} are in the picture?",
            "How many {} can you see?",
        ),
    )
    return Question("count", form.format(phrase.text(plural=True)), str(count))


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    yes = rng.random() < 0.5
    if yes:
        item = _pick(rng, scene.objects)
        color = item.color if rng.random() < 0.65 else ""
        size = "" if item.kind == "digit" or rng.random() < 0.65 else item.size
        noun = item.kind if not (color or size) or rng.random() < 0.85 else _pick(rng, _GENERIC)
        phrase = Phrase(noun, color, size)
    else:
        phrase = _likely_absent(scene, rng)
        while phrase.noun == "digit" and not phrase.color and rng.random() < 0.6:
            phrase = _likely_absent(scene, rng)
    words = phrase.text()
    article = "an" if words[0] in "aeiou" else "a"
    form = _pick(
        rng,
        (
            "Is there {} {}?",
            "Is there {} {}?",
            "Is there {} {} in the picture?",
            "Can you see {} {}?",
            "Does the picture show {} {}?",
        ),
    )
    return Question("existence", form.format(article, words), "yes" if yes else "no")


def side_words(item: SceneObject) -> tuple[str, str]:
    """Return (top or bottom, left or right), an empty word where the place is in doubt."""
    dx, dy = item.cx - SIDE / 2, item.cy - SIDE / 2
    vertical = "" if abs(dy) < PLACE_MARGIN else "top" if dy < 0 else "bottom"
    horizontal = "" if abs(dx) < PLACE_MARGIN else "left" if dx < 0 else "right"
    return vertical, horizontal


def _position(scene: Scene, rng: np.random.Generator) -> Question | None:
    targets = [t for t in _targets(scene) if any(side_words(t[0]))]
    if not targets:
        return None
    item, phrases = _pick(rng, targets)
    vertical, horizontal = side_words(item)
    options: list[tuple[str, str]] = []
    if vertical and horizontal:
        options += [
            ("Where is the {}?", f"{vertical} {horizontal}"),
            ("Where in the picture is the {}?", f"{vertical} {horizontal}"),
            ("In which corner is the {}?", f"{vertical} {horizontal}"),
        ]
    if horizontal:
        options.append(("Is the {} on the left or on the right?", horizontal))
    if vertical:
        options.append(("Is the {} at the top or at the bottom?", vertical))
    form, answer = _pick(rng, options)
    return Question("position", form.format(_pick(rng, phrases).text()), answer)


RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "to the left of": (-1, 0),
    "right of": (1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
_RELATION_DRAW = (*RELATIONS, "above", "below")  # each direction as often as the others


def distance_along(relation: str, a: SceneObject, b: SceneObject) -> float:
    """Return how many pixels ``a`` lies from ``b`` in the direction the relation names."""
    sx, sy = RELATIONS[relation]
    return sx * (a.cx - b.cx) + sy * (a.cy - b.cy)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    targets = list(_targets(scene))
    if not targets:
        return None
    if rng.random() < 0.5:
        for _ in range(6):
            question = _relation_query(scene, rng, _pick(rng, _RELATION_DRAW), targets)
            if question is not None:
                return question
    if len(targets) < 2:
        return None
    relation = _pick(rng, _RELATION_DRAW)
    order = rng.permutation(len(targets))
    (a, names_a), (b, names_b) = targets[order[0]], targets[order[1]]
    along = distance_along(relation, a, b)
    if abs(along) < RELATION_MARGIN:
        return None
    text = f"Is the {_pick(rng, names_a).text()} {relation} the {_pick(rng, names_b).text()}?"
    return Question("relation", text, "yes" if along > 0 else "no")


def _relation_query(
    scene: Scene,
    rng: np.random.Generator,
    relation: str,
    targets: list[tuple[SceneObject, list[Phrase]]],
) -> Question | None:
    anchor, names = _pick(rng, targets)
    others = [o for o in scene.objects if o is not anchor]
    along = [distance_along(relation, o, anchor) for o in others]
    if any(-2 < d < RELATION_MARGIN for d in along) or sum(d > 0 for d in along) != 1:
        return None
    found = others[int(np.argmax(along))]
    tail = f"{relation} the {_pick(rng, names).text()}?"
    if rng.random() < 0.5:
        return Question("relation", f"What is {tail}", found.kind)
    noun = _pick(rng, _GENERIC)
    return Question("relation", f"What color is the {noun} {tail}", found.color)


def _digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    digits = [o for o in scene.objects if o.kind == "digit"]
    if not digits:
        return None
    item = _pick(rng, digits)
    options: list[str] = []
    if len(digits) == 1:
        options += [
            "What number is in the picture?",
            "Which digit is shown?",
            "What digit is in the picture?",
            "What number is it?",
        ]
    if Phrase("digit", item.color).count(scene) == 1:
        options += [f"What is the {item.color} number?", f"Which digit is {item.color}?"]
    if not options:
        return None
    return Question("digit", _pick(rng, options), str(item.value))


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "position": _position,
    "relation": _relation,
    "digit": _digit,
}
