"""From logits to one token a row, as transformers' `generate` does: processors in its order, then the best or a draw.

`generate` looks at the ids of prompt and answer where it is given `input_ids`, and at the answer's alone where it is
given `inputs_embeds`. People call it with the former, so that is what is done here: the prompt's ids count, with an
image token for each row that is kept. In a batch each row has its own, without what fills it up.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from resprune.runtime.errors import FailedError, ResPruneError
from resprune.runtime.prompt.splice import Floats, Ints
from resprune.runtime.sampling import Sampling


class Chooser:
    """Chooses the tokens of one batch of answers, step by step, and remembers what it chose.

    `prompts` are the ids of each row's prompt, `eos` those that end an answer.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], eos: frozenset[int]) -> None:
        self._sampling = sampling
        self._eos = sorted(eos)
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None
        self._count = 0
        # Only these two look back.
        self._remembers = sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size > 0
        self._rows = [np.asarray(ids, np.int64) for ids in prompts] if self._remembers else []

    @np.errstate(all="ignore")  # of NaN and infinity, which are told below
    def __call__(self, logits: Floats) -> Ints:
        """`logits` [B, V] → token ids [B]; `ResPruneError` if they are not numbers."""
        sampling = self._sampling
        scores = self._processed(logits) if sampling.processed else logits
        tokens: Ints = np.argmax(scores, axis=-1)  # the lowest id among equals; where there is NaN, that
        self._require_numbers(np.take_along_axis(scores, tokens[:, None], axis=-1))
        if self._random is not None:
            cumulative = np.cumsum(probabilities(scores, sampling), axis=-1)
            drawn = self._random.random((len(scores), 1)) * cumulative[:, -1:]
            tokens = (cumulative <= drawn).sum(axis=-1)
        self._count += 1
        if self._remembers:
            self._rows = [np.append(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        return tokens

    def _require_numbers(self, largest: Floats) -> None:
        if np.isfinite(largest).all():
            return
        if np.isneginf(largest).any():
            raise ResPruneError("the settings leave no token to choose from; suppress fewer of them")
        raise FailedError(
            f"the decoder gave NaN (not a number) or infinity as logits of answer token {self._count + 1}, so there is "
            "no answer; if the bundle is fp16, export it with --dtype bf16 or fp32"
        )

    def _processed(self, logits: Floats) -> Floats:
        """The logits processors that greedy `generate` has, in the order of `_get_logits_processor`."""
        sampling, size = self._sampling, logits.shape[-1]
        scores: Floats = logits.copy()
        if self._remembers:
            for row, ids in zip(scores, self._rows, strict=True):
                self._look_back(row, ids)
        if self._count < sampling.min_new_tokens:
            scores[:, _inside(self._eos, size)] = -np.inf
        if sampling.forced_eos_token_id and self._count == sampling.max_new_tokens - 1:
            scores[:] = -np.inf
            scores[:, _inside(sampling.forced_eos_token_id, size)] = 0
        scores[:, _inside(sampling.suppress_tokens, size)] = -np.inf
        if self._count == 0:
            scores[:, _inside(sampling.begin_suppress_tokens, size)] = -np.inf
        return scores

    def _look_back(self, row: Floats, ids: Ints) -> None:
        """Change the scores [V] of one row in place, by the ids of its prompt and its answer so far."""
        penalty, size = self._sampling.repetition_penalty, self._sampling.no_repeat_ngram_size
        if penalty != 1:
            seen = _inside(np.unique(ids), len(row))
            values = row[seen]
            row[seen] = np.where(values < 0, values * penalty, values / penalty)
        if size:
            row[_inside(_would_repeat(ids, size), len(row))] = -np.inf


def probabilities(scores: Floats, sampling: Sampling) -> npt.NDArray[np.float64]:
    """What a token is drawn from at a temperature above 0: [B, V] of `scores` [B, V], 0 for what is left out.

    Of the ids at the border of `top_k` all that are equal stay. The nucleus is the fewest most likely tokens whose
    probabilities reach `top_p`; the token that crosses it belongs to it, and equals stand in order of id.
    """
    below = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    if 0 < sampling.top_k < scores.shape[-1]:
        least = np.partition(below, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        below[below < least] = -np.inf
    with np.errstate(over="ignore"):  # at a temperature of almost 0 that is minus infinity
        weights: npt.NDArray[np.float64] = np.exp(below / sampling.temperature)
    weights /= weights.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=-1)
        before = np.cumsum(ranked, axis=-1) - ranked
        ranked[:, 1:][before[:, 1:] >= sampling.top_p] = 0
        np.put_along_axis(weights, order, ranked, axis=-1)
    weights[weights < sampling.min_p * weights.max(axis=-1, keepdims=True)] = 0
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def _would_repeat(ids: Ints, size: int) -> Ints:
    """The ids that would make the last `size` of them a run that was there before."""
    if len(ids) < size:
        return ids[:0]
    runs = np.lib.stride_tricks.sliding_window_view(ids, size)  # [L - size + 1, size]
    tail = ids[len(ids) - size + 1 :]
    found: Ints = runs[(runs[:, :-1] == tail).all(axis=1), -1]
    return found


def _inside(ids: Sequence[int] | Ints, size: int) -> Ints:
    """Those of the ids that have a logit."""
    array = np.asarray(ids, np.int64)
    return array[(array >= 0) & (array < size)]
