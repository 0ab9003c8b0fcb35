"""A real llama.cpp behind bundles of every language model that it knows: their own answers, token for token."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from openai import OpenAI

from benchmarks import bursts
from benchmarks import llamacpp as benchmark
from resprune.runtime.backends.llama_cpp import llamacpp
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests import tiny, tiny_qwen, tiny_tiles
from tests.hosts import llamacpp_host
from tests.hosts.demo import PICTURES, QUESTIONS
from tests.hosts.gguf_model import write_gguf
from tests.hosts.serve import served
from tests.runtime.bundles import one_sentence
from tests.serving.conftest import data_url

ROOT = Path(__file__).parents[2]
ASKED = [(PICTURES / case["image"], case["question"]) for case in QUESTIONS]
QUESTION = "what colour is the red square on the table ?"
STEPS = 24
SCRIPT = """
import sys
from tests.hosts import llamacpp_host
llamacpp_host.use()
from resprune.runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""
RESPRUNE = [sys.executable, "-c", SCRIPT]
"""`resprune`, in a process that has llama.cpp."""


@dataclass(frozen=True)
class Pair:
    """A bundle and its language model in GGUF."""

    bundle: Path
    model: Path


@pytest.fixture(scope="session", autouse=True)
def _package() -> None:
    llamacpp_host.use()


@pytest.fixture(scope="session")
def demo(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(
        demo_bundle, write_gguf("demo", demo_bundle, tmp_path_factory.mktemp("gguf") / "demo.gguf", "f32")
    )


@pytest.fixture
def near(demo: Pair) -> Iterator[Pipeline]:
    with Pipeline.load(demo.bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def far(demo: Pair) -> Iterator[Pipeline]:
    with Pipeline.load(demo.bundle, threads=1, generator=llamacpp(demo.model)) as pipeline:
        yield pipeline


def interleaved(root: Path, variant: tiny_qwen.TinyQwen) -> Path:
    """A Qwen3-VL whose rotary sections, like those of the published ones, give time the most; llama.cpp leaves
    frequencies that no section reaches unturned."""
    tiny_qwen.write_checkpoint(root, variant)
    config = json.loads((root / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
    (root / "config.json").write_text(json.dumps(config))
    return root


MISTRAL = replace(tiny.VARIANTS["siglip-mistral"], language_options={"sliding_window": None})
# It adds no plane after its last layer, and the published models have some thirty layers.
QWEN3_VL = replace(tiny_qwen.VARIANTS["qwen3"], layers=3)
MADE: dict[str, Callable[[Path], Path]] = {
    "llama": lambda root: tiny.write_checkpoint(root, tiny.VARIANTS["clip-llama"]),
    "mistral": lambda root: tiny.write_checkpoint(root, MISTRAL),
    "qwen2": lambda root: tiny.write_checkpoint(root, tiny.VARIANTS["dinov2-qwen2"]),
    "qwen3": lambda root: tiny_tiles.write_checkpoint(root, tiny_tiles.VARIANTS["internvl-qwen3"]),
    "qwen2-vl": lambda root: tiny_qwen.write_checkpoint(root, tiny_qwen.VARIANTS["qwen2"]),
    "qwen2.5-vl": lambda root: tiny_qwen.write_checkpoint(root, tiny_qwen.VARIANTS["qwen25"]),
    "qwen3-vl": lambda root: interleaved(root, QWEN3_VL),
    "smolvlm": lambda root: tiny_tiles.write_checkpoint(root, tiny_tiles.VARIANTS["smolvlm"]),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A name in MADE → its bundle and its GGUF, written once."""
    from resprune.exporter.export import export
    from resprune.exporter.options import Options

    done: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            checkpoint = MADE[name](root / "checkpoint")
            bundle = export(str(checkpoint), root / "bundle", Options(k=7))
            done[name] = Pair(bundle, write_gguf(str(checkpoint), bundle, root / "model.gguf", "f32"))
        return done[name]

    return pair


@pytest.mark.parametrize("name", MADE)
def test_an_f32_file_gives_the_tokens_of_the_bundle(name: str, made: Callable[[str], Pair]) -> None:
    pair, random = made(name), np.random.default_rng(0)
    settings: Any = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    with (
        Pipeline.load(pair.bundle, threads=1) as here,
        Pipeline.load(pair.bundle, threads=1, generator=llamacpp(pair.model)) as there,
    ):
        for number in range(6):
            height, width = random.integers(40, 120, 2)
            image = random.integers(0, 256, (height, width, 3), np.uint8)
            images = [image, image[: height // 2]] if number % 3 == 0 else [image]
            expected = here.ask(images, QUESTION, stream=False, **settings)
            found = there.ask(images, QUESTION, stream=False, **settings)
            assert found.token_ids == expected.token_ids, number
            assert found.text == expected.text
        chats = [vlm.look(images).chat() for vlm in (here, there)]
        for question in (QUESTION, "what is red ?"):
            answered = [chat.ask(question, stream=False, **settings).token_ids for chat in chats]
            assert answered[0] == answered[1], question
        questions = ["what is red ?", QUESTION, "how many circles are there in the photo of a cat ?"]
        batch = [
            [answer.token_ids for answer in pipeline.ask_batch([image] * 3, questions, **settings)]
            for pipeline in (here, there)
        ]
        assert batch[0] == batch[1]


@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
def test_the_demo_answers_as_it_does(precision: str, demo: Pair, near: Pipeline, tmp_path: Path) -> None:
    model = write_gguf("demo", demo.bundle, tmp_path / "model.gguf", precision)
    with Pipeline.load(demo.bundle, threads=1, generator=llamacpp(model)) as there:
        for picture, question in ASKED:
            expected, found = (pipeline.ask(picture, question, stream=False) for pipeline in (near, there))
            assert found.token_ids == expected.token_ids


def test_an_answer_streams_and_a_conversation_goes_on(near: Pipeline, far: Pipeline) -> None:
    picture, question = ASKED[0]
    settings: Any = {"max_new_tokens": 12, "min_new_tokens": 12}
    expected = near.ask(picture, question, **settings)
    pieces = list(far.ask(picture, question, **settings))
    assert "".join(pieces) == "".join(expected)
    assert len(pieces) > 1
    chats = [pipeline.look(picture).chat() for pipeline in (near, far)]
    for words in (question, "How many circles are there?", "Is the small square at the top?"):
        here, there = (chat.ask(words, stream=False) for chat in chats)
        assert there.token_ids == here.token_ids


def test_a_question_about_no_image(near: Pipeline, far: Pipeline) -> None:
    words = "Is there a circle?"
    settings: Any = {"max_new_tokens": 8, "min_new_tokens": 8}
    here, there = (pipeline.without_images().ask(words, stream=False, **settings) for pipeline in (near, far))
    assert there.token_ids == here.token_ids


def test_many_answers_at_once(near: Pipeline, far: Pipeline) -> None:
    pairs = [pair for pair in ASKED for _ in range(2)]
    expected = [near.ask(*pair, stream=False).token_ids for pair in pairs]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda pair: far.ask(*pair, stream=False).token_ids, pairs)) == expected
    open_ones = [far.ask(*pair) for pair in pairs[:4]]
    assert [answer.finish().token_ids for answer in reversed(open_ones)] == expected[:4][::-1]


def test_drawing_is_seeded_and_settings_are_the_bundles(near: Pipeline, far: Pipeline) -> None:
    picture, question = ASKED[1]
    settings: Any = {"temperature": 1.5, "seed": 7, "max_new_tokens": 10, "repetition_penalty": 1.2}
    expected = near.ask(picture, question, stream=False, **settings)
    assert far.ask(picture, question, stream=False, **settings).token_ids == expected.token_ids


def test_closing_ends_an_open_answer(demo: Pair) -> None:
    pipeline = Pipeline.load(demo.bundle, threads=1, generator=llamacpp(demo.model))
    answer = iter(pipeline.ask(*ASKED[0], max_new_tokens=20, min_new_tokens=20))
    next(answer)
    pipeline.close()
    with pytest.raises(ResPruneError, match="closed"):
        list(answer)


def run(*words: object, lines: str = "") -> str:
    """What `resprune` prints for these words and lines of input; it must succeed and complain of nothing."""
    command = [*RESPRUNE, *map(str, words)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_ask(demo: Pair, near: Pipeline) -> None:
    picture, question = ASKED[0]
    printed = run("ask", demo.bundle, picture, question, "--gguf", demo.model, "--json")
    assert json.loads(printed)["text"] == near.ask(picture, question, stream=False).text


def test_chat(demo: Pair, near: Pipeline) -> None:
    picture, question = ASKED[0]
    questions = [question, "How many circles are there?"]
    lines = "".join(f"{words}\n" for words in questions)
    printed = run("chat", demo.bundle, picture, "--gguf", demo.model, lines=lines)
    chat = near.look(picture).chat()
    assert printed.split("\n")[:2] == [chat.ask(words, stream=False).text for words in questions]


def test_bench(demo: Pair) -> None:
    printed = run("bench", demo.bundle, "--gguf", demo.model, "-k", "4,16", "--repeats", "1", "--json")
    found = json.loads(printed)
    assert found["backend"] == "cpu; demo.gguf in llama.cpp"
    few, more = found["cases"]
    assert more["prompt_tokens"] - few["prompt_tokens"] == 12
    assert few["tokens_per_second"]["median"] > 0


def test_serve(demo: Pair, near: Pipeline) -> None:
    """Whole and streamed, to two clients at once; one that goes away in the middle leaves its place to others."""

    def body(picture: Path, question: str) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": data_url(picture.read_bytes())}}
        content = [image, {"type": "text", "text": question}]
        return {"model": demo.bundle.name, "messages": [{"role": "user", "content": content}]}

    def whole(pair: tuple[Path, str]) -> str:
        answer = client.chat.completions.create(**body(*pair))
        return answer.choices[0].message.content or ""

    def streamed(pair: tuple[Path, str]) -> str:
        chunks = client.chat.completions.create(**body(*pair), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    expected = [near.ask(*pair, stream=False).text for pair in ASKED]
    options = ("--gguf", demo.model, "--parallel", 2)
    with (
        served(demo.bundle, *options, resprune=RESPRUNE, PYTHONPATH=str(ROOT)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        answers = threads.map(lambda way: [way(pair) for pair in ASKED], (whole, streamed))
        assert list(answers) == [expected] * 2
        for _ in range(3):  # more than there are places
            endless = body(*ASKED[0]) | {"temperature": 2, "max_tokens": 500, "stream": True}
            with client.chat.completions.create(**endless) as chunks:
                next(iter(chunks))
        assert whole(ASKED[0]) == expected[0]


def test_the_benchmark_has_figures_of_all(
    demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bursts, "PAUSE_SECONDS", 0.0)
    for name in ("PROMPTS", "BURSTS"):
        monkeypatch.setattr(benchmark, name, 1)
    monkeypatch.delitem(benchmark.BUNDLES, "int8")
    published = write_gguf("demo", demo.bundle, tmp_path / "published.gguf", "q8_0")
    specs = benchmark.prepare("demo", published, tmp_path)
    result = benchmark.compare(specs, processes=1)
    assert result["engines"].keys() == {benchmark.BASE, *benchmark.PREDICTED} - {"resprune, int8"}
    for name, cases in result["engines"].items():
        for case in (str(benchmark.K), "all"):
            found = cases[case]
            assert min(found["tokens per second"].median, found["prefill"].median) > 0
            assert ("of theirs" in found) == (name != benchmark.BASE)
    sizes = [Path(specs[f"llama.cpp, {name}"]["gguf"]).stat().st_size for name in ("Q4_0", "Q8_0")]
    assert sizes[0] < 0.8 * sizes[1]


def changed(model: Path, out: Path, **values: Any) -> Path:
    """A copy of a GGUF file in which some scalar values of the header are others."""
    shutil.copyfile(model, out)
    reader = gguf.GGUFReader(out, "r+")
    for name, value in values.items():
        field = reader.get_field(name.replace("__", "."))
        assert field is not None
        field.parts[field.data[0]][0] = value
    reader.data.flush()
    return out


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("qwen2", r"has the architecture qwen2 and the bundle's language model is llama"),
        ("mistral", r"has rows of 48 numbers and the bundle of 128"),
    ],
)
def test_another_models_file_is_one_line(
    other: str, said: str, made: Callable[[str], Pair], demo: Pair
) -> None:
    with pytest.raises(ResPruneError, match=said) as caught:
        Pipeline.load(demo.bundle, generator=llamacpp(made(other).model))
    one_sentence(caught.value)


def test_another_vocabulary_is_one_line(made: Callable[[str], Pair]) -> None:
    with pytest.raises(ResPruneError, match=r"another vocabulary|has a vocabulary of") as caught:
        Pipeline.load(made("smolvlm").bundle, generator=llamacpp(made("llama").model))
    one_sentence(caught.value)


def test_a_shorter_context_is_one_line(demo: Pair, tmp_path: Path) -> None:
    model = changed(demo.model, tmp_path / "short.gguf", llama__context_length=128)
    with pytest.raises(ResPruneError, match=r"takes 128 tokens and the bundle's prompts up to") as caught:
        Pipeline.load(demo.bundle, generator=llamacpp(model))
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("size", "said"), [(20_000, "failed to read"), (-1_000, "not within the file bounds")]
)
def test_a_broken_file_is_one_line(size: int, said: str, demo: Pair, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo.model.read_bytes()[:size])
    with pytest.raises(ResPruneError, match=rf"llama.cpp cannot open .*cut\.gguf \(.*{said}") as caught:
        Pipeline.load(demo.bundle, generator=llamacpp(cut))
    one_sentence(caught.value)
