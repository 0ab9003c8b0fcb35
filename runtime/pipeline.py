"""From pictures and a question to an answer: the runtime's front door."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from resprune.runtime.answer import Answer, Row, Run
from resprune.runtime.backends.backend import GeneratorFactory, Request, onnxruntime_generator
from resprune.runtime.backends.onnxruntime import Embedding
from resprune.runtime.backends.providers import CPU
from resprune.runtime.backends.session import GraphRunner, OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.manifest import FLAVOURS, Manifest
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import MAX_PIXELS, Box, ImageSource, load_image
from resprune.runtime.families.picture import Picture
from resprune.runtime.families.table import family_of
from resprune.runtime.generate import Sampling, TextStream
from resprune.runtime.prompt.prompter import Prompt, Prompter, Turn
from resprune.runtime.prompt.splice import Floats, KeptTokens, Spliced, splice
from resprune.runtime.vision import Looked, Vision

if TYPE_CHECKING:
    from typing_extensions import Unpack

Images = ImageSource | list[ImageSource] | tuple[ImageSource, ...]


GraphsFactory = Callable[[Bundle, SessionOptions], GraphRunner]


class SamplingOptions(TypedDict, total=False):
    """What every way of asking takes by keyword, with the defaults of `generate.Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


class Pipeline:
    """A bundle that is ready to answer. It holds one KV cache, so use one pipeline a thread.

    An answer that is still being read when the next question comes is finished first (its remaining pieces wait
    for the reader); one that nobody holds any more is dropped.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        max_pixels: int = MAX_PIXELS,
        generator: GeneratorFactory = onnxruntime_generator,
        graphs: GraphsFactory = OrtGraphs,
    ) -> None:
        self._bundle = bundle
        self._max_pixels = max_pixels
        self._prompter = Prompter(bundle)
        self._preprocessor = family_of(bundle).preprocessor(bundle)
        self._graphs = graphs(bundle, options)
        self._graphs.open("vision_select")
        self._vision = Vision(bundle, self._preprocessor, self._graphs)
        self._embedding = Embedding(self._graphs)
        self._generator = generator(bundle, self._embedding, options)
        self._running: Callable[[], Run | None] = lambda: None
        self._closed = False
        self.load_ms = 0.0

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        check_hashes: bool = True,
        providers: Sequence[str] = (CPU,),
        threads: int = 0,
        max_pixels: int = MAX_PIXELS,
        engines: str | None = None,
        generator: GeneratorFactory | None = None,
    ) -> Pipeline:
        """Check a bundle and open it.

        `check_hashes=False` leaves out the SHA-256 of the files; `providers` and `threads` as in `SessionOptions`;
        a picture of more than `max_pixels` is refused before it is decoded; `engines`, a
        flavour of TensorRT, takes the bundle's engines for the GPU at hand in place of ONNX Runtime; `generator` opens
        what answers, and the bundle's decoder is left alone if that is something else.
        Raises `ResPruneError` for a bundle that is incomplete, altered or made by a newer resprune.
        """
        start = perf_counter()
        options = SessionOptions(providers, threads)
        graphs, answering = _run_by(engines)
        opened = read_bundle(bundle, check_hashes=check_hashes)
        pipeline = cls(opened, options, max_pixels, generator or answering, graphs)
        pipeline.load_ms = (perf_counter() - start) * 1e3
        return pipeline

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._bundle.manifest

    def ask(
        self,
        image: Images,
        question: str,
        *,
        about: Sequence[str] | None = None,
        tokens: int | None = None,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Ask about a picture, or about a list of pictures that the prompt shows in that order.

        A picture is a path, the bytes of a file, a Pillow image or a uint8 array. `about` names the words that
        steer the selection in place of the question's nouns; `tokens` is how many visual tokens of each picture
        to keep, at most the bundle's K, which is the default. The answer comes as it is read; with `stream=False`
        it is complete on return. Raises `ResPruneError` for what the user can put right.
        """
        timings: dict[str, float] = {}
        with _stage(timings, "prompt"):
            prompt = self._prompter.prompt(question, len(_listed(image)), about=about)
        with _stage(timings, "pixels"):
            looked = Looked(self._pictures(_listed(image)), None)
        (answer,) = self._answer(
            [prompt], looked, [len(_listed(image))], timings, tokens, Sampling(**sampling)
        )
        return answer if stream else answer.finish()

    def ask_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[str],
        *,
        about: Sequence[Sequence[str] | None] | None = None,
        tokens: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Answer]:
        """Ask several questions at once, each about its own picture or list of pictures; complete on return.

        `about` has one entry a question. An answer is the one `ask` gives, in fewer runs of the language model.
        """
        listed = [_listed(image) for image in images]
        terms = [None] * len(questions) if about is None else about
        if not len(listed) == len(questions) == len(terms):
            raise ResPruneError(
                f"a batch has one picture (or list of pictures) a question: "
                f"got {len(listed)} for {len(questions)} questions"
                + ("" if about is None else f" and {len(about)} entries of about")
            )
        if not questions:
            return []
        timings: dict[str, float] = {}
        with _stage(timings, "prompt"):
            prompts = [
                self._prompter.prompt(question, len(row), about=words)
                for question, row, words in zip(questions, listed, terms, strict=True)
            ]
        with _stage(timings, "pixels"):
            looked = Looked(self._pictures([image for row in listed for image in row]), None)
        answers = self._answer(
            prompts, looked, [len(row) for row in listed], timings, tokens, Sampling(**sampling)
        )
        return [answer.finish() for answer in answers]

    def look(self, image: Images) -> View:
        """Take in a picture, or several, to ask about more than once.

        With a split bundle (`resprune export --split`) the pictures go through the vision tower here and never
        again; from a fused bundle only their pixels are kept, and the tower runs with each question.
        """
        self._require_open()
        return View(self, self._vision.look(self._pictures(_listed(image))))

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Where each visual token lies in a picture of `image_size` (width, height) pixels; None for nowhere."""
        return self._preprocessor.boxes(image_size)

    def close(self) -> None:
        """Give back the sessions and the cache; nothing can be asked afterwards, nor an answer be read further."""
        if self._closed:
            return
        self._closed = True
        if (running := self._running()) is not None and not running.finished and running.fault is None:
            running.fault = ResPruneError(
                "the pipeline was closed before this answer was read to its end; read it before that"
            )
        self._generator.close()
        self._graphs.close()

    def __enter__(self) -> Pipeline:
        """The pipeline itself; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ResPruneError("the pipeline is closed; load it again")

    def _pictures(self, images: Sequence[ImageSource]) -> list[Picture]:
        return [self._preprocessor(load_image(image, max_pixels=self._max_pixels)) for image in images]

    def _answer(
        self,
        prompts: Sequence[Prompt],
        looked: Looked,
        counts: Sequence[int],
        timings: dict[str, float],
        tokens: int | None,
        sampling: Sampling,
    ) -> list[Answer]:
        """Answers to prompts; of the pictures of `looked` the first `counts[0]` belong to the first prompt …."""
        self._require_open()
        with _stage(timings, "vision"):
            embeds = self._embed(prompts)
            text = [
                row[prompt.text_positions]
                for row, prompt, count in zip(embeds, prompts, counts, strict=True)
                for _ in range(count)
            ]
            kept = iter(self._vision.select(looked, text, tokens))
            kept_rows = [[next(kept) for _ in range(count)] for count in counts]
        with _stage(timings, "prefill"):
            spliced = self._splice(embeds, prompts, kept_rows)
            room = spliced.room(self.manifest.context_length)
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
            if (running := self._running()) is not None:
                running.settle()
            pieces = self._generator.start(Request(prompts, kept_rows, spliced), sampling)
        rows = [Row(TextStream(self._prompter.tokenizer)) for _ in prompts]
        run = Run(pieces, rows, timings)
        self._running = weakref.ref(run)
        return [
            Answer(run, row, prompt, [tokens.picks for tokens in of_row])
            for row, prompt, of_row in zip(rows, prompts, kept_rows, strict=True)
        ]

    def _embed(self, prompts: Sequence[Prompt]) -> list[Floats]:
        """Input embeddings [S_b, D] of each prompt; those of its image tokens are of no meaning."""
        ids = np.concatenate([prompt.ids_to_embed(self.manifest.image_token_id) for prompt in prompts])
        embeds = self._embedding(ids[None])[0]  # [S_0 + S_1 + …, D]
        return np.split(embeds, np.cumsum([len(prompt.ids) for prompt in prompts])[:-1])

    def _splice(
        self,
        embeds: Sequence[Floats],
        prompts: Sequence[Prompt],
        kept: Sequence[Sequence[KeptTokens]],
    ) -> Spliced:
        return splice(
            embeds,
            [prompt.ids for prompt in prompts],
            kept,
            image_token_id=self.manifest.image_token_id,
            positions=self.manifest.positions,
        )


class View:
    """Pictures that have been looked at, to be asked about any number of times."""

    def __init__(self, pipeline: Pipeline, looked: Looked) -> None:
        self._pipeline = pipeline
        self._looked = looked

    def ask(
        self,
        question: str,
        *,
        about: Sequence[str] | None = None,
        history: Sequence[Turn] = (),
        tokens: int | None = None,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Ask as `Pipeline.ask` does; the selection is made anew for this question.

        `history` is what was said about these pictures before.
        """
        timings: dict[str, float] = {}
        count = len(self._looked.pictures)
        with _stage(timings, "prompt"):
            prompt = self._pipeline._prompter.prompt(question, count, history=history, about=about)
        (answer,) = self._pipeline._answer(
            [prompt], self._looked, [count], timings, tokens, Sampling(**sampling)
        )
        return answer if stream else answer.finish()

    def chat(self) -> Chat:
        """A conversation about these pictures, which begins empty."""
        return Chat(self)


class Chat:
    """A conversation in which every question makes its own selection.

    The new selection changes rows near the head of the prompt, on which every later key and value depends. So the
    whole conversation is prefilled again with the rows this question keeps: prompt, positions and KV cache always
    belong together, and an answer is the one a fresh prompt of the whole conversation gets.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._turns: list[tuple[str, Answer]] = []

    @property
    def history(self) -> list[Turn]:
        """What has been said; the answer being read is finished first, and one that failed was never given."""
        return [Turn(question, answer.text.strip()) for question, answer in self._turns if not answer.failed]

    def ask(
        self,
        question: str,
        *,
        about: Sequence[str] | None = None,
        tokens: int | None = None,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The next question; one that raises, now or while it is read, leaves the conversation as it was."""
        answer = self._view.ask(
            question, about=about, history=self.history, tokens=tokens, stream=stream, **sampling
        )
        self._turns.append((question, answer))
        return answer


def _run_by(engines: str | None) -> tuple[GraphsFactory, GeneratorFactory]:
    """What runs the graphs, and what answers unless another generator is given."""
    if engines is None:
        return OrtGraphs, onnxruntime_generator
    if engines not in FLAVOURS:
        raise ResPruneError(f"{engines} is no flavour of TensorRT; choose from {', '.join(FLAVOURS)}")
    from resprune.runtime.backends.tensorrt import Engines, tensorrt_generator

    return partial(Engines, engines), tensorrt_generator


def _listed(image: Images) -> list[ImageSource]:
    listed: list[ImageSource] = list(image) if isinstance(image, list | tuple) else [image]
    if not listed:
        raise ResPruneError("there is no picture; give at least one")
    return listed


@contextmanager
def _stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Note the milliseconds the block takes."""
    start = perf_counter()
    yield
    timings[name] = (perf_counter() - start) * 1e3
