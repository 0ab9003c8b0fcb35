"""TensorRT-LLM in process, against its published signatures: what is handed over gives the local answers."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from resprune import Pipeline, ResPruneError
from resprune.runtime.backends.backend import BackendFactory
from resprune.runtime.backends.tensorrt_llm import Angles, PyTorchBackend, engine_backend, pytorch_backend
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.families.rotary import Rotary, blocks, interleaved
from resprune.runtime.families.table import FAMILIES, Family
from tests.runtime.bundles import bundle_of_files
from tests.runtime.fake_tensorrt_llm import install
from tests.runtime.pipelines import QUESTION, picture, with_manifest
from tests.runtime.wire import Model

STEPS = 16
BACKENDS: dict[str, Callable[[str], BackendFactory]] = {
    "pytorch": pytorch_backend,
    "engine": engine_backend,
}
EMBEDDINGS: dict[str, Callable[[Any], Any]] = {
    "qwen2_vl": Qwen2VLRotaryEmbedding,
    "qwen2_5_vl": Qwen2_5_VLRotaryEmbedding,
    "qwen3_vl": Qwen3VLTextRotaryEmbedding,
}


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_answers_are_the_local_ones(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    recorded = install(monkeypatch, tiny_model)
    near, far = Pipeline.load(bundle), Pipeline.load(bundle, generator=BACKENDS[backend]("some/where"))
    assert recorded.opened == "some/where"
    images = [picture(1), [picture(2), picture(3)], picture(4)]
    questions = [
        QUESTION,
        "how many?",
        "is the small red circle left of the large green square on the table?",
    ]
    here, there = (vlm.ask_batch(images, questions, tokens=4, max_new_tokens=STEPS) for vlm in (near, far))
    assert [answer.token_ids for answer in there] == [answer.token_ids for answer in here]
    assert [answer.text for answer in there] == [answer.text for answer in here]
    assert len({tuple(answer.token_ids) for answer in here}) == 3, "shows nothing"
    streamed = far.ask(picture(1), QUESTION, max_new_tokens=STEPS)
    assert list(streamed) == list(near.ask(picture(1), QUESTION, max_new_tokens=STEPS))


def test_qwen_answers_from_an_engine_with_its_true_positions(
    tiny_qwen: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, checkpoint = tiny_qwen
    install(monkeypatch, checkpoint)
    near, far = Pipeline.load(bundle), Pipeline.load(bundle, generator=engine_backend("engine"))
    images = [picture(1, (70, 50)), [picture(2, (30, 120)), picture(3)]]
    questions = [QUESTION, "how many small green circles are there?"]
    here, there = (vlm.ask_batch(images, questions, max_new_tokens=STEPS) for vlm in (near, far))
    assert [answer.token_ids for answer in there] == [answer.token_ids for answer in here]
    assert len(set(here[0].token_ids)) > 5, "shows nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_reaches_it(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    recorded = install(monkeypatch, tiny_model)
    vlm = Pipeline.load(bundle, generator=BACKENDS[backend]("model"))
    hot = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 9}
    answers = [vlm.ask(picture(1), QUESTION, **hot, seed=seed).token_ids for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert len(answers[0]) == 9
    sent = recorded.sampling if backend == "engine" else vars(recorded.sampling)
    seed = "random_seed" if backend == "engine" else "seed"
    assert {"temperature": 1.5, "top_p": 0.9, seed: 2}.items() <= sent.items()
    vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
    sent = recorded.sampling if backend == "engine" else vars(recorded.sampling)
    assert sent["top_k"] == 1
    assert sent.get("temperature") is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_nobody_reads_is_aborted(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Left in its middle or before its first piece, dropped or closed; not one that was read to its end."""
    recorded = install(monkeypatch, tiny_model)

    def stopped() -> int:
        return recorded.aborted + len(recorded.cancelled)

    with Pipeline.load(bundle, generator=BACKENDS[backend]("model")) as vlm:
        for _ in vlm.ask(picture(1), QUESTION, max_new_tokens=200):
            break
        assert stopped() == 1
        vlm.ask(picture(1), QUESTION, max_new_tokens=200)
        assert stopped() == 2
        unread = vlm.ask(picture(1), QUESTION, max_new_tokens=200)
        unread.close()
        assert stopped() == 3
        vlm.ask(picture(1), QUESTION, max_new_tokens=3, stream=False)
        del unread
        assert stopped() == 3
    assert set(recorded.cancelled) <= {7}
    assert recorded.shut_down == (backend == "pytorch")


@pytest.mark.parametrize(
    "error", [RuntimeError("the queue is full"), ResPruneError("the tokenizer adds other special tokens")]
)
@pytest.mark.parametrize("place", ["_text", "_llm.generate_async"])
def test_a_prompt_that_is_not_taken_aborts_those_before_it(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    recorded = install(monkeypatch, tiny_model)
    vlm = Pipeline.load(bundle, generator=pytorch_backend("model"))
    taken, take = count(1), attrgetter(place)(vlm._backend)

    def third_fails(*given: Any, **named: Any) -> Any:
        if next(taken) == 3:
            raise error
        return take(*given, **named)

    *within, name = place.split(".")
    monkeypatch.setattr(attrgetter(*within)(vlm._backend) if within else vlm._backend, name, third_fails)
    with pytest.raises(ResPruneError, match=str(error)):
        vlm.ask_batch([picture(1), picture(2), picture(3), picture(4)], [QUESTION] * 4)
    assert len(recorded.prompts) == recorded.aborted == 2


def test_steps_that_are_no_generator_are_read_and_left(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their request ids cannot be seen, so nothing is cancelled."""
    recorded = install(monkeypatch, tiny_model)
    vlm = Pipeline.load(bundle, generator=engine_backend("engine"))
    told = vlm.ask(picture(1), QUESTION, max_new_tokens=3).token_ids
    generator: Any = vlm._backend
    generate = generator._runner.generate
    monkeypatch.setattr(generator._runner, "generate", lambda **given: iter(list(generate(**given))))
    assert vlm.ask(picture(1), QUESTION, max_new_tokens=3).token_ids == told
    unread = vlm.ask(picture(1), QUESTION, max_new_tokens=3)
    next(iter(unread))
    unread.close()
    assert recorded.cancelled == ()


def test_a_tokenizer_that_adds_bos_gets_the_prompt_without_it(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = install(monkeypatch, tiny_model)
    vlm = Pipeline.load(bundle, generator=pytorch_backend("model"))
    vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
    generator: Any = vlm._backend
    assert isinstance(generator, PyTorchBackend)
    (written,) = recorded.prompts
    assert written.startswith("<s>")
    adding = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    monkeypatch.setattr(generator._tokenizer, "post_processor", adding)
    prompt = vlm._prompter.prompt(QUESTION, 1)
    assert generator._text(prompt) == written.removeprefix("<s>")
    with pytest.raises(ResPruneError, match="adds other special tokens than the chat template writes"):
        generator._text(replace(prompt, ids=prompt.ids[1:]))


def test_what_it_raises_is_one_sentence(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tiny_model)
    vlm = Pipeline.load(bundle, generator=engine_backend("engine"))

    def full(**given: Any) -> None:
        raise RuntimeError("Input batch size (1) exceeds\nthe engine or specified limit (0)")

    generator: Any = vlm._backend
    monkeypatch.setattr(generator._runner, "generate", full)
    sentence = r"TensorRT-LLM could not take the prompt \(Input batch size \(1\) exceeds the engine"
    with pytest.raises(ResPruneError, match=sentence):
        vlm.ask(picture(1), QUESTION)


def test_a_prompt_table_that_is_too_small_is_named(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tiny_model, table_size=13)
    vlm = Pipeline.load(bundle, generator=engine_backend("engine"))
    vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
    with pytest.raises(
        ResPruneError, match="takes 13 visual tokens and there are 14; build it with --max_multimod"
    ):
        vlm.ask([picture(1), picture(2)], QUESTION)


def test_wrong_positions_and_a_missing_package_are_one_sentence(
    bundle: Path, tiny_qwen: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResPruneError, match=r"makes up a grid for the visual tokens of Qwen2\.5-VL"):
        Pipeline.load(tiny_qwen[0], generator=pytorch_backend("model"))
    original = with_manifest(bundle, tmp_path, positions="original")
    for backend in BACKENDS.values():
        with pytest.raises(ResPruneError, match="exported with --positions original; export it again"):
            Pipeline.load(original, generator=backend("model"))
    counting = replace(read_bundle(bundle).manifest.selection, counts=True)
    weighing = with_manifest(bundle, tmp_path / "weighing", selection=counting)
    for backend in BACKENDS.values():
        with pytest.raises(ResPruneError, match="TensorRT-LLM attends to every row alike"):
            Pipeline.load(weighing, generator=backend("model"))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    for backend in BACKENDS.values():
        with pytest.raises(ResPruneError, match="TensorRT-LLM is not installed here"):
            Pipeline.load(bundle, generator=backend("model"))


@pytest.mark.parametrize("layout", ["today's", "of transformers 4"])
@pytest.mark.parametrize("family", [row for row in FAMILIES.values() if row.rotary], ids=lambda row: row.name)
def test_the_angles_are_those_of_the_model(family: Family, tmp_path: Path, layout: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "rope_parameters": rope}
    made = AutoConfig.for_model(family.name, text_config=sizes)
    turned = EMBEDDINGS[family.name](made.text_config)
    config = made.to_dict()
    if layout == "of transformers 4":
        rope = dict(config["text_config"].pop("rope_parameters"))
        config = config["text_config"] | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    written = bundle_of_files(tmp_path, {"config.json": json.dumps(config)})
    bundle = Bundle(written.root, replace(written.manifest, context_length=32))
    positions = torch.tensor([[0, 1, 2, 2, 2, 9, 10], [0, 1, 2, 3, 5, 9, 10], [0, 1, 4, 2, 3, 9, 10]])
    cosine, sine = turned(torch.zeros(1), positions[:, None])
    assert family.rotary is not None
    table = Angles(bundle, family.rotary).table(positions.numpy())
    assert table.shape == (32, 8, 2)
    for part, expected in enumerate((cosine, sine)):
        np.testing.assert_allclose(table[:7, :, part], expected[0, :, :8].numpy(), atol=1e-6)
    np.testing.assert_array_equal(table[7:, :, 0], 1)


SECTIONS = (
    [0, -5, 13],
    [4, 4],
    [4, 2, 2, 0],
    [4, 2, 2.5],
    [4, True, 3],
    [4, 4, "0"],
    "abc",
    None,
    8,
)
ROPE = {"rope_theta": 1e4, "mrope_section": [4, 2, 2]}


@pytest.mark.parametrize("rotary", [blocks, interleaved])
@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 8},
        *({"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": sections}} for sections in SECTIONS),
        {"head_dim": 16, "rope_parameters": {"rope_theta": 1e4}},
        {"head_dim": 16, "rope_parameters": ROPE | {"rope_theta": 10**400}},
        {"head_dim": 16, "rope_parameters": [4, 2, 2]},
        {"hidden_size": 16, "num_attention_heads": 0, "rope_parameters": ROPE},
        {"text_config": "none"},
    ],
)
def test_a_config_without_angles_is_one_sentence(
    config: dict[str, Any], rotary: Rotary, tmp_path: Path
) -> None:
    written = bundle_of_files(tmp_path, {"config.json": json.dumps(config)})
    with pytest.raises(ResPruneError, match="does not say how positions turn") as raised:
        Angles(written, rotary)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("sections", [[4, 4, 4], [1, 1, 1]])
def test_sections_of_another_sum_are_refused_in_blocks(sections: list[int], tmp_path: Path) -> None:
    """Interleaved, the model's own code takes them: tests/exporter/test_parity_qwen3.py."""
    config = {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": sections}}
    with pytest.raises(ResPruneError, match="does not say how positions turn"):
        Angles(bundle_of_files(tmp_path, {"config.json": json.dumps(config)}), blocks)
