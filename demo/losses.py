"""The two losses: the answers' tokens, and what covers each patch.

The second, an auxiliary, reads a visual token against the language model's own word embeddings:
"circle", "red" or "background" must point along the token of a patch that a red circle covers. It
teaches the vision tower where things are long before the answers do, and leaves visual tokens
loosely aligned with the nouns, as they are in large models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from demo.batches import IGNORED, Batch
from demo.data import BACKGROUND_WORD, COLOR_WORDS, DIGIT_WORDS, KIND_WORDS, SIZE_WORDS, UNKNOWN
from demo.forward import question_states
from demo.scenes import GRID

_SYNONYMS = {
    **{word: (word, word + "s") for word in KIND_WORDS if word != "rectangle"},
    "digit": ("digit", "digits", "number"),
}
# Sharpens the auxiliary's logits, so that visual tokens need not grow long to be told apart.
_SHARPNESS = 3.0
_ANYTHING = ("object", "objects", "thing", "things", "shape", "shapes")


class WordClasses:
    """The classes of the auxiliary task as groups of token ids."""

    def __init__(self, processor: LlavaProcessor) -> None:
        """Look the words up; each must be one token."""
        self.groups: dict[str, list[list[int]]] = {}
        kinds = [_SYNONYMS.get(word, (word,)) for word in KIND_WORDS]
        lists: dict[str, list[tuple[str, ...]]] = {
            "kind": [*kinds, (BACKGROUND_WORD,)],
            "color": [*((word,) for word in COLOR_WORDS), (BACKGROUND_WORD,)],
            "size": [(word,) for word in SIZE_WORDS],
            "digit": [(word,) for word in DIGIT_WORDS],
            "anything": [_ANYTHING, (BACKGROUND_WORD,)],
            "across": [("left",), ("right",)],
            "down": [("top", "above"), ("bottom", "below")],
        }
        for name, classes in lists.items():
            self.groups[name] = [[_single_token(processor, w) for w in words] for words in classes]

    def vectors(self, embedding: Tensor, name: str) -> Tensor:
        """Return the class vectors [C, D] of a group: the mean of each class's words."""
        return torch.stack([embedding[ids].mean(0) for ids in self.groups[name]])


def _single_token(processor: LlavaProcessor, word: str) -> int:
    ids: list[int] = processor.tokenizer(f" {word}", add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is not one token of the demo vocabulary")
    return ids[0]


def patch_loss(
    visual: Tensor, embedding: Tensor, classes: WordClasses, owner: Tensor, attributes: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Return the auxiliary loss and, for the log, the accuracies on the patches of objects.

    ``visual`` [B, 144, D]; ``embedding`` [V, D]; ``owner`` [B, 144], ``attributes`` [B, 4, 4].
    """
    flat = visual.float().flatten(0, 1) * (_SHARPNESS / math.sqrt(visual.shape[-1]))  # [B * 144, D]
    ground = (owner == 0).flatten()
    covered = ((owner > 0) & (owner != UNKNOWN)).flatten()
    index = (owner.long() - 1).clamp(0, attributes.shape[1] - 1)
    own = attributes.long().gather(1, index[..., None].expand(-1, -1, 4)).flatten(0, 1)  # [.., 4]
    total = flat.new_zeros(())
    accuracy = {}
    weights = {"kind": 1.0, "color": 1.0, "size": 0.5, "digit": 2.0, "anything": 0.3}
    places = {"kind": 0, "color": 1, "size": 2, "digit": 3}
    for name, weight in weights.items():
        vectors = classes.vectors(embedding, name).float()
        if name == "anything":
            target = torch.zeros_like(own[:, 0])
            known = covered
        else:
            target = own[:, places[name]]
            known = covered & (target != UNKNOWN)
        scored = known
        if name in ("kind", "color", "anything"):
            target = torch.where(ground, len(vectors) - 1, target)
            scored = known | ground
        if not bool(known.any()):
            continue
        logits = flat[scored] @ vectors.T
        each = functional.cross_entropy(logits, target[scored], reduction="none")
        # Patches of objects are a quarter of the picture and weigh as much as the ground.
        share = torch.where(known[scored], 3.0, 1.0)
        total = total + weight * (each * share).sum() / share.sum()
        right = (logits.argmax(-1) == target[scored])[known[scored]]
        accuracy[name] = right.float().mean().item()
    for name, place in (("across", _columns()), ("down", _rows())):
        vectors = classes.vectors(embedding, name).float()
        contrast = flat @ (vectors[1] - vectors[0])  # [B * 144]
        target = place.repeat(len(visual))
        total = total + functional.binary_cross_entropy_with_logits(contrast, target)
        accuracy[name] = (contrast.sigmoid() - target).abs().mean().item()
    return total, accuracy


def _columns() -> Tensor:
    """Return how far right each patch lies, [144] in 0..1."""
    return ((torch.arange(GRID) + 0.5) / GRID).repeat(GRID)


def _rows() -> Tensor:
    """Return how far down each patch lies, [144] in 0..1."""
    return ((torch.arange(GRID) + 0.5) / GRID).repeat_interleave(GRID)


def prefix_embeddings(model: LlavaForConditionalGeneration, start: list[int], visual: Tensor) -> Tensor:
    """Return the embeddings [B, P, D] of the prompt up to the end of the picture."""
    words = model.get_input_embeddings()(torch.tensor(start))
    return torch.cat([words.expand(len(visual), -1, -1).to(visual.dtype), visual], 1)


def answer_loss(
    model: LlavaForConditionalGeneration, start: list[int], visual: Tensor, batch: Batch
) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens and of the end after them."""
    states = question_states(model, prefix_embeddings(model, start, visual), batch.questions)
    scored = batch.targets != IGNORED
    logits = model.lm_head(states[scored]).float()
    return functional.cross_entropy(logits, batch.targets[scored])
