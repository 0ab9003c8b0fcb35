"""Time the same question at several budgets, in turns, so that a noisy minute hits all alike."""

from __future__ import annotations

import platform
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from resprune.runtime.defaults import LEAST_REPEATS, REPEAT_SECONDS
from resprune.runtime.errors import ResPruneError

if TYPE_CHECKING:
    from resprune.runtime.families.image import ImageSource
    from resprune.runtime.pipeline import Pipeline

QUESTION = "What is in this image?"
FILLER = " the" * 16
DECODED = 32
"""Tokens of each answer."""
STAGES = ("pixels", "prompt", "vision", "prefill")
"""The way to the first token: preprocess, tokenize, encode and select, then the language model reads the prompt."""


@dataclass(frozen=True)
class Timing:
    """The median, and the first and third quartile, of `repeats` samples: milliseconds where nothing else is said."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        """Median (quartiles)."""
        return f"{self.median:.4g} ({self.low:.4g}–{self.high:.4g})"


@dataclass(frozen=True)
class Case:
    """One budget: `tokens` are kept of the `num_tokens` of the image.

    `stages` are those of `STAGES`, in milliseconds as `first_token` is; `peak_bytes` is the largest resident memory of
    a process that loads the bundle and asks with this budget or a smaller one, None where the system does not tell.
    """

    tokens: int
    num_tokens: int
    prompt_tokens: int
    stages: dict[str, Timing]
    first_token: Timing
    tokens_per_second: Timing
    peak_bytes: int | None

    @property
    def name(self) -> str:
        """K, or "all"."""
        return "all" if self.tokens == self.num_tokens else str(self.tokens)

    @property
    def before_prefill(self) -> float:
        """Milliseconds of what pruning cannot shorten: all stages but the prefill."""
        return sum(self.stages[name].median for name in STAGES[:-1])

    @property
    def vision_share(self) -> float:
        """The part of the first token's time that the encoder takes, the selection included."""
        return self.stages["vision"].median / self.first_token.median

    def gains(self, base: Case) -> dict[str, float]:
        """How many times as fast as `base`, which has more tokens.

        `prefill_ideal` is the ratio of the prompts' lengths; `first_token_limit` would be reached if the prefill took
        no time.
        """
        return {
            "prefill": base.stages["prefill"].median / self.stages["prefill"].median,
            "prefill_ideal": base.prompt_tokens / self.prompt_tokens,
            "first_token": base.first_token.median / self.first_token.median,
            "first_token_limit": base.first_token.median / self.before_prefill,
        }


def timing(samples: Sequence[float] | npt.NDArray[np.float64]) -> Timing:
    """Median and quartiles of samples, in the unit of the samples."""
    low, median, high = np.percentile(samples, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(samples))


def measure(
    pipeline: Pipeline,
    image: ImageSource,
    question: str,
    budgets: Sequence[int],
    repeats: int | None,
    say: Callable[[str], None],
) -> list[Case]:
    """Each budget `repeats` times, warm, in an order drawn anew in each round; the cases by ascending budget.

    None is at least `LEAST_REPEATS`, and as many more as fit into `REPEAT_SECONDS`: short answers vary most. `say` is
    told how far it has come.
    """
    ascending = sorted(budgets)
    peaks: dict[int, int | None] = {}
    for tokens in ascending:  # the warm-up goes up, so that the peak of memory so far is that of this budget
        say(f"warming up, {tokens} tokens")
        _sample(pipeline, image, question, tokens)
        peaks[tokens] = peak_bytes()
    samples: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in ascending}
    order, draw = list(ascending), random.Random(0)
    end, turn = perf_counter() + REPEAT_SECONDS, 0
    while turn < (LEAST_REPEATS if repeats is None else repeats) or (
        repeats is None and perf_counter() < end
    ):
        turn += 1
        draw.shuffle(order)
        for tokens in order:
            say(f"round {turn}, {tokens} tokens")
            samples[tokens].append(_sample(pipeline, image, question, tokens))
    (num_tokens,) = pipeline.look(image).num_tokens
    return [_case(tokens, num_tokens, peaks[tokens], samples[tokens]) for tokens in ascending]


def _sample(pipeline: Pipeline, image: ImageSource, question: str, tokens: int) -> dict[str, float]:
    """One answer: milliseconds of its stages and to its first token, tokens per second of the rest, prompt length."""
    start = perf_counter()
    answer = pipeline.ask(
        image, question, tokens=tokens, temperature=0.0, max_new_tokens=DECODED, min_new_tokens=DECODED
    )
    steps = answer.steps()
    next(steps)  # what is there before the language model's first step
    next(steps)
    first = perf_counter()
    for _ in steps:
        pass
    seconds = perf_counter() - first
    if answer.tokens_written < 2:
        raise ResPruneError(
            "an answer of one token has no speed that could be measured; "
            "give fewer --prompt-tokens, or a server that streams"
        )
    sample = {name: answer.timings[name] for name in STAGES[:-1]}
    sample["first_token"] = 1e3 * (first - start)
    # The choice of the first token as well, and from a server all its wait.
    sample["prefill"] = sample["first_token"] - sum(sample[name] for name in STAGES[:-1])
    sample["tokens_per_second"] = (answer.tokens_written - 1) / seconds
    sample["prompt_tokens"] = answer.prompt_tokens
    return sample


def _case(tokens: int, num_tokens: int, peak: int | None, samples: Sequence[dict[str, float]]) -> Case:
    of = {name: timing([sample[name] for sample in samples]) for name in samples[0]}
    return Case(
        tokens,
        num_tokens,
        int(of["prompt_tokens"].median),
        {name: of[name] for name in STAGES},
        of["first_token"],
        of["tokens_per_second"],
        peak,
    )


def question_of(pipeline: Pipeline, image: ImageSource, text_tokens: int | None) -> str:
    """A question whose prompt has about `text_tokens` tokens of text, its template's included; None is a short one.

    Raises `ResPruneError` for fewer than the template and a short question have.
    """
    if text_tokens is None:
        return QUESTION
    view = pipeline.look(image)

    def count(question: str) -> int:
        answer = view.ask(question, tokens=1, max_new_tokens=1)
        answer.close()
        return answer.prompt_tokens - 1

    least = count(QUESTION)
    if text_tokens < least:
        raise ResPruneError(
            f"--prompt-tokens should be {least} or more, which the template and a short question have"
        )
    words = FILLER.split(" ")[1:]
    per_word = (count(QUESTION + FILLER) - least) / len(words)
    return QUESTION + f" {words[0]}" * round((text_tokens - least) / per_word)


def peak_bytes() -> int | None:
    """The largest resident memory of this process since it began; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor() -> str:
    """The model name, and which matrix extensions it has: they decide what half precision costs."""
    flags = cpu_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags]
    name = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()} ({' '.join(known)})".removesuffix(" ()")


def cpu_flags() -> list[str]:
    """The extensions that Linux lists for the first core."""
    return next((line.split(":")[1].split() for line in _cpuinfo() if line.startswith("flags")), [])


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
