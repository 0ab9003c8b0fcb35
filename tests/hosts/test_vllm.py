"""A real vLLM behind bundles of the demo model and of a tiny LLaVA-NeXT: their own answers, token for token."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.backends.servers import server
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests import tiny
from tests.hosts.demo import PICTURES, QUESTIONS
from tests.hosts.host import Running
from tests.hosts.vllm_host import MAX_MODEL_LEN, published, vllm
from tests.runtime.bundles import one_sentence

ROOT = Path(__file__).parents[2]
FURTHER = [
    "What color is the large square?",
    "How many circles are there?",
    "Is the small square at the top or at the bottom?",
    "What is the white number?",
]
PAIRS = [
    (PICTURES / case["image"], question) for case in QUESTIONS for question in [case["question"], *FURTHER]
]


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    work = tmp_path_factory.mktemp("vllm")
    with vllm(published(ROOT / "demo" / "model", work / "demo"), work / "demo.log") as running:
        yield running


@pytest.fixture(scope="module")
def near(demo_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def far(demo_bundle: Path, demo_server: Running) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, threads=1, generator=server(demo_server.url)) as pipeline:
        yield pipeline


def test_every_answer_is_the_bundles(near: Pipeline, far: Pipeline) -> None:
    assert len(PAIRS) >= 24
    for picture, question in PAIRS:
        here, there = (pipeline.ask(picture, question, stream=False) for pipeline in (near, far))
        assert there.token_ids == here.token_ids, (picture.name, question)
        assert there.text == here.text


def test_two_images(near: Pipeline, far: Pipeline) -> None:
    for pair in ((0, 1), (3, 0), (5, 2)):
        images = [PICTURES / QUESTIONS[number]["image"] for number in pair]
        here, there = (pipeline.ask(images, FURTHER[1], stream=False) for pipeline in (near, far))
        assert there.token_ids == here.token_ids, pair


def test_sixteen_at_once(near: Pipeline, far: Pipeline) -> None:
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda pair: far.ask(*pair, stream=False).token_ids, PAIRS[:16]))
    assert found == [near.ask(*pair, stream=False).token_ids for pair in PAIRS[:16]]
    batch = far.ask_batch([image for image, _ in PAIRS[:16]], [question for _, question in PAIRS[:16]])
    assert [answer.token_ids for answer in batch] == found


def test_an_answer_ends_where_the_model_ends_it(far: Pipeline) -> None:
    ids = far.ask(*PAIRS[0], max_new_tokens=40, stream=False).token_ids
    assert ids[-1] == 2
    assert len(ids) < 10
    longer = far.ask(*PAIRS[0], max_new_tokens=40, min_new_tokens=20, stream=False).token_ids
    assert longer[: len(ids) - 1] == ids[:-1]
    assert len(longer) > 20


def test_a_prompt_past_the_context_is_one_line(far: Pipeline) -> None:
    with pytest.raises(ResPruneError, match=rf"refused with status 400: .*{MAX_MODEL_LEN} tokens") as caught:
        far.ask(PAIRS[0][0], "What color is the large square? " * 80, stream=False)
    one_sentence(caught.value)
    assert far.ask(*PAIRS[0], stream=False).token_ids


def test_a_wrong_model_name_is_one_line(demo_bundle: Path, demo_server: Running) -> None:
    generator = server(demo_server.url, model="another")
    with (
        Pipeline.load(demo_bundle, threads=1, generator=generator) as pipeline,
        pytest.raises(
            ResPruneError, match=r"refused with status 404: The model `another` does not exist"
        ) as caught,
    ):
        pipeline.ask(*PAIRS[0], stream=False)
    one_sentence(caught.value)


# LLaVA-NeXT, whose chat template writes BOS, with a tokenizer that would add another. vLLM's attention on the CPU takes
# heads of 32, and random weights never end an answer.
NEXT = replace(tiny.VARIANTS["next-llama"], hidden=128, heads=4, kv_heads=2, vision_hidden=64, vision_heads=2)
SIZES = [(32, 32), (70, 30), (30, 90), (64, 64), (100, 35)]
STEPS = 24


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "next", NEXT)
    file = str(root / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    tokenizer.save(file)
    return root


@pytest.fixture(scope="module")
def next_server(next_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    work = tmp_path_factory.mktemp("vllm-next")
    with vllm(published(next_checkpoint, work / "next"), work / "next.log") as running:
        yield running


@pytest.fixture(scope="module")
def next_pair(
    next_checkpoint: Path, next_server: Running, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pipeline, Pipeline]]:
    bundle = export(str(next_checkpoint), tmp_path_factory.mktemp("bundles") / "next", Options(k=7))
    with (
        Pipeline.load(bundle, threads=1) as near,
        Pipeline.load(bundle, threads=1, generator=server(next_server.url)) as far,
    ):
        yield near, far


def picture(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


QUESTION = "how many red circles are there"


def test_a_template_that_writes_bos_gets_one(next_pair: tuple[Pipeline, Pipeline]) -> None:
    for size in SIZES:
        here, there = (
            pipeline.ask(picture(size), QUESTION, max_new_tokens=STEPS, stream=False)
            for pipeline in next_pair
        )
        assert there.prompt.ids.count(1) == 1
        assert there.token_ids == here.token_ids, size
        assert len(there.token_ids) == STEPS
    images = [picture(SIZES[0]), picture(SIZES[1])]
    here, there = (
        pipeline.ask(images, QUESTION, max_new_tokens=STEPS, stream=False) for pipeline in next_pair
    )
    assert there.token_ids == here.token_ids


def test_the_checkpoints_penalty_holds_there_too(next_pair: tuple[Pipeline, Pipeline]) -> None:
    settings = {"max_new_tokens": STEPS, "repetition_penalty": 1.6}
    _, far = next_pair
    here, there = (
        vlm.ask(picture(SIZES[0]), QUESTION, stream=False, **settings).token_ids for vlm in next_pair
    )
    assert there == here
    assert there != far.ask(picture(SIZES[0]), QUESTION, max_new_tokens=STEPS, stream=False).token_ids


def test_a_seed_repeats_a_draw(next_pair: tuple[Pipeline, Pipeline]) -> None:
    _, far = next_pair
    first, again, other = (
        far.ask(
            picture(SIZES[0]),
            QUESTION,
            temperature=1.5,
            top_k=0,
            seed=seed,
            max_new_tokens=STEPS,
            stream=False,
        ).token_ids
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_an_answer_comes_piece_by_piece(next_pair: tuple[Pipeline, Pipeline]) -> None:
    near, far = next_pair
    there = far.ask(picture(SIZES[0]), QUESTION, max_new_tokens=STEPS)
    pieces = list(there)
    assert len(pieces) > 5
    assert "".join(pieces) == near.ask(picture(SIZES[0]), QUESTION, max_new_tokens=STEPS).text


def test_a_server_killed_in_the_middle_of_an_answer_is_one_line(
    next_pair: tuple[Pipeline, Pipeline], next_server: Running
) -> None:
    """The last test of this server."""
    _, far = next_pair
    # It must not end by itself before the signal comes, also where this process has to wait for its turn.
    answer = far.ask(picture(SIZES[0]), QUESTION, min_new_tokens=400, max_new_tokens=400)
    pieces = iter(answer)
    next(pieces)
    next_server.signal(signal.SIGKILL)
    with pytest.raises(ResPruneError, match=r"broke|cut its answer off") as caught:
        list(pieces)
    one_sentence(caught.value)
