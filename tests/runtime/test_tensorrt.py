"""Answers from engines equal ONNX Runtime's: on a stand-in for the GPU here, on the GPU itself where there is one."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any

import numpy as np
import pytest

from resprune import Pipeline, ResPruneError
from resprune.exporter.tensorrt.engines import build
from resprune.exporter.tensorrt.limits import Limits
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.cuda import Buffer, gpu_at_hand
from resprune.runtime.backends.engines import WIDENED_BY, choose_engines, installed_flavours
from resprune.runtime.backends.onnxruntime import OrtDecoder, onnxruntime_decoder
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.backends.tensorrt import Engines, TensorRTDecoder, num_bytes
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.cli import main
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.splice import Spliced
from tests.runtime import gpu_stand_in
from tests.runtime.gpu_stand_in import FLAVOUR, VERSION, Cuda, Place, stand_in_for, with_engines
from tests.runtime.pipelines import QUESTION, picture
from tests.runtime.ways import PICTURES, QUESTIONS, alone, wrong_at_once

OPTIONS = SessionOptions(threads=1)
STEPS = 40
THREADS, ROUNDS = 8, 24
# As other tests export them.
MODELS: dict[str, dict[str, Any]] = {
    "clip-llama": {"k": 7},
    "next-llama": {"k": 88},
    "qwen25": {"share": 1.0},
}


@pytest.fixture(scope="module")
def bundles(
    tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Variant → a split bundle of its own, to which engines may be added."""

    def copy(variant: str, **options: Any) -> Path:
        bundle = tiny_bundle(variant, split=True, **MODELS[variant], **options)
        return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("engines") / variant))

    return copy


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "gpu":
        try:
            gpu_at_hand()
        except ResPruneError as error:
            pytest.skip(str(error))
        flavour = installed_flavours()[-1]
        # Another order of sums in every product than ONNX Runtime's.
        yield Place(flavour, lambda root: build(root, flavour, report=lambda line: None), atol=1e-3)
        return
    stand_in = stand_in_for(monkeypatch)
    yield stand_in
    assert stand_in.cuda is not None
    for address in [*stand_in.cuda.blocks]:
        stand_in.cuda.cudaFree(address)  # looks at their ends


@pytest.mark.parametrize(
    ("variant", "attention"),
    [*((variant, "plain") for variant in MODELS), ("clip-llama", "proportional")],
)
def test_answers_are_those_of_onnxruntime(
    place: Place, bundles: Callable[..., Path], variant: str, attention: str
) -> None:
    root = bundles(variant, attention=attention)
    place.equip(root)
    images = [picture(1), picture(2, (90, 40))]
    with Pipeline.load(root) as ours, Pipeline.load(root, engines=place.flavour) as theirs:
        for tokens in (7, 4):
            asked = [
                pipeline.ask(images, QUESTION, tokens=tokens, max_new_tokens=STEPS)
                for pipeline in (ours, theirs)
            ]
            assert asked[0].token_ids == asked[1].token_ids
            for one, other in zip(asked[0].images, asked[1].images, strict=True):
                np.testing.assert_array_equal(one.pick_order, other.pick_order)
                np.testing.assert_array_equal(one.kept_counts, other.kept_counts)
        batch = [
            pipeline.ask_batch(images, [QUESTION, "is there a cat?"], max_new_tokens=STEPS)
            for pipeline in (ours, theirs)
        ]
        assert [answer.token_ids for answer in batch[0]] == [answer.token_ids for answer in batch[1]]
        chats = [pipeline.look(images[0]).chat() for pipeline in (ours, theirs)]
        for question in (QUESTION, "how many?"):
            said = [chat.ask(question, max_new_tokens=8).text for chat in chats]
            assert said[0] == said[1]


def decoders(root: Path, flavour: str) -> tuple[OrtDecoder, TensorRTDecoder]:
    bundle = read_bundle(root)
    engines = Engines(flavour, bundle, OPTIONS)
    ours = onnxruntime_decoder(bundle, Embedding(OrtGraphs(bundle, OPTIONS)), OPTIONS)
    return ours, TensorRTDecoder(bundle, Embedding(engines), engines)


def test_logits_of_prefill_and_steps_with_a_padded_row(place: Place, bundles: Callable[[str], Path]) -> None:
    root = bundles("clip-llama")
    place.equip(root)
    ours, theirs = decoders(root, place.flavour)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, 9, 48)).astype(np.float32)
    mask = np.array([[1] * 9, [0] * 4 + [1] * 5])
    prompt = Spliced(embeds, np.maximum(np.cumsum(mask, axis=1) - 1, 0), mask)
    for _ in range(2):
        sequences = [decoder.start(prompt) for decoder in (ours, theirs)]
        for step in range(30):
            assert [sequence.logits.shape for sequence in sequences] == [(2, 486)] * 2
            np.testing.assert_allclose(sequences[1].logits, sequences[0].logits, atol=place.atol)
            for sequence in sequences:
                sequence.step(np.array([300 + step, 310]))
        sequences[1].close()
    if place.cuda is not None and place.trt is not None:
        of_decoder = [profile for graph, profile in place.trt.runs if graph == "decoder_model_merged"]
        assert of_decoder == ([0] + [1] * 30) * 2, "a profile for the prompt, another for each token after it"
        theirs.embed_tokens(np.array([[300], [310]]))
        before = place.cuda.in_use()
        sequence = theirs.start(prompt)
        assert place.cuda.in_use() > before
        del sequence
        assert place.cuda.in_use() == before, "an answer that nobody holds frees its cache"
    theirs.close()


def test_answers_at_once_are_those_given_alone(place: Place, bundles: Callable[[str], Path]) -> None:
    """In turns in one thread, in many threads, some left unread; and all they had is given back."""
    root = bundles("clip-llama")
    place.equip(root)
    with Pipeline.load(root, engines=place.flavour) as vlm, ThreadPoolExecutor(THREADS) as threads:
        wanted = alone(vlm)
        assert len({str(tokens) for tokens in wanted.values()}) > 20, "shows nothing"
        gc.collect()
        before = held(place)
        reading = [iter(vlm.ask(path, QUESTIONS[0], max_new_tokens=8)) for path in PICTURES]
        in_turns = ["".join(pieces) for pieces in zip(*zip_longest(*reading, fillvalue=""), strict=True)]
        assert in_turns == [vlm.ask(path, QUESTIONS[0], max_new_tokens=8).text for path in PICTURES]
        assert wrong_at_once(vlm, wanted, threads, range(THREADS), ROUNDS) == []
        unread = vlm.ask(PICTURES[0], QUESTIONS[0])
        next(iter(unread))
        assert place.cuda is None or held(place) > before
        del unread, reading
        assert held(place) == before
    assert held(place) == (0, 0)


def test_a_graph_that_runs_keeps_no_other_waiting(
    stand_in: Place, bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of an open answer embeds its token while another thread's image is encoded; closing waits for both.

    What waited for that image does not begin once it is closed.
    """
    engines = Engines(FLAVOUR, with_engines(bundles("clip-llama")), OPTIONS)
    encoder = engines.engine("vision_encoder")._engine
    running, go_on, run = Event(), Event(), encoder._run

    def waits(*given: Any) -> None:
        running.set()
        assert go_on.wait(60)
        run(*given)

    monkeypatch.setattr(encoder, "_run", waits)
    pixels = {"pixel_values": np.zeros((1, 3, 32, 32), np.float32)}
    with ThreadPoolExecutor(3) as threads:
        encoded = threads.submit(engines.run, "vision_encoder", pixels, ["image_features"])
        assert running.wait(60)
        (embeds,) = engines.run("embed_tokens", {"input_ids": np.array([[300]])}, ["inputs_embeds"])
        assert embeds.shape == (1, 1, 48)
        assert not encoded.done()
        lane = engines._lanes["vision_encoder"]
        turn = Announced(lane.turn)
        monkeypatch.setattr(lane, "turn", turn)
        late = threads.submit(engines.run, "vision_encoder", pixels, ["image_features"])
        assert turn.asked.acquire(timeout=60)
        closed = threads.submit(engines.close)
        assert turn.asked.acquire(timeout=60)
        go_on.set()
        closed.result()
    with pytest.raises(ResPruneError, match="the pipeline is closed; load it again"):
        late.result()
    assert encoded.result()[0].shape == (1, 16, 48)
    assert held(stand_in) == (0, 0)


class Announced:
    """A lock that says when it is asked for."""

    def __init__(self, lock: Lock) -> None:
        self.lock, self.asked = lock, Semaphore(0)

    def __enter__(self) -> None:
        self.asked.release()
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def held(place: Place) -> tuple[int, int]:
    """Bytes and streams in use on the stand-in."""
    return (0, 0) if place.cuda is None else (place.cuda.in_use(), len(place.cuda.streams))


def test_nothing_runs_after_its_engines_are_closed(stand_in: Place, bundles: Callable[[str], Path]) -> None:
    """Nor does a step that has begun by then; and nothing is loaded anew."""
    bundle = with_engines(bundles("clip-llama"))
    engines = Engines(FLAVOUR, bundle, OPTIONS)
    decoder = TensorRTDecoder(bundle, Embedding(engines), engines)
    embeds = np.zeros((1, 3, 48), np.float32)
    sequence = decoder.start(Spliced(embeds, np.arange(3)[None], np.ones((1, 3), np.int64)))
    opened = decoder.opened

    def and_closed() -> Any:
        engine = opened()
        engines.close()
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "opened", and_closed)
        with pytest.raises(ResPruneError, match="the pipeline is closed; load it again"):
            sequence.step(np.array([300]))
    decoder.close()
    with pytest.raises(ResPruneError, match="was closed before this answer was read to its end"):
        sequence.step(np.array([300]))
    sequence.close()
    for again in (lambda: engines.run("embed_tokens", {}, []), lambda: engines.open("vision_select")):
        with pytest.raises(ResPruneError, match="the pipeline is closed; load it again"):
            again()
    engines.close()
    assert held(stand_in) == (0, 0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Place:
    return stand_in_for(monkeypatch)


@pytest.mark.parametrize(
    ("limits", "asked", "says"),
    [
        (
            Limits(batch=(1, 1, 1)),
            {"images": 2},
            "vision_encoder takes batch_size from 1 to 1, not 2; .*--batch",
        ),
        (
            Limits(nouns=(1, 1, 2)),
            {"about": ["what", "square", "table"]},
            "text_tokens from 1 to 2, not .*--nouns",
        ),
        (
            Limits(prompt=(1, 8, 12)),
            {},
            "decoder_model_merged takes sequence_length from 1 to 12, not .*--prompt",
        ),
        (
            Limits(context=64),
            {"max_new_tokens": 60},
            "past_sequence_length from 1 to 63, not 64; .*--context",
        ),
    ],
)
def test_a_profile_exceeded_names_axis_limit_and_option(
    stand_in: Place, bundles: Callable[[str], Path], limits: Limits, asked: dict[str, Any], says: str
) -> None:
    root = bundles("clip-llama")
    with_engines(root, limits)
    images = [picture(seed) for seed in range(asked.pop("images", 1))]
    with Pipeline.load(root, engines=FLAVOUR) as pipeline, pytest.raises(ResPruneError, match=says):
        _ = pipeline.ask(images, QUESTION, **asked).text


@pytest.mark.parametrize("variant", MODELS)
def test_an_axis_grows_with_the_option_that_is_named(variant: str, bundles: Callable[[str], Path]) -> None:
    bundle = read_bundle(bundles(variant))
    preprocessor = family_of(bundle).preprocessor(bundle)
    least = preprocessor.axes((1, 1, 1), (1, 4, 8))
    for option, more in (
        ("--batch", preprocessor.axes((1, 1, 4), (1, 4, 8))),
        ("--tokens", preprocessor.axes((1, 1, 1), (1, 4, 80))),
    ):
        wider = {axis for axis in least if more[axis] != least[axis]}
        assert {WIDENED_BY.get(axis, "--tokens") for axis in wider} <= {option}


def test_out_of_device_memory_is_one_sentence(stand_in: Place, bundles: Callable[[str], Path]) -> None:
    root = bundles("clip-llama")
    with_engines(root)
    assert stand_in.cuda is not None
    assert stand_in.trt is not None
    with Pipeline.load(root, engines=FLAVOUR) as pipeline:
        stand_in.cuda.limit = 20_000
        with pytest.raises(ResPruneError, match=r"out of memory: [\d.]+ [kMG]?B more are needed; .*--batch"):
            pipeline.ask(picture(1), QUESTION)
    stand_in.cuda.limit = 1 << 30
    stand_in.trt.fails = "[defaultAllocator.cpp::allocate] Out of memory\n(requested 5 bytes)"
    with pytest.raises(ResPruneError, match=r"out of memory for embed_tokens .*--context") as raised:
        Pipeline.load(root, engines=FLAVOUR)
    assert "\n" not in str(raised.value)
    stand_in.trt.fails = "magic tag does not match"
    with pytest.raises(
        ResPruneError, match=r"could not run embed_tokens .*magic tag.*build its engine again"
    ):
        Pipeline.load(root, engines=FLAVOUR)


def test_ask_by_command(
    stand_in: Place, bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, photo = bundles("clip-llama"), tmp_path / "photo.png"
    with_engines(root)
    picture(1).save(photo)
    ask = ["ask", str(root), str(photo), QUESTION, "--max-new-tokens", "8"]
    assert main(ask) == 0
    expected = capsys.readouterr().out
    assert main([*ask, "--engines", "tensorrt-rtx"]) == 0
    assert capsys.readouterr().out == expected


def test_engines_of_another_gpu_version_or_graph_are_refused(
    bundles: Callable[[str], Path],
) -> None:
    root = bundles("clip-llama")
    bundle = with_engines(root)
    assert choose_engines(bundle, FLAVOUR, VERSION, (8, 6)).target == "sm_86"
    how = rf"resprune build {root} --flavour {FLAVOUR} --target"
    with pytest.raises(ResPruneError, match=rf"engines for sm_86 and this GPU is sm_120; .*{how} sm_120"):
        choose_engines(bundle, FLAVOUR, VERSION, (12, 0))
    with pytest.raises(ResPruneError, match="no tensorrt engines and this GPU is sm_86"):
        choose_engines(bundle, "tensorrt", VERSION, (8, 6))
    with pytest.raises(
        ResPruneError, match=rf"built by {FLAVOUR} {VERSION} and 9.9 is installed; .*{how} sm_86"
    ):
        choose_engines(bundle, FLAVOUR, "9.9", (8, 6))
    name, engines = next(iter(bundle.manifest.engines.items()))
    files = dict(bundle.manifest.files)
    graph = bundle.manifest.graphs["token_select"].file
    files[graph] = replace(files[graph], sha256="0" * 64)
    other = replace(bundle, manifest=replace(bundle.manifest, files=files))
    with pytest.raises(
        ResPruneError, match=rf"token_select.engine was built from another token_select .*{how}"
    ):
        choose_engines(other, FLAVOUR, VERSION, (8, 6))
    fewer = {graph: engine for graph, engine in engines.graphs.items() if graph != "embed_tokens"}
    partial = replace(bundle.manifest, engines={name: replace(engines, graphs=fewer)})
    with pytest.raises(ResPruneError, match=rf"no {FLAVOUR} engine of embed_tokens; .*{how}"):
        choose_engines(replace(bundle, manifest=partial), FLAVOUR, VERSION, (8, 6))


def test_an_engine_that_was_exchanged_is_refused(stand_in: Place, bundles: Callable[[str], Path]) -> None:
    root = bundles("clip-llama")
    bundle = with_engines(root)
    path = bundle.file_path(next(iter(bundle.manifest.engines.values())).graphs["vision_select"].file)
    path.write_text(path.read_text()[::-1])
    with pytest.raises(ResPruneError, match=r"vision_select.engine was altered"):
        Pipeline.load(root, engines=FLAVOUR)


def test_without_tensorrt_or_gpu_it_says_what_is_missing(
    bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = bundles("clip-llama")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        ResPruneError, match=r"tensorrt cannot be imported .*pip install .*resprune\[tensorrt\]"
    ):
        Pipeline.load(root, engines="tensorrt")
    with pytest.raises(ResPruneError, match="engines should be one of tensorrt, tensorrt-rtx, not str"):
        Pipeline.load(root, engines="openvino")


def test_without_a_gpu_it_says_so(bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resprune.runtime.backends.cuda._runtime", lambda: Cuda(gpus=0))
    with pytest.raises(ResPruneError, match="no GPU that CUDA can use here"):
        Pipeline.load(bundles("clip-llama"), engines="tensorrt-rtx")


def test_a_buffer_grows_and_never_shrinks(stand_in: Place) -> None:
    cuda = stand_in.cuda
    assert cuda is not None
    buffer = Buffer()
    first = buffer.reserve(0)
    assert first != 0, "no bytes have an address as well"
    assert buffer.reserve(512) == first
    second = buffer.reserve(513)
    assert (buffer.size, cuda.in_use()) == (1024, 1024)
    assert buffer.reserve(3) == second
    buffer.reserve(1025, spare=1.5)
    assert buffer.size == 2048, "1,537 bytes in whole pages of 512"
    buffer.close()
    assert cuda.in_use() == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("float32", (2, 3, 5), 120),
        ("float16", (2, 3, 5), 60),
        ("int64", (7,), 56),
        ("bool", (4, 2), 8),
        ("float32", (2, 0), 0),
    ],
)
def test_bytes_of_a_tensor(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert num_bytes(TensorSpec("x", dtype, shape), shape) == size


def test_the_stand_in_has_no_method_that_the_real_ones_lack() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    cuda = pytest.importorskip("cuda.bindings.runtime")
    for fake in (gpu_stand_in.IExecutionContext, gpu_stand_in.ICudaEngine, gpu_stand_in.Runtime):
        real = getattr(rtx, fake.__name__)
        for name in (
            name for name in vars(fake) if not name.startswith("_") and callable(getattr(fake, name))
        ):
            assert hasattr(real, name), f"{fake.__name__}.{name}"
    for fake in (gpu_stand_in.Severity, gpu_stand_in.ExecutionContextAllocationStrategy):
        real = getattr(rtx, fake.__name__, None) or getattr(rtx.ILogger, fake.__name__)
        assert {member.name: member.value for member in fake}.items() <= {
            name: int(value) for name, value in real.__members__.items()
        }.items()
    assert cuda.cudaError_t.cudaErrorMemoryAllocation.name == "cudaErrorMemoryAllocation"
    for name in (name for name in dir(Cuda) if name.startswith("cuda")):
        assert hasattr(cuda, name), name
    for fake, real in ((gpu_stand_in.Status, cuda.cudaError_t), (gpu_stand_in.CopyKind, cuda.cudaMemcpyKind)):
        assert all(int(getattr(real, member.name)) == member.value for member in fake)
