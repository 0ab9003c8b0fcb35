"""From images and a question to an answer: what a program that answers begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from resprune.runtime.answer import Answer, Batch, Row
from resprune.runtime.arguments import choice, flag, instance, items, whole
from resprune.runtime.backends.backend import BackendFactory, Embedding, closed_early
from resprune.runtime.backends.onnxruntime import onnxruntime_backend
from resprune.runtime.backends.providers import CPU
from resprune.runtime.backends.session import GraphRunner, OrtGraphs, SessionOptions, already_closed
from resprune.runtime.budget import Tokens, wanted
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.hashes import Progress, hashed_meanwhile
from resprune.runtime.bundle.manifest import FLAVOURS, Manifest
from resprune.runtime.chat import Chat
from resprune.runtime.defaults import MAX_PIXELS
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.image import Box, ImageSource, load_image
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.generate import TextStream
from resprune.runtime.prompt.messages import Message, Turn, as_messages, checked_messages
from resprune.runtime.prompt.prompter import Prompt, Prompter
from resprune.runtime.sampling import Sampling, SamplingOptions, bundle_sampling, eos_token_ids
from resprune.runtime.walk import Encoded, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

Images = ImageSource | list[ImageSource] | tuple[ImageSource, ...]
GraphsFactory = Callable[[Bundle, SessionOptions], GraphRunner]


class Pipeline:
    """A bundle that is ready to answer.

    Safe for any number of threads: the sessions are shared, and everything that belongs to an answer, its KV cache
    above all, lives in the answer. Answers may be open at once, be read in turns and finish in any order; how many run
    together is for the caller to limit, for each holds its own cache. One answer may be read by several threads. A
    `Chat` is one conversation: ask its next question when the one before has been answered. `close` ends answers that
    are still being read with a `ResPruneError`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        max_pixels: int = MAX_PIXELS,
        generator: BackendFactory = onnxruntime_backend,
        graphs: GraphsFactory = OrtGraphs,
    ) -> None:
        self._bundle = instance(bundle, "bundle", Bundle, "a Bundle (Pipeline.load reads one)")
        instance(options, "options", SessionOptions, "SessionOptions")
        self._max_pixels = whole(max_pixels, "max_pixels", 1)
        self._prompter = Prompter(bundle)
        self._eos = eos_token_ids(bundle)
        self._graphs = graphs(bundle, options)
        with ExitStack() as undo:
            undo.callback(self._graphs.close)
            embedding = Embedding(self._graphs)
            self._walk = Walk(bundle, self._graphs, embedding)
            self._sampling = bundle_sampling(bundle)
            # ONNX Runtime packs a session's weights on one core; the tower and the language model open side by side.
            with ThreadPoolExecutor(1) as thread:
                vision = [thread.submit(self._graphs.open, graph) for graph in self._walk.vision_graphs]
                self._backend = generator(bundle, embedding, options)
                undo.callback(self._backend.close)
                for opened in vision:
                    opened.result()
            undo.pop_all()
        self._closed = False
        self.load_ms = 0.0

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        check_hashes: bool = True,
        check_again: bool = False,
        progress: Progress | None = None,
        providers: Sequence[str] = (CPU,),
        threads: int = 0,
        max_pixels: int = MAX_PIXELS,
        engines: str | None = None,
        generator: BackendFactory | None = None,
    ) -> Pipeline:
        """Check the bundle at the path `bundle` and open it.

        `check_hashes=False` skips the SHA-256 of the files. A large file that has not changed since its last check is
        not hashed again, unless `check_again`. `progress(done, all)` is called as bytes are hashed, by any thread.
        `providers` and `threads` are those of `SessionOptions`.
        An image of more than `max_pixels` is refused before it is decoded. `engines` ("tensorrt" or "tensorrt-rtx")
        runs the bundle's engines for the GPU at hand instead of ONNX Runtime. `generator` opens another backend, such
        as `servers.server(url)`; the bundle's decoder is then not opened.
        Raises `ResPruneError` if the bundle is incomplete, altered, or made by a newer resprune.
        """
        start = perf_counter()
        options = SessionOptions(providers, threads)
        whole(max_pixels, "max_pixels", 1)
        graphs, answering = _run_by(engines)
        if generator is not None and not callable(generator):
            raise ResPruneError(
                f"generator should be a function that opens a backend, not {type(generator).__name__}; "
                "such as server(url) of resprune.runtime.backends.servers"
            )
        check, again = flag(check_hashes, "check_hashes"), flag(check_again, "check_again")
        opened = read_bundle(bundle, check_hashes=False)
        files = opened.manifest.files if check else {}
        with ExitStack() as undo:
            with hashed_meanwhile(opened.root, files, remember=not again, progress=progress):
                pipeline = cls(opened, options, max_pixels, generator or answering, graphs)
                undo.callback(pipeline.close)
            undo.pop_all()
        pipeline.load_ms = (perf_counter() - start) * 1e3
        return pipeline

    @property
    def manifest(self) -> Manifest:
        """The contents of the bundle's `resprune.json`."""
        return self._bundle.manifest

    def ask(
        self,
        image: Images,
        question: str,
        *,
        about: Sequence[str] | None = None,
        tokens: Tokens = None,
        plain_text: bool = False,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Ask about an image, or about a list of images that the prompt shows in that order.

        An image is a path, the bytes of a file, a Pillow image or a uint8 array [H, W, 3]. `about` names the keywords
        that guide the selection in place of the question's nouns; `tokens` is how many visual tokens of each image to
        keep: a number, or a share of them such as "11%", at most the bundle's K, which is the default; or "all" where
        the bundle has the encoder apart. Special tokens that the question types are control tokens, as in Hugging Face;
        with `plain_text` they are text. The answer comes as it is read; with `stream=False` it is complete on return.
        Further arguments are those of `Sampling`, in place of what the bundle says. Raises `ResPruneError` for
        what the user can put right.
        """
        flag(stream, "stream")
        timings: dict[str, float] = {}
        with _stage(timings, "pixels"):
            encoded = list(map(Encoded, self._prepared(_listed(image))))
        with _stage(timings, "prompt"):
            prompt = self._prompt(as_messages(question, len(encoded)), encoded, about, plain_text)
        settings = self._sampling.changed(sampling)
        (answer,) = self._answer([prompt], [encoded], timings, tokens, settings)
        return answer if stream else answer.finish()

    def ask_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[str],
        *,
        about: Sequence[Sequence[str] | None] | None = None,
        tokens: Tokens = None,
        plain_text: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Answer]:
        """Ask several questions at once, each about its own image or list of images; complete on return.

        `about` has one entry a question. An answer is the one `ask` gives, in fewer runs of the language model.
        """
        listed = [_listed(image) for image in items(images, "images", "a list with an image a question")]
        questions = items(questions, "questions", "a list of questions (for one, use ask)")
        terms = (
            [None] * len(questions)
            if about is None
            else items(about, "about", "a list with an entry a question")
        )
        if not len(listed) == len(questions) == len(terms):
            raise ResPruneError(
                f"a batch has one image (or list of images) a question: "
                f"got {len(listed)} for {len(questions)} questions"
                + ("" if about is None else f" and {len(terms)} entries of about")
            )
        if not questions:
            return []
        timings: dict[str, float] = {}
        with _stage(timings, "pixels"):
            encoded = [list(map(Encoded, self._prepared(row))) for row in listed]
        with _stage(timings, "prompt"):
            prompts = [
                self._prompt(as_messages(question, len(row)), row, words, plain_text)
                for question, row, words in zip(questions, encoded, terms, strict=True)
            ]
        answers = self._answer(prompts, encoded, timings, tokens, self._sampling.changed(sampling))
        return [answer.finish() for answer in answers]

    def look(self, image: Images) -> View:
        """Encode an image, or several, to ask about more than once; `ResPruneError` for what is no image.

        With a split bundle (`resprune export --split`) the images go through the vision tower here and never
        again; from a fused bundle only their pixels are kept, and the tower runs with each question.
        """
        self._require_open()
        return View(self, self._walk.encode(self._prepared(_listed(image))))

    def without_images(self) -> View:
        """A view of no image: the language model alone answers, and there is nothing to select."""
        self._require_open()
        return View(self, [])

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Where each visual token lies in an image of `image_size` (width, height): left, top, right, bottom in pixels.

        None for a token that shows no part of the image, such as the newline after a row of tiles.
        """
        size = [
            whole(side, "each side of image_size", 1) for side in items(image_size, "image_size", "a pair")
        ]
        if len(size) != 2 or size[0] * size[1] > self._max_pixels:
            raise ResPruneError(
                f"image_size should be width and height of at most {self._max_pixels} pixels, not {shown(size)}"
            )
        return self._walk.preprocessor.boxes((size[0], size[1]))

    def close(self) -> None:
        """Free the sessions. Asking afterwards, or reading on in an open answer, raises `ResPruneError`."""
        if self._closed:
            return
        self._closed = True
        self._backend.close()
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
            raise already_closed()

    def _require_open_to_read(self) -> None:
        if self._closed:
            raise closed_early()

    @np.errstate(
        all="ignore"
    )  # of settings that leave the range of float32: the encoder is given what results
    def _prepared(self, images: Sequence[ImageSource]) -> list[PreparedImage]:
        preprocessor = self._walk.preprocessor
        return [preprocessor(load_image(image, max_pixels=self._max_pixels)) for image in images]

    def _prompt(
        self,
        messages: Sequence[Message],
        encoded: Sequence[Encoded],
        about: Sequence[str] | None,
        plain_text: bool,
    ) -> Prompt:
        expansions = [one.image.expansion for one in encoded]
        return self._prompter.conversation(
            messages, about=about, expansions=expansions, plain_text=flag(plain_text, "plain_text")
        )

    def _answer(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[Sequence[Encoded]],
        timings: dict[str, float],
        tokens: Tokens,
        sampling: Sampling,
    ) -> list[Answer]:
        """Answers to prompts, each about the images of its own entry of `encoded`."""
        self._require_open()
        counts = [len(row) for row in encoded]
        with _stage(timings, "vision"):
            embeds = self._walk.embed(prompts)
            text = [
                keywords
                for prompt, row, count in zip(prompts, embeds, counts, strict=True)
                for keywords in [self._walk.keywords(prompt, row)] * count
            ]
            together = [one for row in encoded for one in row]
            budgets = wanted(tokens, [one.image.num_tokens for one in together])
            kept = iter(self._walk.select(together, text, budgets))
            kept_rows = [[next(kept) for _ in range(count)] for count in counts]
        with _stage(timings, "prefill"):
            request = self._walk.splice(embeds, prompts, kept_rows)
            steps, limit = self._walk.prefill(self._backend, request, sampling)
        rows = [Row(TextStream(self._prompter.tokenizer), self._eos, limit) for _ in prompts]
        batch = Batch(steps, rows, timings, self._require_open_to_read)
        lengths = (request.spliced.attention_mask > 0).sum(axis=1).tolist()
        return [
            Answer(batch, row, prompt, [image.picks for image in of_row], length)
            for row, prompt, of_row, length in zip(rows, prompts, kept_rows, lengths, strict=True)
        ]


class View:
    """Encoded images, to be asked about any number of times, from any thread."""

    def __init__(self, pipeline: Pipeline, encoded: Sequence[Encoded]) -> None:
        self._pipeline = pipeline
        self._encoded = encoded

    @staticmethod
    def joined(views: Sequence[View]) -> View:
        """One view of the images of several, in that order; all of one pipeline, and at least one."""
        listed = [
            instance(view, "each of views", View, "a View")
            for view in items(views, "views", "a list of views")
        ]
        pipelines = {id(view._pipeline) for view in listed}
        if len(pipelines) != 1:
            raise ResPruneError(f"views should be of one pipeline, not of {len(pipelines)}")
        return View(listed[0]._pipeline, [one for view in listed for one in view._encoded])

    @property
    def num_tokens(self) -> list[int]:
        """How many visual tokens each image has unpruned."""
        return [one.image.num_tokens for one in self._encoded]

    def budgets(self, tokens: Tokens = None) -> list[int]:
        """How many visual tokens of each image `tokens` keeps; `ResPruneError` where `ask` raises one for it."""
        images = [one.image for one in self._encoded]
        return self._pipeline._walk.budgets(images, wanted(tokens, self.num_tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds: pixels, and encoded tokens."""
        return sum(one.nbytes for one in self._encoded)

    def ask(
        self,
        question: str,
        *,
        about: Sequence[str] | None = None,
        history: Sequence[Turn] = (),
        tokens: Tokens = None,
        plain_text: bool = False,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Ask as `Pipeline.ask` does; the selection is made anew for this question.

        `history` is what was said about these images before.
        """
        messages = as_messages(question, len(self._encoded), history)
        return self._answer(
            messages, about=about, tokens=tokens, plain_text=plain_text, stream=stream, **sampling
        )

    def answer(
        self,
        messages: Sequence[Message],
        *,
        about: Sequence[str] | None = None,
        tokens: Tokens = None,
        plain_text: bool = False,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Answer a conversation of any form, as `ask` does, which ends with a user's message.

        `messages` are those of chat templates: `role` is system, user or assistant, `content` a list of
        `{"type": "text", "text": …}` and `{"type": "image"}`, one for each image of the view, in order.
        """
        return self._answer(
            checked_messages(messages, len(self._encoded)),
            about=about,
            tokens=tokens,
            plain_text=plain_text,
            stream=stream,
            **sampling,
        )

    def _answer(
        self,
        messages: Sequence[Message],
        about: Sequence[str] | None,
        tokens: Tokens,
        plain_text: bool,
        stream: bool,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        flag(stream, "stream")
        timings: dict[str, float] = {}
        with _stage(timings, "prompt"):
            prompt = self._pipeline._prompt(messages, self._encoded, about, plain_text)
        settings = self._pipeline._sampling.changed(sampling)
        (answer,) = self._pipeline._answer([prompt], [self._encoded], timings, tokens, settings)
        return answer if stream else answer.finish()

    def chat(self) -> Chat:
        """A conversation about these images, which begins empty."""
        return Chat(self)


def _run_by(engines: str | None) -> tuple[GraphsFactory, BackendFactory]:
    """What runs the graphs, and what answers unless another generator is given."""
    if engines is None:
        return OrtGraphs, onnxruntime_backend
    choice(engines, "engines", FLAVOURS)
    from resprune.runtime.backends.tensorrt import Engines, tensorrt_backend

    return partial(Engines, engines), tensorrt_backend


def _listed(image: Images) -> list[ImageSource]:
    listed: list[ImageSource] = list(image) if isinstance(image, list | tuple) else [image]
    if not listed:
        raise ResPruneError("there is no image; give at least one")
    return listed


@contextmanager
def _stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Note the milliseconds the block takes."""
    start = perf_counter()
    yield
    timings[name] = (perf_counter() - start) * 1e3
